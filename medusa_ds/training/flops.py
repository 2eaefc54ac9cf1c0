"""Model FLOPs of a training step and the peaks of known GPUs: pure arithmetic.

A matrix product of n parameters costs 2n FLOPs a token forward, 2n for the gradient of its input and 2n for that of its
weight (Kaplan et al., arXiv 2001.08361, table 1). Attention costs 4 L D c forward for c visible tokens of context,
half a document on average. Recomputed activations are not counted: this is model FLOPs utilisation as in PaLM (arXiv
2204.02311, appendix B).
"""

from dataclasses import dataclass
from typing import Any

PEAK_BF16_TFLOPS = {
    # dense bf16, vendors' data sheets; longest name first where one contains another
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A6000": 154.8,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, TFLOP/s; None for a CPU or an unknown GPU."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one token of a step.

    Args:
        backbone: forward FLOPs a token without attention and LM head.
        attention: forward FLOPs a token and token of visible context.
        head_row: FLOPs of a head's row, forward and backward.
        lm_row: FLOPs of an LM head's row, forward and backward; 0 in stage 1.
        passes: backbone passes in forward equivalents: 1 in stage 1, 3 in stage 2, 4 with a frozen start.
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


def step_flops(
    config: Any,
    backbone_parameters: int,
    *,
    blocks: int,
    own_projection: bool,
    stage: int,
    rows: int | None = None,
    target: str = "label",
) -> StepFlops:
    """FLOPs by part.

    Args:
        config: the backbone's transformers config.
        backbone_parameters: parameters of its matrix products, without embeddings and LM head.
        blocks: parameters of a head's matrix products before its projection.
        own_projection: whether heads have vocabulary projections that learn.
        stage: 1 or 2.
        rows: of a head's projection; None: as many as the vocabulary has tokens.
        target: of the loss; the teacher's logits of a row are one more product with `distribution`, and with `argmax`
            for the LM head's rows, which stage 1 does not count.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    projection = hidden * vocabulary
    needs_input_gradient = blocks > 0 or stage == 2
    head = 6 * blocks
    if stage == 1 and blocks:
        head -= 2 * hidden * hidden  # nobody needs the gradient of the frozen backbone's hidden states or embeddings
    projections = (
        (2 + (2 if own_projection else 0) + (2 if needs_input_gradient else 0)) * hidden * (rows or vocabulary)
    )
    teacher = 2.0 * projection
    frozen_start = stage == 2 and target != "label"
    return StepFlops(
        backbone=2.0 * backbone_parameters,
        attention=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        head_row=head + projections + (teacher if target == "distribution" else 0.0),
        lm_row=(6.0 * projection if stage == 2 else 0.0) + (teacher if frozen_start else 0.0),
        passes=(1 if stage == 1 else 3) + frozen_start,
    )
