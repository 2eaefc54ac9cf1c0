"""Products of up to 64 rows by a Triton kernel that streams the weights; needs a Hopper GPU.

With so few rows a product takes as long as reading its weight, if the whole GPU reads without a pause. So blocks of a
narrow weight share out its depth too, in parts that whoever reads the product adds up; a product asks at its end for
the next one's weight, if that is small, so that it comes into the cache while norms and attention run, and of a large
one for its first tiles while the kernel before still runs; and the two products of a gated MLP are gated in one kernel.

Shape suffixes: M rows, N columns of the product, K depth, S parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from medusa_ds.decoding.kernels import enabled_for_half_on_hopper
from medusa_ds.model.projection import project

MOST_ROWS = 64
PROCESSORS = 132  # of an H100 or H200
AHEAD_MIB = 16  # larger weights are not asked for: the beginning of one is lost before it is read
WIDE = 64 * PROCESSORS  # columns from which blocks take more of them


class Tiles(NamedTuple):
    """How a product is shared out: columns and depth of a block's tile, tiles on their way at once, parts."""

    columns: int
    depth: int
    stages: int
    parts: int


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, ahead: Tensor) -> Tensor:
    """`F.linear` for [..., K] and [N, K]; a few rows on a GPU by the kernel. `ahead`: the next product's weight."""
    if not applies(hidden, weight):
        return project(hidden, weight, bias)
    parts_SMN = few_rows_product(hidden.flatten(0, -2), weight, ahead)
    out = parts_SMN.sum(0) if len(parts_SMN) > 1 else parts_SMN[0]
    return (out if bias is None else out + bias).to(hidden.dtype).view(*hidden.shape[:-1], -1)


def gated_linear(hidden: Tensor, weight: Tensor, ahead: Tensor) -> Tensor:
    """`silu(gate) * up`, [..., N / 2], of the halves of `linear(hidden, weight)`, where `gates` says so."""
    return few_rows_product(hidden.flatten(0, -2), weight, ahead, True).view(*hidden.shape[:-1], -1)


def gates(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel gates these: narrow products share out their depth, or are as fast without."""
    return applies(hidden, weight) and len(weight) > WIDE


def applies(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel multiplies these."""
    rows = hidden.numel() // hidden.shape[-1]
    return 1 < rows <= MOST_ROWS and weight.shape[1] % 8 == 0 and enabled_for_half_on_hopper(hidden)


def tiles(columns: int, depth: int) -> Tiles:
    """The fastest found on an H200 for the layers of an 8B and of a 135M model."""
    small = columns * depth < 1 << 22
    if columns > WIDE:
        return Tiles(256, 64, 4, 1)  # every block reads all rows: 128 columns read half as much again from the L2 cache
    tile = Tiles(32, 64 if depth % 128 else 128, 4, 1) if small else Tiles(64, 128, 5, 1)
    steps = -(-depth // tile.depth)
    parts = min(max(1, PROCESSORS // -(-columns // tile.columns)), max(1, steps // (2 if small else 8)))
    return tile._replace(parts=-(-steps // -(-steps // parts)))


@torch.library.custom_op("medusa_ds::few_rows_product", mutates_args=())
def few_rows_product(rows_MK: Tensor, weight_NK: Tensor, ahead: Tensor, gated: bool = False) -> Tensor:
    """Parts [S, M, N] of the product, in fp32 if there are several; gated, [1, M, N / 2] of one that has one part."""
    out = _empty(rows_MK, weight_NK, ahead, gated)
    (parts, rows, columns), depth = out.shape, rows_MK.shape[1]
    tile = tiles(*weight_NK.shape)
    width = tile.columns // 2 if gated else tile.columns  # of the gate, and as many of what it lets through
    left = TensorDescriptor.from_tensor(rows_MK.contiguous(), [MOST_ROWS, tile.depth])
    right = TensorDescriptor.from_tensor(weight_NK, [width, tile.depth])
    grid = (-(-columns // width), parts)
    most = AHEAD_MIB << 20
    lines = ahead.nbytes // 128 if 128 <= ahead.nbytes <= most else 1
    each = triton.next_power_of_2(-(-lines // (grid[0] * parts)))
    sizes = (rows, columns, depth, lines)
    of_a_block = (-(-depth // (parts * tile.depth)), MOST_ROWS, width, tile.depth, max(128, each))
    switches, options = (weight_NK.nbytes > most, gated, out.is_cuda), {"num_stages": tile.stages, "launch_pdl": True}
    _multiply[grid](left, right, weight_NK, ahead, out, *sizes, *of_a_block, *switches, **options)
    return out


@few_rows_product.register_fake
def _empty(rows_MK: Tensor, weight_NK: Tensor, ahead: Tensor, gated: bool = False) -> Tensor:
    parts, columns = tiles(*weight_NK.shape).parts, len(weight_NK) // 2 if gated else len(weight_NK)
    dtype = rows_MK.dtype if parts == 1 else torch.float32
    return rows_MK.new_empty(parts, rows_MK.shape[0], columns, dtype=dtype)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    rows_MK,
    weight_NK,
    weight,
    ahead,
    out,
    rows,
    columns,
    depth,
    lines,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    GATED: tl.constexpr,
    GPU: tl.constexpr,
):
    block, part = tl.program_id(0), tl.program_id(1)
    first = block * COLUMNS
    if GPU:
        if EARLY:
            column = tl.minimum(first + tl.arange(0, COLUMNS)[:, None], columns - 1).to(tl.int64)
            line = tl.minimum(part * STEPS * DEPTH + tl.arange(0, DEPTH // 64)[None] * 64, depth - 1)
            tile = weight + column * depth + line
            _prefetch(tile)
            if GATED:
                _prefetch(tile + columns.to(tl.int64) * depth)
        tl.extra.cuda.gdc_wait()  # for the kernel before, beside whose end this one starts
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    passed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        at = (part * STEPS + step) * DEPTH  # beyond the depth both tiles are zeros
        hidden = rows_MK.load([0, at])
        total = tl.dot(hidden, weight_NK.load([first, at]).T, total)
        if GATED:
            passed = tl.dot(hidden, weight_NK.load([columns + first, at]).T, passed)
    if GATED:
        total = total * tl.sigmoid(total) * passed
    row, column = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None]
    to = out + (part * rows + row) * columns + column
    tl.store(to, total.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))
    if GPU:
        line = (part * tl.num_programs(0) + block) * AHEAD + tl.arange(0, AHEAD)
        _prefetch(ahead + tl.minimum(line, lines - 1) * 64)


@triton.jit
def _prefetch(at):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )
