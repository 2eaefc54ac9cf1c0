"""Linear cross-entropy over rows: logits are made, used and dropped in chunks, and never exist as a whole.

    logits_NV = rows_NH @ weight_VH.T
    loss_sum  = sum_n (logsumexp(logits_n) - logits_n[targets_n])
    d loss_sum / d logits_NV = softmax(logits_NV) - onehot(targets_N)

    KL_sum = T^2 sum_n sum_v p_nv (log p_nv - log q_nv),  p = softmax(teacher logits / T), q = softmax(logits / T)
    d KL_sum / d logits_NV = T (q_NV - p_NV)

Both chunked implementations compute the gradients in the forward pass, while a chunk's logits are there, and only
scale them in the backward pass. The weight's gradient is accumulated in fp32: adding chunks in bf16 loses the small
ones. `liger` is Liger's Triton kernel, `torch` the same algorithm in plain PyTorch, `eager` the textbook form with fp32
logits.

Shapes: N rows, H hidden size, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medusa_ds.errors import UserError

Impl = Literal["liger", "torch", "eager"]


def resolve_impl(impl: str, device: torch.device | str) -> Impl:
    """`loss.impl` for a device: `auto` is `liger` on a GPU and `torch` on a CPU.

    Raises:
        UserError: `liger` without a GPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if impl == "liger" and not on_gpu:
        raise UserError("loss.impl: found liger, whose kernels need a GPU; use auto, torch or eager")
    return ("liger" if on_gpu else "torch") if impl == "auto" else impl  # type: ignore[return-value]


