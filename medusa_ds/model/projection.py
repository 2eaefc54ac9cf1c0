"""The linear layer onto the vocabulary, and what is read from its weight in place of logits.

Under ZeRO-3 a weight is whole only while the module that owns it is called. So whatever needs the weight is handed to
`forward`, and the methods with names say what that is.

Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medusa_ds.model.loss import Impl, linear_argmax, linear_cross_entropy, linear_kl


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, cap: float | None = None) -> Tensor:
    """`F.linear`; on a CPU, in fp32 and without gradients, more than 3 rows by oneDNN, which then is the faster one."""
    if cap is not None:
        return cap * (project(hidden, weight, bias) / cap).tanh()
    few = hidden.numel() <= 3 * hidden.shape[-1]
    plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or hidden.dtype != torch.float32 or few
    if plain or hidden.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(hidden, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class Logits(NamedTuple):
    """How a model's logits come from its hidden states: `cap tanh(z / cap)`, `z = (factor hidden) @ weight.T + bias`.

    `bias`: whether its LM head has one. `cap`: None for plain `z`.
    """

    factor: float = 1.0
    cap: float | None = None
    bias: bool = False

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states times the factor."""
        return hidden if self.factor == 1 else hidden * self.factor

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [..., V] of hidden states [..., H]."""
        return project(self.scaled(hidden), weight, bias, self.cap)


PLAIN = Logits()


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also where ZeRO-3 partitions it at once."""

    def reset_parameters(self) -> None:
        """Set all weights to zero."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class VocabularyProjection(ZeroLinear):
    """A linear layer onto the vocabulary that can give its loss in place of its logits, which are as `logits` says."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        logits: Logits = PLAIN,
    ):
        super().__init__(hidden_size, vocab_size, bias=logits.bias, dtype=dtype, device=device)
        self.logits = logits

    def forward(self, hidden: Tensor, read: Callable[..., Any] = project) -> Any:
        """What `read` makes of scaled hidden states [..., H], weight [V, H], bias and cap: logits [..., V] by default.

        Both parameters are whole meanwhile.
        """
        return read(self.logits.scaled(hidden), self.weight, bias=self.bias, cap=self.logits.cap)

    def first_choice(self, rows_NH: Tensor, chunk_mib: int) -> Tensor:
        """Argmax of the logits [N], which are not kept."""
        return self(rows_NH, partial(linear_argmax, chunk_mib=chunk_mib))

    def cross_entropy(
        self, rows_NH: Tensor, targets_N: Tensor, impl: Impl, chunk_mib: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(loss_sum, predicted_N)`, see `loss.linear_cross_entropy`."""
        settings: dict[str, Any] = {"targets_N": targets_N, "impl": impl, "chunk_mib": chunk_mib, "scale": scale}
        return self(rows_NH, partial(linear_cross_entropy, **settings))

    def divergence(
        self,
        rows_NH: Tensor,
        teacher: "VocabularyProjection",
        teacher_NH: Tensor,
        temperature: float,
        chunk_mib: int,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(loss_sum, predicted_N)` of the divergence from what `teacher` predicts, see `loss.linear_kl`."""
        settings: dict[str, Any] = {"temperature": temperature, "chunk_mib": chunk_mib, "scale": scale}
        loss: Callable[..., Any] = partial(linear_kl, teacher_NH=teacher.logits.scaled(teacher_NH), **settings)
        if teacher is self:
            return self(
                rows_NH,
                lambda rows_NH, weight_VH, bias, cap: loss(
                    rows_NH, weight_VH, teacher_VH=weight_VH, bias=bias, teacher_bias=bias, cap=cap
                ),
            )
        # called inside the teacher's call, where all parameters are whole
        return teacher(
            rows_NH,
            lambda _, teacher_VH, bias, cap: self(rows_NH, partial(loss, teacher_VH=teacher_VH, teacher_bias=bias)),
        )
