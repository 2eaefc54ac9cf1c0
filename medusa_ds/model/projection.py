"""The linear layer onto the vocabulary, which computes losses in its own forward; `model/heads.py` says why.

Shapes: N rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from medusa_ds.model.loss import Impl, linear_argmax, linear_cross_entropy, linear_kl


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; on a CPU, in fp32 and without gradients, by oneDNN, which PyTorch leaves to a slower BLAS."""
    plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or hidden.dtype != torch.float32
    if plain or hidden.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(hidden, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also where ZeRO-3 partitions it at once."""

    def reset_parameters(self) -> None:
        """Set all weights to zero."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class VocabularyProjection(ZeroLinear):
    """A linear layer onto the vocabulary, without bias, that can give its loss in place of its logits."""

    def __init__(self, hidden_size: int, vocab_size: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__(hidden_size, vocab_size, bias=False, dtype=dtype, device=device)

    def forward(
        self,
        hidden: Tensor,
        targets_N: Tensor | None = None,
        impl: Impl = "torch",
        chunk_mib: int = 1024,
        *,
        argmax: bool = False,
        teacher_NH: Tensor | None = None,
        teacher_VH: Tensor | None = None,
        temperature: float = 1.0,
        student: nn.Module | None = None,
        scale: Tensor | None = None,
    ) -> Any:
        """Logits [..., V] of hidden states [..., H], or what a loss needs of rows [N, H], without keeping logits.

        With `argmax`, the first choice [N]. With targets, `(loss_sum, predicted_N)` of the cross-entropy. With
        `teacher_NH`, the same of the divergence from the teacher, whose weight is `teacher_VH` or this one; with
        `student`, this is the teacher, and its weight is handed on to that projection. `scale` is the losses'.
        """
        if argmax:
            return linear_argmax(hidden, self.weight, chunk_mib)
        if student is not None:
            teacher = {"teacher_NH": teacher_NH, "teacher_VH": self.weight, "temperature": temperature, "scale": scale}
            return student(hidden, chunk_mib=chunk_mib, **teacher)
        if teacher_NH is not None:
            teacher_VH = self.weight if teacher_VH is None else teacher_VH
            return linear_kl(hidden, self.weight, teacher_NH, teacher_VH, temperature, chunk_mib, scale)
        if targets_N is not None:
            return linear_cross_entropy(hidden, self.weight, targets_N, impl, chunk_mib, scale)
        return project(hidden, self.weight)