def linear_cross_entropy(
    rows_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, impl: Impl = "torch", chunk_mib: int = 1024
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a linear layer, and its predictions.

    With no rows the loss is 0 and still connected to both inputs, so that every rank runs the same backward pass.

    Args:
        rows_NH: hidden states.
        weight_VH: vocabulary projection, of the same dtype.
        targets_N: token ids in [0, V).
        impl: see the module's docstring. `liger` needs a GPU.
        chunk_mib: memory that one chunk of logits may take, MiB; a chunk has at least one row.

    Returns:
        `loss_sum`, a scalar (float64 for float64 inputs, otherwise float32; always float32 with Liger), and
        `predicted_N`, the argmax of the logits.
    """
    num_rows, (vocab, hidden) = rows_NH.shape[0], weight_VH.shape
    accumulate = torch.float64 if rows_NH.dtype == torch.float64 else torch.float32
    if impl == "eager":
        logits_NV = (rows_NH @ weight_VH.T).to(accumulate)
        return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum"), logits_NV.detach().argmax(-1)
    if impl == "liger":
        chunk_rows = max(1, (chunk_mib << 20) // (vocab * rows_NH.element_size()))
        multiplier = liger_chunk_multiplier(num_rows, vocab, hidden, chunk_rows)
        if multiplier is not None:
            return _liger_linear_cross_entropy(rows_NH, weight_VH, targets_N, multiplier)
    chunk_rows = max(1, (chunk_mib << 20) // (vocab * accumulate.itemsize))
    return _ChunkedLinearCrossEntropy.apply(rows_NH, weight_VH, targets_N, chunk_rows, torch.is_grad_enabled())


def linear_kl(
    rows_NH: Tensor,
    weight_VH: Tensor,
    teacher_NH: Tensor,
    teacher_VH: Tensor,
    temperature: float = 1.0,
    chunk_mib: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Summed forward Kullback-Leibler divergence of a linear layer from another one, and its predictions.

    In PyTorch chunks on every device, compiled on a GPU, where Liger's fused JSD takes longer. The factor T^2 keeps the
    gradients' size when T changes (arXiv 1503.02531, section 2). With no rows the loss is 0 and connected to its
    inputs, as in `linear_cross_entropy`.

    Args:
        rows_NH: hidden states.
        weight_VH: vocabulary projection, of the same dtype.
        teacher_NH: hidden states of the teacher, which gets no gradient.
        teacher_VH: vocabulary projection of the teacher; may be `weight_VH`.
        temperature: T, divides both logits.
        chunk_mib: memory that one chunk of both logits may take, MiB; a chunk has at least one row.

    Returns:
        `loss_sum`, in nats (float64 for float64 inputs, otherwise float32), and `predicted_N`, the argmax of the
        logits.
    """
    itemsize = rows_NH.element_size() if rows_NH.is_cuda else max(4, rows_NH.element_size())
    chunk_rows = max(1, (chunk_mib << 20) // (2 * weight_VH.shape[0] * itemsize))
    return _ChunkedLinearKL.apply(
        rows_NH, weight_VH, teacher_NH.detach(), teacher_VH.detach(), temperature, chunk_rows, torch.is_grad_enabled()
    )


def linear_argmax(rows_NH: Tensor, weight_VH: Tensor, chunk_mib: int = 1024) -> Tensor:
    """Argmax [N] of a linear layer's logits, which are made in chunks."""
    chunk_rows = max(1, (chunk_mib << 20) // (weight_VH.shape[0] * rows_NH.element_size()))
    with torch.no_grad():
        chunks = [(part_CH @ weight_VH.T).argmax(-1) for part_CH in rows_NH.split(chunk_rows)]
    return torch.cat(chunks)


def liger_chunk_multiplier(num_rows: int, vocab: int, hidden: int, chunk_rows: int) -> int | None:
    """Liger's `chunk_mem_const` for the largest chunk that keeps to `chunk_rows` rows.

    Liger takes chunks of `min(N, next_power_of_2(ceil(N / ceil(V / (chunk_mem_const * H)))))` rows, so that they are
    powers of two unless one chunk holds everything.

    Returns:
        The multiplier, or None where Liger cannot do it: no rows, or a budget below what 1 gives (plain PyTorch then).
    """
    largest_chunk = num_rows if num_rows <= chunk_rows else 1 << (chunk_rows.bit_length() - 1)
    if largest_chunk == 0:
        return None
    num_chunks = -(-num_rows // largest_chunk)
    if num_chunks == 1:
        return -(-vocab // hidden)
    # the greatest m with ceil(V / (m * H)) >= num_chunks
    return (vocab - 1) // ((num_chunks - 1) * hidden) or None


def _liger_linear_cross_entropy(
    rows_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, multiplier: int
) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # needs Triton: not on a CPU

    if weight_VH.requires_grad and torch.is_grad_enabled() and not rows_NH.requires_grad:
        rows_NH = rows_NH.detach().requires_grad_()  # Liger gives no gradient to a weight whose input needs none
    output = liger_fused_linear_cross_entropy(
        rows_NH,
        weight_VH,
        targets_N,
        reduction="sum",
        accum_dtype=torch.float32,
        return_predicted_tokens=True,
        chunk_mem_const=multiplier,
    )
    return output.loss, output.predicted_tokens


class _Gradients:
    """Gradients of a linear layer's inputs, added up over chunks of its rows while their logits are there."""

    def __init__(self, ctx: Any, rows_NH: Tensor, weight_VH: Tensor, grad_enabled: bool) -> None:
        # needs_input_grad says nothing of no_grad, under which the gradients would be computed for nothing
        rows_need, weight_needs = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        self.rows_NH, self.weight_VH = rows_NH, weight_VH
        self.accumulate = torch.float64 if rows_NH.dtype == torch.float64 else torch.float32
        self.grad_rows_NH = torch.empty_like(rows_NH) if rows_need else None
        self.grad_weight_VH = torch.zeros_like(weight_VH, dtype=self.accumulate) if weight_needs else None
        self.wanted = rows_need or weight_needs

    def add(self, chunk: slice, grad_logits_CV: Tensor) -> None:
        rounded_CV = grad_logits_CV.to(self.weight_VH.dtype)
        if self.grad_rows_NH is not None:
            self.grad_rows_NH[chunk] = rounded_CV @ self.weight_VH
        total_VH, rows_CH = self.grad_weight_VH, self.rows_NH[chunk]
        if total_VH is not None and total_VH.is_cuda and total_VH.dtype != rows_CH.dtype:
            torch.addmm(total_VH, rounded_CV.T, rows_CH, out_dtype=self.accumulate, out=total_VH)
        elif total_VH is not None:
            total_VH.addmm_(grad_logits_CV.T.to(self.accumulate), rows_CH.to(self.accumulate))

    def save(self, ctx: Any) -> None:
        weight = None if self.grad_weight_VH is None else self.grad_weight_VH.to(self.weight_VH.dtype)
        ctx.save_for_backward(self.grad_rows_NH, weight)


class _Chunked(torch.autograd.Function):
    """Rows and weight come first, and their gradients are saved by the forward pass."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return (*scaled, *[None] * (len(ctx.needs_input_grad) - 2))


class _ChunkedLinearCrossEntropy(_Chunked):
    @staticmethod
    def forward(
        ctx: Any, rows_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk_rows: int, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(ctx, rows_NH, weight_VH, grad_enabled)
        loss_sum = rows_NH.new_zeros((), dtype=gradients.accumulate)
        predicted_N = torch.empty_like(targets_N)
        for start in range(0, rows_NH.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            targets_C1 = targets_N[chunk, None]
            logits_CV = (rows_NH[chunk] @ weight_VH.T).to(gradients.accumulate)
            greatest_C1, argmax_C1 = logits_CV.max(dim=-1, keepdim=True)
            predicted_N[chunk] = argmax_C1[:, 0]
            target_logits_C1 = logits_CV.gather(1, targets_C1)
            exp_CV = logits_CV.sub_(greatest_C1).exp_()
            total_C1 = exp_CV.sum(dim=-1, keepdim=True)
            loss_sum += (greatest_C1 + total_C1.log() - target_logits_C1).sum()
            if gradients.wanted:
                grad_logits_CV = exp_CV.div_(total_C1)
                grad_logits_CV.scatter_add_(1, targets_C1, torch.full_like(total_C1, -1.0))
                gradients.add(chunk, grad_logits_CV)
        gradients.save(ctx)
        ctx.mark_non_differentiable(predicted_N)
        return loss_sum, predicted_N


class _ChunkedLinearKL(_Chunked):
    @staticmethod
    def forward(
        ctx: Any, rows_NH: Tensor, weight_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, temperature: float,
        chunk_rows: int, grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        gradients = _Gradients(ctx, rows_NH, weight_VH, grad_enabled)
        accumulate = gradients.accumulate
        loss_sum = rows_NH.new_zeros((), dtype=accumulate)
        predicted_N = torch.empty(rows_NH.shape[0], dtype=torch.long, device=rows_NH.device)
        parts = _compiled_kl_parts if rows_NH.is_cuda else _kl_parts
        for start in range(0, rows_NH.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits_CV, teacher_CV = rows_NH[chunk] @ weight_VH.T, teacher_NH[chunk] @ teacher_VH.T
            loss, grad_logits_CV, predicted_N[chunk] = parts(logits_CV, teacher_CV, temperature, accumulate)
            loss_sum += loss
            if gradients.wanted:
                gradients.add(chunk, grad_logits_CV)
        gradients.save(ctx)
        ctx.mark_non_differentiable(predicted_N)
        return loss_sum, predicted_N


def _kl_parts(
    logits_CV: Tensor, teacher_CV: Tensor, temperature: float, accumulate: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the logits in their dtype, and argmax of a chunk."""
    log_q_CV = (logits_CV.to(accumulate) / temperature).log_softmax(-1)
    log_p_CV = (teacher_CV.to(accumulate) / temperature).log_softmax(-1)
    p_CV = log_p_CV.exp()
    loss = temperature**2 * (p_CV * (log_p_CV - log_q_CV)).sum()
    return loss, (temperature * (log_q_CV.exp() - p_CV)).to(logits_CV.dtype), logits_CV.argmax(-1)


_compiled_kl_parts = torch.compile(_kl_parts, dynamic=True)  # made when first called: a few passes instead of a dozen
