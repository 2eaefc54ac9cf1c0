"""Projections of one input as one matrix product.

A decoding step multiplies few rows, so a layer's time is that of reading its weights plus a fixed cost for every
product. transformers computes queries, keys and values, and the two inputs of a gated MLP, one after the other; side by
side in one matrix they cost one product each. Those that stand alone are replaced too: `linear` multiplies a few rows
by a kernel of ours, and every product knows the weight that is read after its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from medusa_ds.decoding.kernels.few_rows import gated_linear, gates, linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj",), ("up_proj",), ("down_proj",))
"""Names of projections that get the same input, in the order in which all layers of transformers call them."""


class Packed(nn.Module):
    """The projections of one input: from [..., K] to [..., N], N the columns of all of them."""

    ahead: tuple[Tensor]  # the weight that is multiplied by next; in a tuple it is no parameter of this module

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        weights = [linear.weight.data for linear in linears]
        self.weight = nn.Parameter(torch.cat(weights) if len(weights) > 1 else weights[0], requires_grad=False)
        bias = [linear.bias.data for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(bias), requires_grad=False) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """All projections of [..., K]."""
        return linear(hidden, self.weight, self.bias, *self.ahead)


class _First(Packed):
    """Multiplies by all weights of a group, returns its own part and leaves the others' in `rest` for their calls."""

    def __init__(self, linears: list[nn.Linear], rest: list[Tensor]) -> None:
        super().__init__(linears)
        self.sizes, self.rest = [linear.out_features for linear in linears], rest

    def forward(self, hidden: Tensor) -> Tensor:
        first, *rest = super().forward(hidden).split(self.sizes, -1)
        self.rest[:] = rest
        return first


class _Other(nn.Module):
    """Returns the next part of what `_First` computed; `rest` is the same list."""

    def __init__(self, rest: list[Tensor]) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, _: Tensor) -> Tensor:
        return self.rest.pop(0)


class GatedMLP(nn.Module):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`; where that is SiLU, one kernel does it for a few rows."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_and_up, self.act_fn = Packed([mlp.gate_proj, mlp.up_proj]), mlp.act_fn
        self.down_proj = Packed([mlp.down_proj])
        some = _some_rows(mlp.gate_proj)
        self.has_kernel = self.gate_and_up.bias is None and torch.equal(self.act_fn(some), nn.functional.silu(some))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP to [..., H]."""
        first = self.gate_and_up
        if self.has_kernel and gates(hidden, first.weight):
            return self.down_proj(gated_linear(hidden, first.weight, *first.ahead))
        gate, up = first(hidden).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module of transformers computes just what `GatedMLP` does."""
    linears: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(linear) is not nn.Linear for linear in linears) or "forward" in vars(module):
        return False
    gate, up, down = linears
    if (gate.bias is None) != (up.bias is None) or gate.weight.shape != up.weight.shape:
        return False
    some = _some_rows(gate)
    try:
        return torch.equal(module(some), down(module.act_fn(gate(some)) * up(some)))
    except (AttributeError, TypeError):  # it has no such function, or needs more than its input
        return False


def _some_rows(linear: nn.Linear) -> Tensor:
    return torch.linspace(-2, 2, 2 * linear.in_features).view(2, -1).to(linear.weight)


@torch.no_grad()
def pack_projections(backbone: nn.Module) -> None:
    """Put projections of one input side by side, in place, for inference only.

    Needs room for one layer's copy.
    """
    for path in [path for path, _ in backbone.named_modules()]:  # names hold no weights
        try:
            module = backbone.get_submodule(path)
        except AttributeError:  # it was packed with what holds it
            continue
        if _is_gated_mlp(module):
            backbone.set_submodule(path, GatedMLP(module))
            continue
        for names in GROUPS:
            linears = [getattr(module, name, None) for name in names]
            plain = [linear for linear in linears if type(linear) is nn.Linear]
            if len(plain) < len(names) or len({linear.bias is None for linear in plain}) > 1:
                continue
            rest: list[Tensor] = []
            setattr(module, names[0], _First(plain, rest))
            for name in names[1:]:
                setattr(module, name, _Other(rest))
    packed = [module for module in backbone.modules() if isinstance(module, Packed)]
    for module, following in zip(packed, packed[1:] + packed[:1], strict=True):
        module.ahead = (following.weight,)
