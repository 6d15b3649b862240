"""Products of FP8 numbers, added up in fp32: one matrix, or a matrix for every group of rows.

    y_ro = sum_c  s_rc t_oc  sum_{k in tile c} a_rk b_ok        c: tiles of 128 along what is summed over

Each operand has the axis that is summed over last, with the scales of `model.kernels.cast`. Tensor cores
sum over a tile with about 14 bits; sums of tiles, times their scales, are fp32. One product is cuBLAS's
where its demands hold, which for what the casts return are

    tiles of 1 x 128 for a; for b either those, or blocks of 128 x 128 of a matrix of 128s of rows
    128s of what is summed over, 16s of rows and of columns, an output in bf16 or fp16

and otherwise, like every grouped product, that of a kernel below. Elsewhere than on Hopper and newer the same
numbers are multiplied in the output's dtype, in which FP8 numbers are exact.

Legend: R rows sorted by group, E groups (experts), K what is summed over, O and I output features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.gpu import TILE, jit, runs_kernels, tiles, tl
from model.linear import grouped_linear
from model.quant import FP8_BLOCK, FP8_TILE, Quantised, dequantise

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels write
ALIGNMENT = 16  # bytes at which rows begin for the tensor memory accelerator


class Setting(NamedTuple):
    """How a product is cut up; tests/bench/kernels.py --tune compares settings."""

    rows: int = 128  # of an output tile
    columns: int = 128
    warps: int = 8
    stages: int = 4  # tiles of operands in flight
    group: int = 8  # row tiles that share column tiles in L2
    descriptors: bool = True  # load through the tensor memory accelerator instead of by pointers
    persistent: bool = False  # grouped products only: programs compute tiles in turn, loading the next early


GROUPED, OUTER = Setting(), Setting()


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [O, K] transposed -> [M, O]."""
    if not _runs(a, dtype):
        return F.linear(dequantise(a, dtype), dequantise(b, dtype))
    if _library_takes(a, b, dtype):
        return _library_product(a, b, dtype)
    everything = torch.full((1,), len(a.values), dtype=torch.int32, device=a.values.device)
    stack = b._replace(values=b.values.unsqueeze(0), scales=b.scales.unsqueeze(0))
    return _grouped(a, stack, everything, dtype)


def grouped_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of group e of a [R, K] times b[e] transposed, b [E, O, K] -> [R, O].

    `offsets` [E] int32: the end row of each group, the last of which is R.
    """
    if _runs(a, dtype):
        return _grouped(a, b, offsets, dtype)
    return grouped_linear(dequantise(a, dtype), dequantise(b, dtype), offsets)


def grouped_outer_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """a [O, R] times b [I, R] transposed over the rows of each group -> [E, O, I]; zeros of an empty group.

    Tiles of 128 rows are counted from the first row of all, whatever group it belongs to.
    """
    if _runs(a, dtype):
        return torch.ops.fourfold.grouped_outer_product(
            a.values, a.scales, b.values, b.scales, offsets, dtype
        )
    if not a.values.shape[-1]:
        return a.scales.new_zeros(len(offsets), len(a.values), len(b.values), dtype=dtype)
    packed = torch.contiguous_format  # `contiguous()` would leave a single row with strides of 1
    rows = [dequantise(x, dtype).mT.clone(memory_format=packed) for x in (a, b)]  # [R, O], [R, I]
    if dtype == torch.float64:  # torch has no grouped product in fp64
        ends = offsets.tolist()
        parts = zip(*(x.tensor_split(ends)[:-1] for x in rows))
        return torch.stack([own.mT @ other for own, other in parts])
    return F.grouped_mm(rows[0].mT, rows[1], offs=offsets)


def _runs(a: Quantised, dtype: torch.dtype) -> bool:
    return runs_kernels(a.values) and dtype in OUTPUTS and a.block == FP8_TILE


def _grouped(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    operands = a.values, a.scales, b.values, b.scales
    return torch.ops.fourfold.grouped_product(*operands, offsets, b.block == FP8_TILE, dtype)


def _library_takes(a: Quantised, b: Quantised, dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies these; see the module's docstring."""
    (rows, inner), columns = a.values.shape, len(b.values)
    every = TILE if b.block == FP8_BLOCK else 16
    fits = rows % 16 == 0 and inner % TILE == 0 and columns % every == 0 and rows * inner * columns > 0
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    hopper = torch.cuda.get_device_capability(a.values.device)[0] == 9
    return fits and hopper and version >= (12, 9) and dtype != torch.float32


