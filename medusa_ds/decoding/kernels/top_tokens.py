"""The largest logits' tokens in two Triton launches; needs a GPU.

`torch.topk` over a vocabulary of a few rows is a chain of passes that takes as long as two layers of a small model.
Here blocks keep the best of their part of a row, and one block the best of these. A logit and its token make one
integer, ordered first by the logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 1024  # logits of a block


def top_tokens(logits: Tensor, number: int) -> Tensor:
    """Tokens [..., number] of the largest of logits [..., V], best first; of equal ones the lowest first."""
    rows, vocab = logits.numel() // logits.shape[-1], logits.shape[-1]
    keep = _power_of_2(max(number, 2))  # compiled for a GPU, Triton's `topk` cannot keep one
    parts = -(-vocab // PART)
    some = torch.empty(rows, parts * keep, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, keep, dtype=torch.int64, device=logits.device)
    _keep_best[(rows, parts)](logits.contiguous(), some, vocab, True, PART, keep)
    _keep_best[(rows, 1)](some, best, parts * keep, False, _power_of_2(parts * keep), keep, num_warps=8)
    return (0x7FFFFFFF - (best[:, :number] & 0x7FFFFFFF)).view(*logits.shape[:-1], number)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@triton.jit
def _keep_best(  # type: ignore[no-untyped-def]
    source, target, columns, LOGITS: tl.constexpr, PART: tl.constexpr, KEEP: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART + tl.arange(0, PART)
    if LOGITS:
        logit = tl.load(source + row * columns + at, mask=at < columns, other=-float("inf"))
        bits = logit.to(tl.float32).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the floats
        key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - at)
    else:
        key = tl.load(source + row * columns + at, mask=at < columns, other=-(1 << 63))
    best = tl.topk(key, KEEP)
    tl.store(target + (row * tl.num_programs(1) + tl.program_id(1)) * KEEP + tl.arange(0, KEEP), best)
