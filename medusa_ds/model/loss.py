"""Linear cross-entropy over rows: logits are made, used and dropped in chunks, and never exist as a whole.

    logits_NV = cap tanh((rows_NH @ weight_VH.T + bias_V) / cap)            without a cap what stands in the tanh
    loss_sum  = sum_n (logsumexp(logits_n) - logits_n[targets_n])
    d loss_sum / d logits_NV = softmax(logits_NV) - onehot(targets_N), with a cap times 1 - (logits_NV / cap)^2 below it

    KL_sum = T^2 sum_n sum_v p_nv (log p_nv - log q_nv),  p = softmax(teacher logits / T), q = softmax(logits / T)
    d KL_sum / d logits_NV = T (q_NV - p_NV)

Both chunked implementations compute the gradients in the forward pass, while a chunk's logits are there, and only
scale them in the backward pass. The weight's gradient is accumulated in fp32: adding chunks in bf16 loses the small
ones (a single chunk has nothing to add). `liger` is Liger's Triton kernel, `torch` the same algorithm in plain PyTorch,
`eager` the textbook form with fp32 logits.

Shapes: N rows, H hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
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
    rows_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    impl: Impl = "torch",
    chunk_mib: int = 1024,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a linear layer, and its predictions.

    With no rows the loss is 0 and still connected to both inputs, so that every rank runs the same backward pass.

    Args:
        rows_NH: hidden states.
        weight_VH: vocabulary projection, of the same dtype.
        targets_N: token ids in [0, V).
        impl: see the module's docstring. `liger` needs a GPU.
        chunk_mib: memory that one chunk of logits may take, MiB; a chunk has at least one row. Liger's may be larger
            where that takes less memory in all.
        scale: scalar that the gradients are multiplied by, while they are made, in place of the gradient of the loss
            that the backward pass begins with, which must be 1. None: that gradient, in a pass of its own.
        bias: of the vocabulary [V], of the same dtype.
        cap: which the logits approach, on both sides of zero.

    Returns:
        `loss_sum`, a scalar (float64 for float64 inputs, otherwise float32; always float32 with Liger), and
        `predicted_N`, the argmax of the logits.
    """
    num_rows, vocab = rows_NH.shape[0], weight_VH.shape[0]
    accumulate = _sum_dtype(rows_NH)
    if impl == "eager":
        logits_NV = _capped(_product(rows_NH, weight_VH, bias).to(accumulate), cap)
        loss_sum = nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        if scale is not None and loss_sum.requires_grad:
            loss_sum.register_hook(functools.partial(_times, scale=scale))
        return loss_sum, logits_NV.detach().argmax(-1)
    kernel, learns = impl == "liger", weight_VH.requires_grad and torch.is_grad_enabled()
    row_bytes = vocab * (rows_NH.dtype if kernel else accumulate).itemsize
    chunk_rows = max(1, (chunk_mib << 20) // row_bytes)
    # a single chunk needs no fp32 sum of gradients: where it is no larger than a usual one and half that sum, it takes
    # less memory than chunks do
    if kernel and learns and num_rows * row_bytes <= (chunk_mib << 20) + 2 * weight_VH.numel():
        chunk_rows = max(1, num_rows)
    parts = _liger_cross_entropy if kernel else _cross_entropy

    def part(chunk: slice, logits_CV: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
        loss_C, predicted_C = rows_NH.new_empty(len(logits_CV), dtype=accumulate), torch.empty_like(targets_N[chunk])
        return loss_C, predicted_C, parts(logits_CV, targets_N[chunk], loss_C, predicted_C, gradients, cap)

    single = kernel and 0 < num_rows <= chunk_rows
    return _Chunked.apply(rows_NH, weight_VH, bias, part, chunk_rows, single, scale, torch.is_grad_enabled())


def linear_kl(
    rows_NH: Tensor,
    weight_VH: Tensor,
    teacher_NH: Tensor,
    teacher_VH: Tensor,
    temperature: float = 1.0,
    chunk_mib: int = 1024,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed forward Kullback-Leibler divergence, in nats, of a linear layer from a teacher's, and its predictions.

    In PyTorch chunks on every device, compiled on a GPU, where Liger's fused JSD takes longer. The factor T^2 keeps the
    gradients' size when the temperature T, which divides both logits, changes (arXiv 1503.02531, section 2). The
    teacher gets no gradient, and its weight may be `weight_VH`. The cap is that of both logits, and both of a chunk
    take `chunk_mib`. All else is as in `linear_cross_entropy`.
    """
    itemsize = rows_NH.element_size() if rows_NH.is_cuda else max(4, rows_NH.element_size())
    chunk_rows = max(1, (chunk_mib << 20) // (2 * weight_VH.shape[0] * itemsize))
    parts, accumulate = _compiled_kl_parts() if rows_NH.is_cuda else _kl_parts, _sum_dtype(rows_NH)

    def part(chunk: slice, logits_CV: Tensor, _: bool) -> tuple[Tensor, Tensor, Tensor]:
        teacher_CV = _product(teacher_NH[chunk], teacher_VH, teacher_bias)
        return parts(logits_CV, teacher_CV, temperature, accumulate, cap)

    return _Chunked.apply(rows_NH, weight_VH, bias, part, chunk_rows, False, scale, torch.is_grad_enabled())


def linear_argmax(
    rows_NH: Tensor, weight_VH: Tensor, chunk_mib: int = 1024, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Argmax [N] of a linear layer's logits, which are made in chunks; a cap changes no order."""
    chunk_rows = max(1, (chunk_mib << 20) // (weight_VH.shape[0] * rows_NH.element_size()))
    with torch.no_grad():
        chunks = [_product(part_CH, weight_VH, bias).argmax(-1) for part_CH in rows_NH.split(chunk_rows)]
    return torch.cat(chunks)


def _sum_dtype(rows_NH: Tensor) -> torch.dtype:
    return torch.float64 if rows_NH.dtype == torch.float64 else torch.float32


def _product(rows_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    return rows_NH @ weight_VH.T if bias_V is None else torch.addmm(bias_V, rows_NH, weight_VH.T)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()


def _cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, loss_C: Tensor, predicted_C: Tensor, gradients: bool, cap: float | None
) -> Tensor:
    """Fill in losses and predictions; returns the gradient of the product, where it is wanted."""
    targets_C1, logits_CV = targets_C[:, None], _capped(logits_CV.to(loss_C.dtype), cap)
    slope_CV = None if cap is None or not gradients else 1 - (logits_CV / cap) ** 2
    greatest_C1, argmax_C1 = logits_CV.max(dim=-1, keepdim=True)
    predicted_C.copy_(argmax_C1[:, 0])
    target_logits_C1 = logits_CV.gather(1, targets_C1)
    exp_CV = logits_CV.sub_(greatest_C1).exp_()
    total_C1 = exp_CV.sum(dim=-1, keepdim=True)
    loss_C.copy_((greatest_C1 + total_C1.log() - target_logits_C1)[:, 0])
    if gradients:
        exp_CV.div_(total_C1).scatter_add_(1, targets_C1, torch.full_like(total_C1, -1.0))
    if slope_CV is not None:
        exp_CV.mul_(slope_CV)
    return exp_CV


def _liger_cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, loss_C: Tensor, predicted_C: Tensor, gradients: bool, cap: float | None
) -> Tensor:
    """The same by Liger's kernel, which puts the gradient in place of the logits.

    The kernel itself, since the functions around it make the host wait for the GPU (three times a loss).
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel  # needs Triton: not on a CPU

    (num_rows, vocab), block = logits_CV.shape, 1 << (logits_CV.shape[1] - 1).bit_length()
    liger_cross_entropy_kernel[(num_rows,)](
        X_ptr=logits_CV,
        X_stride=logits_CV.stride(0),
        Y_ptr=targets_C,
        Y_stride=targets_C.stride(0),
        weight_ptr=None,
        loss_ptr=loss_C,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=predicted_C,
        predicted_tokens_stride=1,
        n_cols=vocab,
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=cap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=True,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=cap is not None,
        HAS_GRADIENTS=gradients,
        BLOCK_SIZE=min(2**15, block),
        num_warps=32,
    )
    return logits_CV


class _Gradients:
    """Gradients of a linear layer's inputs, added up over chunks of its rows while their logits are there.

    The weight's is a sum in fp32, or in the weight's own dtype where a single product of that dtype makes it.
    """

    def __init__(
        self, ctx: Any, rows_NH: Tensor, weight_VH: Tensor, scale: Tensor | None, grad_enabled: bool, single: bool
    ) -> None:
        # needs_input_grad says nothing of no_grad, under which the gradients would be computed for nothing
        rows_need, weight_needs, bias_needs = (grad_enabled and needs for needs in ctx.needs_input_grad[:3])
        self.rows_NH, self.weight_VH, self.scale, self.keep = rows_NH, weight_VH, scale, 0 if single else 1
        self.accumulate = _sum_dtype(rows_NH)
        self.grad_rows_NH = torch.empty_like(rows_NH) if rows_need else None
        self.grad_weight_VH: Tensor | None = None
        if weight_needs:
            self.grad_weight_VH = (
                torch.empty_like(weight_VH) if single else torch.zeros_like(weight_VH, dtype=self.accumulate)
            )
        self.grad_bias_V = weight_VH.new_zeros(len(weight_VH), dtype=self.accumulate) if bias_needs else None
        self.wanted = rows_need or weight_needs or bias_needs

    def add(self, chunk: slice, grad_logits_CV: Tensor) -> None:
        rounded_CV = grad_logits_CV.to(self.weight_VH.dtype)
        rows_CH, total_VH = self.rows_NH[chunk], self.grad_weight_VH
        if self.grad_rows_NH is not None:
            self.grad_rows_NH[chunk] = _times(rounded_CV @ self.weight_VH, self.scale)
        if total_VH is not None and total_VH.is_cuda and total_VH.dtype != rows_CH.dtype:
            rows_CH = _times(rows_CH, self.scale)  # products of bf16, added up in fp32 as they are made
            torch.addmm(total_VH, rounded_CV.T, rows_CH, out_dtype=total_VH.dtype, out=total_VH)
        elif total_VH is not None:
            rows_CH = _times(rows_CH.to(total_VH.dtype), self.scale)
            total_VH.addmm_(grad_logits_CV.T.to(total_VH.dtype), rows_CH, beta=self.keep)
        if self.grad_bias_V is not None:
            self.grad_bias_V += _times(grad_logits_CV.sum(0, dtype=self.accumulate), self.scale)

    def save(self, ctx: Any) -> None:
        totals = (self.grad_weight_VH, self.grad_bias_V)
        rounded = (None if total is None else total.to(self.weight_VH.dtype) for total in totals)
        ctx.save_for_backward(self.grad_rows_NH, *rounded)
        ctx.is_scaled = self.scale is not None


def _times(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Their product in the tensor's dtype; a factor on the GPU would be rounded to that dtype first."""
    if scale is None:
        return tensor
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale).to(tensor.dtype)


class _Chunked(torch.autograd.Function):
    """The sum of losses, and predictions, of rows whose logits are made in chunks.

    `part` makes of a chunk's logits its losses, each row's or their sum, its predictions, and the gradient of the
    product where that is wanted. Gradients of rows, weight and bias are saved by the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        part: Callable[[slice, Tensor, bool], tuple[Tensor, Tensor, Tensor]],
        chunk_rows: int,
        single: bool,
        scale: Tensor | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(ctx, rows_NH, weight_VH, scale, grad_enabled, single)
        losses, predicted = [], [torch.empty(0, dtype=torch.long, device=rows_NH.device)]
        for start in range(0, len(rows_NH), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits_CV = _product(rows_NH[chunk], weight_VH, bias_V)
            loss, predicted_C, logits_CV = part(chunk, logits_CV, gradients.wanted)
            losses.append(loss)
            predicted.append(predicted_C)
            if gradients.wanted:
                gradients.add(chunk, logits_CV)
            del logits_CV  # before the next chunk is there
        gradients.save(ctx)
        predicted_N, zero = torch.cat(predicted), rows_NH.new_zeros((), dtype=gradients.accumulate)
        ctx.mark_non_differentiable(predicted_N)
        return torch.cat(losses).sum() if losses and losses[0].dim() else sum(losses, zero), predicted_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = None if ctx.is_scaled else grad_loss
        assert factor is not None or grad_loss.is_cuda or grad_loss == 1, "the gradient of a scaled loss is 1"
        scaled = (None if grad is None else _times(grad, factor) for grad in ctx.saved_tensors)
        return (*scaled, *[None] * (len(ctx.needs_input_grad) - 3))


def _kl_parts(
    logits_CV: Tensor, teacher_CV: Tensor, temperature: float, accumulate: torch.dtype, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, argmax, and gradient of the product in its dtype, of a chunk."""
    capped_CV = _capped(logits_CV.to(accumulate), cap)
    log_q_CV = (capped_CV / temperature).log_softmax(-1)
    log_p_CV = (_capped(teacher_CV.to(accumulate), cap) / temperature).log_softmax(-1)
    p_CV = log_p_CV.exp()
    loss = temperature**2 * (p_CV * (log_p_CV - log_q_CV)).sum()
    grad_CV = temperature * (log_q_CV.exp() - p_CV)
    if cap is not None:
        grad_CV = grad_CV * (1 - (capped_CV / cap) ** 2)
    return loss, logits_CV.argmax(-1), grad_CV.to(logits_CV.dtype)


@functools.cache
def _compiled_kl_parts() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A few passes instead of a dozen; made when first asked for, since PyTorch's compiler takes a second to import."""
    return torch.compile(_kl_parts, dynamic=True)
