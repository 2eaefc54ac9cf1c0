"""Projections of one input as one matrix product.

A decoding step multiplies few rows, so a layer's time is that of reading its weights plus a fixed cost for every
product. transformers computes queries, keys and values, and the two inputs of a gated MLP, one after the other; side by
side in one matrix they cost one product each. Those that stand alone are replaced too: `linear` multiplies a few rows
by a kernel of ours, and every product knows the weight that is read after its own.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from medusa_ds.decoding.kernels.few_rows import gated_linear, gates, linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
"""Names of projections that get the same input, in the order in which all layers of transformers call them."""
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers that compute `down_proj(act_fn(gate_proj(x)) * up_proj(x))`; others may have factors."""


class _First(nn.Module):
    """Multiplies by all weights of a group, returns its own part and keeps the others' for their calls."""

    ahead: nn.Parameter  # the weight that is multiplied by next; no parameter of this module

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        weights = [linear.weight.data for linear in linears]
        self.weight = nn.Parameter(torch.cat(weights) if len(weights) > 1 else weights[0], requires_grad=False)
        bias = [linear.bias.data for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(bias), requires_grad=False) if bias else None
        self.sizes = [linear.out_features for linear in linears]
        self.rest: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        first, *rest = linear(hidden, self.weight, self.bias, self.ahead).split(self.sizes, -1)
        self.rest = list(rest)  # torch.compile of PyTorch 2.11 makes a tuple of it
        return first


class _Other(nn.Module):
    first: _First

    def __init__(self, first: _First) -> None:
        super().__init__()
        self.__dict__["first"] = first  # not a submodule: its weight is the first's

    def forward(self, _: Tensor) -> Tensor:
        return self.first.rest.pop(0)


class _Gating:
    """Comes before a class of `GATED` with packed projections: few rows are gated in the product's kernel.

    All else goes transformers' own way, so that a plain step is compiled from the same code as without this class.
    """

    def forward(self: Any, hidden: Tensor) -> Any:
        first = self.gate_proj
        if gates(hidden, first.weight):
            return self.down_proj(gated_linear(hidden, first.weight, first.ahead))
        return super().forward(hidden)  # type: ignore[misc]


@cache
def _gating(mlp: type) -> type:
    return type(mlp.__name__, (_Gating, mlp), {})


def _can_gate(mlp: Any) -> bool:
    if type(mlp).__name__ not in GATED or isinstance(mlp, _Gating) or "forward" in vars(mlp):
        return False
    return mlp.config.hidden_act == "silu" and isinstance(mlp.gate_proj, _First) and mlp.gate_proj.bias is None


@torch.no_grad()
def pack_projections(backbone: nn.Module) -> None:
    """Put the projections of `GROUPS` side by side and let `GATED` gate in the kernel, in place, for inference only.

    Needs room for one layer's copy.
    """
    for path in [path for path, _ in backbone.named_modules()]:  # names hold no weights
        module = backbone.get_submodule(path)
        for names in GROUPS:
            linears = [getattr(module, name, None) for name in names]
            plain = [linear for linear in linears if type(linear) is nn.Linear]
            if len(plain) < len(names) or len({linear.bias is None for linear in plain}) > 1:
                continue
            first = _First(plain)
            setattr(module, names[0], first)
            for name in names[1:]:
                setattr(module, name, _Other(first))
        if _can_gate(module):
            own_class: Any = type(module)
            module.__class__ = _gating(own_class)
    packed = [module for module in backbone.modules() if isinstance(module, _First)]
    for module, following in zip(packed, packed[1:] + packed[:1], strict=True):
        module.__dict__["ahead"] = following.weight
