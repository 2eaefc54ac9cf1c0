"""Model FLOPs of a training step, by arithmetic but for the heads, whose products are counted.

A matrix product of n parameters costs 2n FLOPs a token forward, 2n for the gradient of its input and 2n for that of its
weight (Kaplan et al., arXiv 2001.08361, table 1). Attention costs 4 L D c forward for c visible tokens of context,
half a document on average. Recomputed activations are not counted: this is model FLOPs utilisation as in PaLM (arXiv
2204.02311, appendix B).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medusa_ds.config.recipe import Recipe
from medusa_ds.heads.kinds import make_heads


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one token of a step.

    `backbone`: forward, without attention and LM head. `attention`: forward, of a token of visible context. `head_row`,
    `lm_row`: of a row of a head and of the LM head (0 in stage 1), forward and backward. `passes`: of the backbone, in
    forward equivalents: 1 in stage 1, 3 in stage 2, 4 with a frozen start.
    """

    backbone: float
    attention: float
    head_row: float
    lm_row: float
    passes: int

    def total(self, tokens: int, mean_context: float, head_rows: float, lm_rows: float) -> float:
        """FLOPs of a step with so many tokens, visible context (tokens), and rows over all heads and of the LM head."""
        backbone = self.passes * tokens * (self.backbone + self.attention * mean_context)
        return backbone + head_rows * self.head_row + lm_rows * self.lm_row


def active_parameters(base: nn.Module, config: Any) -> int:
    """Parameters of a base model that a token is multiplied by: no embeddings, and of experts those it is sent to.

    Weights of experts have three dimensions, the first of which is their number.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if type(number := getattr(config, name, None)) is int), 0)
    chosen = getattr(config, "num_experts_per_tok", None)
    chosen = chosen if type(chosen) is int else experts  # of some families one for each layer
    tables = {id(p) for module in base.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    shapes = [getattr(p, "ds_shape", p.shape) for p in base.parameters() if id(p) not in tables]  # empty under ZeRO-3
    routed = sum(math.prod(shape) for shape in shapes if len(shape) == 3 and shape[0] == experts)
    return sum(map(math.prod, shapes)) - routed * (experts - chosen) // max(experts, 1)


def step_flops(recipe: Recipe, config: Any, backbone_parameters: int) -> StepFlops:
    """FLOPs by part, with a backbone of so many `active_parameters`.

    `config` is its transformers config; with a hidden cache it computes nothing. The teacher's logits of a row are one
    more product with the target `distribution`, and with `argmax` for the LM head's rows, which stage 1 does not count.
    """
    stage, target, heads = recipe.stage, recipe.loss.target, recipe.heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = _block_flops(recipe, config)
    products = 2 + 2 * (heads.lm_head == "own") + 2 * (blocks > 0 or stage == 2)  # with weight's and input's gradients
    projection = products * config.hidden_size * heads.rows(config.vocab_size)
    lm_head = 2.0 * config.hidden_size * config.vocab_size
    frozen_start = recipe.has_frozen_start
    passes = (1 if stage == 1 else 3) + frozen_start
    return StepFlops(
        backbone=2.0 * backbone_parameters,
        attention=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        head_row=blocks + projection + (lm_head if target == "distribution" else 0.0),
        lm_row=(3 * lm_head if stage == 2 else 0.0) + (lm_head if frozen_start else 0.0),
        passes=passes if recipe.data.hidden_cache == "off" else 0,
    )


def _block_flops(recipe: Recipe, config: Any) -> float:
    """FLOPs of a head's row before its projection, forward and backward, on average over the heads.

    In stage 1 nobody needs the gradient of the frozen backbone's hidden states, nor ever that of embeddings.
    """
    spec, hidden_size = recipe.heads, config.hidden_size
    with torch.device("meta"), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        heads: Any = make_heads(spec.sized(config) | {"lm_head": "shared"})
        hidden_1H = torch.empty(1, hidden_size, requires_grad=recipe.stage == 2)
        states = heads.states(hidden_1H, torch.empty(spec.num, 1), lambda _: torch.empty(1, hidden_size))
        rows = [head.blocks(state_1H) for head, state_1H in zip(heads, states, strict=True)]
        if rows[0].requires_grad:
            torch.stack(rows).sum().backward()
    return counter.get_total_flops() / spec.num
