"""Attention of a tree's nodes over the static cache as two Triton kernels; needs a GPU.

Library kernels fit badly: with a mask they put one block on each head and 64 queries, and as plain products the scores
travel through memory three times. Here a block takes some nodes of one head and a part of the slots, and a second
kernel weighs the parts' means (flash decoding).

Shape suffixes: B rows, N nodes, L slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_ds.decoding.kernels import enabled_for_half_on_hopper

TILES = {64: (32, 128, 128), 128: (64, 64, 256)}  # by head size: nodes of a block, slots at a time and in all


def applies(query: Tensor) -> bool:
    """Whether the kernels attend for queries [B, heads, N, head size]: few nodes, whose library kernels idle."""
    batch, _, nodes, size = query.shape
    few = batch == 1 and 1 < nodes <= 64 and size in (16, 32, 64, 128, 256)
    return few and enabled_for_half_on_hopper(query)


@torch.library.custom_op("medusa_ds::tree_attention", mutates_args=())
def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Grouped-query attention.

    Args:
        query: [B, heads, N, head size], the head size a power of two from 16.
        key: [B, key/value heads, L, head size], as `value`, with the same strides; L is a multiple of 256.
        value: see there.
        mask: additive, [B, 1, N or more, L].
        scale: of the scores.

    Returns:
        [B, N, heads, head size].
    """
    (batch, heads, nodes, size), slots = query.shape, key.shape[2]
    block_nodes, block_slots, part = TILES.get(size, (16, 64, 128))
    parts = slots // part
    mean = query.new_empty(batch, nodes, heads, parts, size, dtype=torch.float32)
    highest = query.new_empty(batch, nodes, heads, parts, dtype=torch.float32)
    total = torch.empty_like(highest)
    out = _empty(query, key, value, mask, scale)
    strides = (*query.stride()[:3], *key.stride()[:3], mask.stride(0), mask.stride(2))
    sizes = (scale, heads // key.shape[1], parts, size, part, block_nodes, block_slots)
    _attend_part[(-(-nodes // block_nodes), heads, batch * parts)](
        query, key, value, mask, mean, highest, total, nodes, *strides, *sizes, query.is_cuda, launch_pdl=True
    )
    at_once = triton.next_power_of_2(parts)
    _weigh_parts[(batch * nodes * heads,)](
        mean, highest, total, out, parts, at_once, size, query.is_cuda, num_warps=1, launch_pdl=True
    )
    return out


@tree_attention.register_fake
def _empty(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, size = query.shape
    return query.new_empty(batch, nodes, heads, size)


@triton.jit
def _attend_part(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    mask,
    mean_out,
    highest_out,
    total_out,
    nodes,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_l,
    mask_b,
    mask_n,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    GPU: tl.constexpr,
):
    head, part, batch = tl.program_id(1), tl.program_id(2) % PARTS, (tl.program_id(2) // PARTS).to(tl.int64)
    n, at = tl.program_id(0) * NODES + tl.arange(0, NODES), tl.arange(0, SIZE)[None]
    there = n[:, None] < nodes
    if GPU:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q = tl.load(query + batch * query_b + head * query_h + n[:, None] * query_n + at, mask=there, other=0.0)
    base = batch * key_b + head // GROUP * key_h
    highest = tl.full([NODES], -1e30, tl.float32)  # not -inf: a whole part may be hidden
    total = tl.zeros([NODES], tl.float32)
    mean = tl.zeros([NODES, SIZE], tl.float32)
    for start in range(0, PART, SLOTS):
        slot = part * PART + start + tl.arange(0, SLOTS)
        k = tl.load(key + base + slot[:, None] * key_l + at)
        v = tl.load(value + base + slot[:, None] * key_l + at)
        hidden = tl.load(mask + batch * mask_b + n[:, None] * mask_n + slot[None], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k)) * SCALE + hidden.to(tl.float32)
        higher = tl.maximum(highest, tl.max(score, 1))
        share, kept = tl.exp(score - higher[:, None]), tl.exp(highest - higher)
        total = total * kept + tl.sum(share, 1)
        mean = mean * kept[:, None] + tl.dot(share.to(v.dtype), v)
        highest = higher
    row = ((batch * nodes + n) * tl.num_programs(1) + head) * PARTS + part
    tl.store(mean_out + row[:, None] * SIZE + at, mean, mask=there)
    tl.store(highest_out + row, highest, mask=n < nodes)
    tl.store(total_out + row, total, mask=n < nodes)


@triton.jit
def _weigh_parts(  # type: ignore[no-untyped-def]
    mean, highest, total, out, parts, PARTS: tl.constexpr, SIZE: tl.constexpr, GPU: tl.constexpr
):
    row, part, at = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, SIZE)
    if GPU:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    height = tl.load(highest + row * parts + part, mask=part < parts, other=-float("inf"))
    weight = tl.exp(height - tl.max(height))
    sums = tl.load(mean + (row * parts + part[:, None]) * SIZE + at[None], mask=part[:, None] < parts, other=0.0)
    totals = tl.load(total + row * parts + part, mask=part < parts, other=0.0)
    tl.store(out + row * SIZE + at, tl.sum(weight[:, None] * sums, 0) / tl.sum(weight * totals))
