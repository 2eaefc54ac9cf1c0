"""What a kind of heads is: all that training, decoding, evaluation, runs, `estimate` and export ask of heads.

Head k = 1..num is item k-1 and guesses token t+k+1 from position t. Every kind is one recurrence,

    state_0  = the backbone's last hidden state at position t
    state_k  = advance(k, state_{k-1}, E(token t+k)),      E the backbone's own input embeddings
    logits_k = projection_k(blocks_k(state_k))

and a kind is a class that makes its heads (`make_head`) and, where they see the tokens before the one they guess
(`sees_tokens`), says how a state goes on (`advance`). In training these are the text's own tokens, while decoding those
of the tree's path; nobody learns E through them. Without `sees_tokens` every state is the hidden state.

ZeRO-3 keeps a weight whole only while the module that owns it directly is called. So weights are set in
`reset_parameters`, since under `deepspeed.zero.Init` they are partitioned as soon as a layer's constructor returns; a
projection computes losses in its own forward; and a shared projection is an argument and never a submodule, as ZeRO-3
would hang its hooks on it twice.

Shapes: N rows, H hidden size, V vocabulary, K heads.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medusa_ds.model.projection import PLAIN, Logits, VocabularyProjection

RowsLoss = Callable[[VocabularyProjection, Tensor], tuple[Tensor, Tensor]]
"""From a projection and rows [N, H] to the sum of their losses and the rows of the projection that come first [N]."""


class Head(nn.Module):
    """What reads a state: blocks from states [..., H] to rows [..., H], then a projection.

    That is its own, or where it has none the LM head that is handed to it with every call.
    """

    def __init__(self, blocks: nn.Module, projection: VocabularyProjection | None) -> None:
        super().__init__()
        self.blocks, self.projection = blocks, projection

    def forward(self, states_NH: Tensor, lm_head: Any, loss: RowsLoss) -> tuple[Tensor, Tensor]:
        """What `loss` makes of the rows that these states become."""
        rows_NH = self.blocks(states_NH)
        if torch.is_grad_enabled() and not rows_NH.requires_grad:
            rows_NH = rows_NH.detach().requires_grad_()  # ZeRO-3 frees weights when a module's input gets its gradient
        return loss(self._projection(lm_head), rows_NH)

    def logits(self, states: Tensor, lm_head: Any = None) -> Tensor:
        """Logits [..., V or the rows of its own projection] of states [..., H]."""
        return self._projection(lm_head)(self.blocks(states))

    def _projection(self, lm_head: Any) -> Any:
        projection = self.projection if self.projection is not None else lm_head
        assert projection is not None, "a head without a projection needs the backbone's LM head"
        return projection


class Heads(nn.ModuleList):
    """All heads of a model.

    Args:
        num: heads.
        layers: of each, as its kind counts them.
        hidden_size: H.
        vocab_size: V, the rows of the LM head's weight.
        own_projection: whether each head has a projection; False uses the LM head handed to it.
        dtype: of all parameters.
        token_map: LongTensor of the tokens that the rows of own projections stand for; None: all V.
        logits: how own projections give theirs: as the model's LM head.

    Attributes:
        kind: its name in recipes (`heads.kind`) and files.
        sees_tokens: whether head k depends on tokens t+1..t+k.
        num_rows: tokens among which a head guesses.
    """

    kind: ClassVar[str]
    sees_tokens: ClassVar[bool] = False

    def __init__(
        self,
        num: int,
        layers: int,
        hidden_size: int,
        vocab_size: int,
        *,
        own_projection: bool = True,
        dtype: torch.dtype | None = None,
        token_map: Tensor | None = None,
        logits: Logits = PLAIN,
    ) -> None:
        rows = vocab_size if token_map is None else len(token_map)

        def projection() -> VocabularyProjection | None:
            return VocabularyProjection(hidden_size, rows, dtype, logits=logits) if own_projection else None

        super().__init__(self.make_head(layers, hidden_size, projection(), dtype) for _ in range(num))
        self.vocab_size, self.num_rows = vocab_size, rows
        self.token_map: Tensor | None
        self.row_V: Tensor | None
        self.register_buffer("token_map", token_map)
        row_V = None
        if token_map is not None:  # -1 for tokens without a row
            row_V = torch.full((vocab_size,), -1, dtype=torch.long, device=token_map.device)
            row_V[token_map] = torch.arange(len(token_map), device=token_map.device)
        self.register_buffer("row_V", row_V, persistent=False)

    @staticmethod
    def make_head(
        layers: int, hidden_size: int, projection: VocabularyProjection | None, dtype: torch.dtype | None
    ) -> Head:
        """A head at its start, where it gives what its projection gives."""
        raise NotImplementedError

    @staticmethod
    def kept(layers: int) -> int:
        """Tensors of the hidden size that a head keeps of a row for its backward pass, at most."""
        raise NotImplementedError

    def advance(self, k: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States of head k from those of head k-1 and embedded tokens t+k, all [..., H]."""
        raise NotImplementedError

    def states(self, hidden_NH: Tensor, following_KN: Tensor, embed: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Every head's states [N, H] where the text is known: `following_KN[k - 1]` are tokens t+k."""
        if not self.sees_tokens:
            return [hidden_NH] * len(following_KN)
        states = [hidden_NH]
        for k, tokens_N in enumerate(following_KN, 1):
            with torch.no_grad():
                tokens_NH = embed(tokens_N)
            states.append(self.advance(k, states[-1], tokens_NH))
        return states[1:]

    def count_parameters(self) -> tuple[int, int]:
        """Parameters outside of projections and those of projections."""
        counts = [0, 0]
        for name, parameter in self.named_parameters():
            counts["projection" in name] += parameter.numel()
        return counts[0], counts[1]

    @property
    def known_V(self) -> Tensor | None:
        """Which tokens have a row, on the CPU; None: all."""
        return None if self.row_V is None else (self.row_V >= 0).cpu()

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the projections for token ids, -1 for tokens without one."""
        return token_ids if self.row_V is None else self.row_V[token_ids]

    def tokens(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the projections."""
        return rows if self.token_map is None else self.token_map[rows]

    @torch.no_grad()
    def initialize(self, lm_head_weight: Tensor, lm_head_bias: Tensor | None = None) -> None:
        """Copy the LM head's weight [V, H] and bias [V], or mapped rows, into own projections (gathered in ZeRO-3)."""
        rows = ... if self.token_map is None else self.token_map.to(lm_head_weight.device)
        for module in self.modules():
            if isinstance(module, VocabularyProjection):
                module.weight.copy_(lm_head_weight[rows])
                if lm_head_bias is not None:
                    module.bias.copy_(lm_head_bias[rows])
