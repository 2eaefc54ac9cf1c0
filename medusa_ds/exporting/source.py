"""What is exported: heads with all that the files of the engines are made of, a target a file beside this one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medusa_ds.config.parsing import parse_yaml
from medusa_ds.exporting.layouts import expand_rows
from medusa_ds.model.backbone import lm_head_weight


@dataclass
class Source:
    """What is exported.

    Attributes:
        heads: state dict of the heads, in the dtype of the export.
        meta: as `save_heads` takes it.
        model: the base model with the run's tuned weights; None where nothing but the heads is needed.
        tokenizer: of the base model; None when the run has kept none.
        tree: the run's measured tree, if it has one.
        figures: what was measured of these heads, by name.
        measured_on: on what.
    """

    heads: dict[str, Tensor]
    meta: dict[str, Any]
    model: Any
    tokenizer: Any
    tree: list[Any] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, or of imported heads the few keys that are known."""
        raw, _ = parse_yaml(self.meta["recipe"], "heads.json: recipe")
        return raw

    @property
    def tuned(self) -> bool:
        """Whether the backbone is the run's own."""
        return bool(self.recipe["stage"] == 2)

    @property
    def shared(self) -> bool:
        """Whether the heads end in the base model's LM head."""
        return bool(self.meta["lm_head"] == "shared")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(tensor.dtype for tensor in self.heads.values() if tensor.is_floating_point())

    def beyond(self, *kinds: str, bias: bool = False) -> str | None:
        """What of the heads a program does not run that runs these kinds, and a bias of projections or none."""
        if self.meta["kind"] not in kinds:
            return f"found heads.kind {self.meta['kind']}, which it does not run"
        biased = any(name.endswith("projection.bias") for name in self.heads)
        biased |= self.shared and self.model is not None and self.model.get_output_embeddings().bias is not None
        if biased and not bias:
            return "found heads whose projections have a bias, as the model's LM head has, which it does not run"
        return None

    def projections(self) -> list[Tensor]:
        """Every head's projection onto all tokens; of heads that share the LM head, that one each time."""
        if self.shared:
            return [lm_head_weight(self.model).detach()] * self.meta["num"]
        own = [self.heads[f"{head}.projection.weight"] for head in range(self.meta["num"])]
        tokens = self.heads.get("token_map")
        return own if tokens is None else [expand_rows(weight, tokens, self.meta["vocab_size"]) for weight in own]