def _library_product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """cuBLAS reads scales of tiles column after column, and those of blocks in rows of multiples of 4."""
    wide = F.ScalingType.BlockWise1x128
    if b.block == FP8_TILE:
        recipe, scales = wide, _by_columns(b.scales).mT
    else:
        recipe, scales = F.ScalingType.BlockWise128x128, _by_fours(b.scales).mT
    return F.scaled_mm(
        a.values, b.values.mT, _by_columns(a.scales).mT, wide, scales, recipe, output_dtype=dtype
    )


def _by_columns(scales: Tensor) -> Tensor:
    """Scales of tiles [M, K / 128] -> [K / 128, M]; no copy of what the casts return."""
    return scales.mT.contiguous()


def _by_fours(scales: Tensor) -> Tensor:
    """Scales of blocks [O / 128, K / 128], their rows filled up to multiples of 4."""
    missing = -scales.shape[-1] % 4
    return F.pad(scales, (0, missing)) if missing else scales.contiguous()


@torch.library.custom_op("fourfold::grouped_product", mutates_args=())
def _grouped_product(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    b_tiles: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`grouped_product` on a GPU. With `b_tiles` E is 1 and b has tiles of 1 x 128, else blocks."""
    return launch_grouped(a, a_scales, b, b_scales, offsets, b_tiles, dtype, GROUPED)


@_grouped_product.register_fake
def _(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    b_tiles: bool,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@torch.library.custom_op("fourfold::grouped_outer_product", mutates_args=())
def _grouped_outer_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return launch_outer(a, a_scales, b, b_scales, offsets, dtype, OUTER)


@_grouped_outer_product.register_fake
def _(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[0], dtype=dtype)


def launch_grouped(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    b_tiles: bool,
    dtype: torch.dtype,
    setting: Setting,
) -> Tensor:
    """Tiles of rows never span groups, and their number, which only the device knows, is at most `slots`."""
    (rows, inner), (groups, columns) = a.shape, b.shape[:2]
    out = a.new_empty(rows, columns, dtype=dtype)
    if not (rows and inner and columns):
        return out.zero_()
    a, b = _aligned(a), _aligned(b.flatten(0, 1))
    strides = a.stride(0), b.stride(0)
    if setting.descriptors:
        a, b = _descriptor(a, setting.rows), _descriptor(b, setting.columns)
    slots = rows // setting.rows + groups
    programs = slots * -(-columns // setting.columns)
    kernel = _grouped_kernel
    if setting.persistent and not b_tiles:  # scales of both operands' rows would not fit the registers
        kernel, programs = _persistent_kernel, min(programs, _processors(a_scales) * (8 // setting.warps))
    kernel[(programs,)](
        a, _by_columns(a_scales), b, _by_columns(b_scales[0]) if b_tiles else b_scales.contiguous(),
        offsets, out, rows, columns, inner, groups, *strides,
        B_TILES=b_tiles, EVEN=inner % TILE == 0, E=max(1 << (groups - 1).bit_length(), 32), ROWS=setting.rows,
        COLUMNS=setting.columns, GROUP=setting.group, DESCRIPTORS=setting.descriptors,
        num_warps=setting.warps, num_stages=setting.stages,
    )  # fmt: skip
    return out


def launch_outer(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    setting: Setting,
) -> Tensor:
    """A program sums up one tile of one group's output, over tiles of 128 rows.

    `edges` has those tiles of a that are not the group's alone, with zeros for others' rows. b needs none:
    its numbers times zero are zero, and NaN is of whole tiles, so of the group's own rows too.
    """
    (rows, length), columns, groups = a.shape, len(b), len(offsets)
    out = a.new_empty(groups, rows, columns, dtype=dtype)
    if not (length and rows and columns):
        return out.zero_()
    a, b = _aligned(a), _aligned(b)
    edges = a.new_empty(2 * groups, rows, TILE)
    _edges_kernel[(2 * groups, tiles(rows))](a, offsets, edges, rows, a.stride(0), num_warps=4)
    strides = a.stride(0), b.stride(0)
    if setting.descriptors:
        b = _descriptor(b, setting.columns)
    count = -(-rows // setting.rows) * -(-columns // setting.columns)
    _outer_kernel[(count, groups)](
        a, edges, _by_columns(a_scales), b, _by_columns(b_scales), offsets, out,
        length, rows, columns, *strides,
        ROWS=setting.rows, COLUMNS=setting.columns, GROUP=setting.group, DESCRIPTORS=setting.descriptors,
        num_warps=setting.warps, num_stages=setting.stages,
    )  # fmt: skip
    return out


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _aligned(values: Tensor) -> Tensor:
    """values [M, K], copied unless its rows begin at multiples of 16 bytes: the casts' do where K is one."""
    if values.stride(1) == 1 and values.stride(0) % ALIGNMENT == 0 and values.data_ptr() % ALIGNMENT == 0:
        return values
    size = values.shape[1]
    padded = F.pad(values.view(torch.uint8), (0, -size % ALIGNMENT)).contiguous()
    return padded.view(values.dtype)[:, :size]


def _descriptor(values: Tensor, rows: int):
    """Of tiles of `rows` x 128 of values [M, K]; what a tile has outside of values reads as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(values, list(values.shape), list(values.stride()), [rows, TILE])


@jit(varying=("R", "groups"))
def _grouped_kernel(
    a, a_scales, b, b_scales, offsets, out, R, O, K, groups, a_stride, b_stride,  # noqa: E741
    B_TILES: tl.constexpr, EVEN: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile. Group e's are numbered from `start // ROWS + e` on, which leaves room for as
    many as it can have, whatever other groups have: some numbers are of no tile."""
    slot, block = _swizzled(tl.program_id(0), R // ROWS + groups, tl.cdiv(O, COLUMNS), GROUP)
    index = tl.arange(0, E)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < groups), other=0)
    e = tl.sum(((starts // ROWS + index <= slot) & (index < groups)).to(tl.int32), 0) - 1
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    row, column = start + (slot - start // ROWS - e) * ROWS, block * COLUMNS
    if row >= end:
        return
    acc = _sum(
        a, a_scales, b, b_scales, e, row, column, end, R, O, K, a_stride, b_stride,
        B_TILES, EVEN, ROWS, COLUMNS, DESCRIPTORS,
    )  # fmt: skip
    _store(acc, out, row, column, end, O, ROWS, COLUMNS)


@jit(varying=("R", "groups"))
def _persistent_kernel(
    a, a_scales, b, b_scales, offsets, out, R, O, K, groups, a_stride, b_stride,  # noqa: E741
    B_TILES: tl.constexpr, EVEN: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A program computes every so-manieth tile, of those that there are. The loops over tiles and over K are
    made one, so that the pipeline goes on from a tile to the next."""
    index = tl.arange(0, E)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < groups), other=0)
    ends = tl.load(offsets + index, mask=index < groups, other=0)
    sizes = tl.where(index < groups, tl.cdiv(ends - starts, ROWS), 0)
    after, slots, blocks = tl.cumsum(sizes, 0), tl.sum(sizes, 0), tl.cdiv(O, COLUMNS)
    for tile in tl.range(tl.program_id(0), slots * blocks, tl.num_programs(0), flatten=True):
        slot, block = _swizzled(tile, slots, blocks, GROUP)
        e = tl.sum((after <= slot).to(tl.int32), 0)
        start = tl.sum(tl.where(index == e, starts, 0), 0)
        end = tl.sum(tl.where(index == e, ends, 0), 0)
        before = tl.sum(tl.where(index == e, after - sizes, 0), 0)
        row, column = start + (slot - before) * ROWS, block * COLUMNS
        acc = _sum(
            a, a_scales, b, b_scales, e, row, column, end, R, O, K, a_stride, b_stride,
            B_TILES, EVEN, ROWS, COLUMNS, DESCRIPTORS,
        )  # fmt: skip
        _store(acc, out, row, column, end, O, ROWS, COLUMNS)


@jit
def _sum(
    a, a_scales, b, b_scales, e, row, column, end, R, O, K, a_stride, b_stride,  # noqa: E741
    B_TILES: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tile at (row, column) of group e's product. Rows outside are computed twice, not masked."""
    rows = tl.minimum(tl.arange(0, ROWS), end - 1 - row)
    columns = tl.minimum(tl.arange(0, COLUMNS), O - 1 - column)
    if B_TILES:
        b_scale, b_step = b_scales + column + columns, O
    else:
        b_scale, b_step = b_scales + (e * tl.cdiv(O, 128) + column // 128) * tl.cdiv(K, 128), 1
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, tl.cdiv(K, 128)):
        s = tl.load(a_scales + row + rows + tl.cast(k, tl.int64) * R)
        t = tl.load(b_scale + tl.cast(k, tl.int64) * b_step)
        x = _tile(a, row, rows, k * 128, K, a_stride, EVEN, DESCRIPTORS)
        y = _tile(b, e * O + column, columns, k * 128, K, b_stride, EVEN, DESCRIPTORS)
        if B_TILES:
            acc += tl.dot(x, tl.trans(y)) * s[:, None] * t[None, :]
        else:
            acc += tl.dot(x, tl.trans(y)) * (s * t)[:, None]
    return acc


@jit(varying=("R",))
def _outer_kernel(
    a, edges, a_scales, b, b_scales, offsets, out, R, O, I, a_stride, b_stride,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    row, column = _swizzled(tl.program_id(0), tl.cdiv(O, ROWS), tl.cdiv(I, COLUMNS), GROUP)
    row, column = row * ROWS, column * COLUMNS
    start, end, first, last = _rows_of(offsets, e)
    rows = tl.minimum(tl.arange(0, ROWS), O - 1 - row)
    columns = tl.minimum(tl.arange(0, COLUMNS), I - 1 - column)
    ks = tl.arange(0, 128)
    edge = edges + 2 * e.to(tl.int64) * O * 128
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for c in range(first, last):
        s = tl.load(a_scales + row + rows + tl.cast(c, tl.int64) * O)
        t = tl.load(b_scales + column + columns + tl.cast(c, tl.int64) * I)
        shared = (c * 128 < start) | (c * 128 + 128 > end)
        stride = tl.where(shared, 128, a_stride)
        source = tl.where(shared, edge + tl.where(c == first, 0, O * 128), a + c * 128)
        source += row.to(tl.int64) * stride
        x = tl.load(source + rows[:, None] * stride + ks[None, :])
        y = _tile(b, column, columns, c * 128, tl.cdiv(R, 16) * 16, b_stride, False, DESCRIPTORS)
        acc += tl.dot(x, tl.trans(y)) * s[:, None] * t[None, :]
    _store(acc, out + e.to(tl.int64) * O * I, row, column, O, I, ROWS, COLUMNS)


@jit
def _edges_kernel(a, offsets, edges, O, stride):  # noqa: E741
    """edges [2E, O, 128]: the tiles of rows that group e begins and ends in, zero where rows are others'."""
    edge, row = tl.program_id(0), tl.program_id(1) * 128
    start, end, first, last = _rows_of(offsets, edge // 2)
    if start == end:
        return
    k = tl.where(edge % 2 == 0, first, last - 1) * 128
    rows, ks = row + tl.arange(0, 128), tl.arange(0, 128)
    mask = (rows < O)[:, None] & (k + ks < stride)[None, :]
    tile = tl.load(a + rows[:, None].to(tl.int64) * stride + k + ks[None, :], mask=mask, other=0.0)
    inside = (k + ks >= start) & (k + ks < end)
    bits = tl.where(inside[None, :], tile.to(tl.uint8, bitcast=True), 0).to(tl.uint8)
    place = edges + (edge.to(tl.int64) * O + rows[:, None]) * 128 + ks[None, :]
    tl.store(place, bits.to(tl.float8e4nv, bitcast=True), mask=(rows < O)[:, None])


@jit
def _rows_of(offsets, e):
    """The first row of group e and the row after its last; likewise of the tiles of 128 with its rows."""
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    first = start // 128
    return start, end, first, tl.where(start < end, tl.cdiv(end, 128), first)


@jit
def _swizzled(index, rows, columns, GROUP: tl.constexpr):
    """The `index`-th of rows x columns tiles: GROUP rows at a time, so that L2 holds their operands."""
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = index % (GROUP * columns)
    return first + within % height, within // height


@jit
def _tile(x, row, rows, k, K, stride, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """x[row + rows, k : k + 128], zeros from K on."""
    if DESCRIPTORS:
        tile = x.load([row, k])
    else:
        ks = tl.arange(0, 128)
        place = x + row.to(tl.int64) * stride + k + rows[:, None] * stride + ks[None, :]
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(k + ks < K)[None, :], other=0.0)
    return tile


@jit
def _store(acc, out, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Into out [M, N] from (row, column) on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = out + row.to(tl.int64) * N + column + rows[:, None] * N + columns[None, :]
    inside = (row + rows < M)[:, None] & (column + columns < N)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
