"""Medusa heads (arXiv 2401.10774, section 2.1): each guesses from the hidden state alone.

    head(x) = projection(block_L(... block_1(x))),    block(x) = x + SiLU(W x + b)

W and b start at zero, so a new head gives exactly what its projection gives: with a copy of the LM head, the LM head's
own logits.
"""

import torch
from torch import Tensor, nn

from medusa_ds.heads.base import Head, Heads
from medusa_ds.model.projection import VocabularyProjection, ZeroLinear


class ResBlock(ZeroLinear):
    """`x + SiLU(Wx + b)`, the identity at the start."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None):
        super().__init__(hidden_size, hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block to [..., H]."""
        return hidden + nn.functional.silu(super().forward(hidden))


class MedusaHeads(Heads):
    """`layers` residual blocks each."""

    kind = "medusa"

    @staticmethod
    def make_head(
        layers: int, hidden_size: int, projection: VocabularyProjection | None, dtype: torch.dtype | None
    ) -> Head:
        """A head at its start, where it gives what its projection gives."""
        return Head(nn.Sequential(*(ResBlock(hidden_size, dtype) for _ in range(layers))), projection)

    @staticmethod
    def kept(layers: int) -> int:
        """Of a block its input, its product and what is added; the projection's rows and their gradient."""
        return 3 * layers + 2
