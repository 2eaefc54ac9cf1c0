"""Hydra heads (arXiv 2402.05109): each also sees the tokens before the one that it guesses.

    state_k = state_{k-1} + SiLU(W_k [state_{k-1}; e_k] + b_k),    head_k = projection(blocks_k(state_k))
    e_k     = E(token t+k) / rms(E(token t+k))

The paper concatenates all embeddings; this is the recurrent form, as in ReDrafter (arXiv 2403.09919): one state of the
hidden size goes from head to head. Embeddings are brought to the size of hidden states, since Adam moves the weights of
both alike: SmolLM2's are a sixteenth of that size and would hardly be heard. The first of a head's `layers` is the
state's update W_k, the others are residual blocks of Medusa's between the state and the projection, which later heads
do not see. All start as the identity.
"""

from typing import Any

import torch
from torch import Tensor, nn

from medusa_ds.heads.base import Head
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.projection import VocabularyProjection, ZeroLinear

EPSILON = 1e-6


class Step(ZeroLinear):
    """`s + SiLU(W [s; e] + b)`, the state s unchanged at the start."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None):
        super().__init__(2 * hidden_size, hidden_size, dtype=dtype)

    def forward(self, pairs: Tensor) -> Tensor:
        """From states and tokens side by side [..., 2H] to the next states [..., H]."""
        return pairs[..., : self.out_features] + nn.functional.silu(super().forward(pairs))


class HydraHeads(MedusaHeads):
    """A state's update and `layers - 1` residual blocks each."""

    kind, sees_tokens = "hydra", True

    @staticmethod
    def make_head(
        layers: int, hidden_size: int, projection: VocabularyProjection | None, dtype: torch.dtype | None
    ) -> Head:
        """A head at its start, where it gives what its projection gives."""
        step = Step(hidden_size, dtype)
        head = MedusaHeads.make_head(layers - 1, hidden_size, projection, dtype)
        head.step = step
        return head

    @staticmethod
    def kept(layers: int) -> int:
        """As Medusa's, and a step's pair of state and token is two in place of the hidden states that all share."""
        return MedusaHeads.kept(layers) + 2

    def advance(self, k: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States of head k from those of head k-1 and embedded tokens t+k, all [..., H]."""
        head: Any = self[k - 1]
        unit = nn.functional.rms_norm(tokens, tokens.shape[-1:], eps=EPSILON)
        return head.step(torch.cat([states, unit], -1))
