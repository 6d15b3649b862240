"""Casts to FP8 in the layouts in which products take their operands: summed over along the last axis.

    q = e4m3(x / s),    s = 2^ceil(log2(amax / 448)) of x's tile of 1 x 128 or block of 128 x 128

Tensor cores of Hopper read FP8 operands only along the axis that is summed over, so everything is written
twice, in one pass: as it is and transposed. What the kernels add to the references is memory layout:

    rows of a transposed activation begin at multiples of 128 bytes, filled up with zeros (NaN in NaN tiles)
    scales of activations lie column after column, as products read them

Where rows are sorted by group (expert), tiles along them never hold rows of two groups: each group's begin a
tile, filled up with zeros, so that products sum over whole tiles. R rows of E groups need at most
P = 128 * (R // 128 + E), which the host knows without asking the device; `model.kernels.gpu.slots_of` says
which tile is whose. Tiles without rows are not written by the kernels.

Legend: R rows (tokens), I input features, O output features, E groups (experts), P rows in groups' tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cast_hopper
from model.kernels.gpu import (
    TILE,
    group_of_slot,
    jit,
    launched,
    magnitude,
    operator,
    power_of_two,
    power_of_two_of,
    runs_kernels,
    slots_of,
    tiles,
    tl,
)
from model.quant import FP4_BLOCK, FP8_BLOCK, FP8_TILE, Quantised, quantise_fp8, round_fp4

INPUTS = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels of activations read
WEIGHTS = INPUTS[:2]  # of weights; Triton 3.6 compiles the fp32 kernel to one that transposes wrongly
WARPS, REGISTERS = 8, 128  # of a program that casts a tile of 128 x 128, and of its threads: two fit
FP4_GROUPS = 128  # blocks of 1 x 32 that a program of 4 warps rounds


def cast_activation(x: Tensor, offsets: Tensor | None = None) -> tuple[Quantised, Quantised]:
    """x [R, I] -> itself [R, I] and transposed [I, R], each in tiles of 1 x 128 of its own.

    The first is for products with weights, the second for the weights' gradient, which sums over rows. With
    `offsets` [E] int32, the end row of each group, the second is [I, P].
    """
    if runs_kernels(x) and x.dtype in INPUTS:
        return activations(torch.ops.fourfold.cast_activation(x, offsets), len(x), offsets)
    columns = x if offsets is None else in_tiles(x, offsets)
    return quantise_fp8(x), quantise_fp8(columns.mT.contiguous())


def in_tiles(x: Tensor, offsets: Tensor) -> Tensor:
    """x [R, I] -> [P, I]: every group's rows from the start of a tile on, zeros elsewhere."""
    padded = x.new_zeros(TILE * slots_of(len(x), len(offsets)), x.shape[1])
    return padded.index_copy(0, places_in_tiles(len(x), offsets), x)


def places_in_tiles(rows: int, offsets: Tensor) -> Tensor:
    """Where `in_tiles` puts each row, [R] int64."""
    row = torch.arange(rows, device=offsets.device)
    group = torch.searchsorted(offsets, row, right=True)
    start = F.pad(offsets, (1, 0))[group]
    return (start // TILE + group) * TILE + row - start


def ends_in_tiles(offsets: Tensor) -> Tensor:
    """Where the tiles of each group end, [E] int32: the next group's begin there."""
    return (offsets // TILE + torch.arange(1, len(offsets) + 1, device=offsets.device)).int() * TILE


def cast_weight(weight: Tensor) -> tuple[Quantised, Quantised]:
    """weight [..., O, I] -> itself and transposed [..., I, O], the same numbers in blocks of 128 x 128."""
    if runs_kernels(weight) and weight.dtype in WEIGHTS:
        values, scales, transposed, transposed_scales = torch.ops.fourfold.cast_weight(weight)
        return Quantised(values, scales, FP8_BLOCK), Quantised(transposed, transposed_scales, FP8_BLOCK)
    quantised = quantise_fp8(weight, FP8_BLOCK)
    return quantised, quantised.mT


def fp4_values(master: Tensor, dtype: torch.dtype) -> Tensor:
    """master fp32 [..., M, N] rounded to FP4, blocks of 1 x 32, in `dtype`: bf16 holds all but denormals."""
    if runs_kernels(master) and master.dtype == torch.float32:
        return torch.ops.fourfold.fp4_values(master, dtype)
    return round_fp4(master).to(dtype)


def activations(
    parts: tuple[Tensor, Tensor, Tensor, Tensor], rows: int, offsets: Tensor | None
) -> tuple[Quantised, Quantised]:
    """What `cast_activation` returns, from tensors as its kernel writes them (`empty_activations`)."""
    values, scales, transposed, transposed_scales = parts
    transposed = transposed[:, :rows] if offsets is None else transposed
    return Quantised(values, scales.mT, FP8_TILE), Quantised(transposed, transposed_scales.mT, FP8_TILE)


def empty_activations(
    like: Tensor, rows: int, columns: int, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [R, I], scales [ceil(I / 128), R]; transposed, [I, P] and [P / 128, I]."""
    slots = row_slots(rows, offsets)
    return (
        like.new_empty(rows, columns, dtype=torch.float8_e4m3fn),
        like.new_empty(tiles(columns), rows, dtype=torch.float32),
        like.new_empty(columns, slots * TILE, dtype=torch.float8_e4m3fn),
        like.new_empty(slots, columns, dtype=torch.float32),
    )


def row_slots(rows: int, offsets: Tensor | None) -> int:
    return tiles(rows) if offsets is None else slots_of(rows, len(offsets))


def groups_of(offsets: Tensor | None) -> tuple[int, int]:
    """How many groups, and so many as the kernels count."""
    count = 0 if offsets is None else len(offsets)
    return count, power_of_two_of(max(count, 1))


@operator("cast_activation")
def _cast_activation(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    parts = empty_activations(x, rows, columns, offsets)
    x = x.contiguous()
    if rows and columns and cast_hopper.suits(x):
        cast_hopper.cast_activation(x, offsets, *parts)
    elif rows and columns:
        grid = (tiles(columns), row_slots(rows, offsets))
        count, most = groups_of(offsets)
        _cast_activation_kernel[grid](
            x, offsets, *parts, rows, columns, count, E=most, num_warps=WARPS, maxnreg=REGISTERS
        )  # fmt: skip
    return parts


@torch.library.register_fake("fourfold::cast_activation")
def _(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_activations(x, x.shape[0], x.shape[1], offsets)


@operator("cast_weight")
def _cast_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = _empty_weights(weight)
    if weight.numel():
        rows, columns = weight.shape[-2:]
        grid = (tiles(columns), tiles(rows), weight.numel() // (rows * columns))
        _cast_weight_kernel[grid](weight.contiguous(), *parts, rows, columns, num_warps=WARPS)
    return parts


@torch.library.register_fake("fourfold::cast_weight")
def _empty_weights(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [..., O, I], scales [..., ceil(O / 128), ceil(I / 128)], and both transposed."""
    *stack, rows, columns = weight.shape
    return (
        weight.new_empty(*stack, rows, columns, dtype=torch.float8_e4m3fn),
        weight.new_empty(*stack, tiles(rows), tiles(columns), dtype=torch.float32),
        weight.new_empty(*stack, columns, rows, dtype=torch.float8_e4m3fn),
        weight.new_empty(*stack, tiles(columns), tiles(rows), dtype=torch.float32),
    )


@operator("fp4_values")
def _fp4_values(master: Tensor, dtype: torch.dtype) -> Tensor:
    out = _empty_fp4(master, dtype)
    if master.numel():
        columns = master.shape[-1]
        per_row = -(-columns // FP4_BLOCK[1])
        groups = master.numel() // columns * per_row
        grid = (-(-groups // FP4_GROUPS),)
        _fp4_kernel[grid](master.contiguous(), out, groups, per_row, columns, FP4_GROUPS, num_warps=4)
    return out


@torch.library.register_fake("fourfold::fp4_values")
def _empty_fp4(master: Tensor, dtype: torch.dtype) -> Tensor:
    return master.new_empty(master.shape, dtype=dtype)


@launched
@jit(varying=("R", "groups"))
def _cast_activation_kernel(
    x, offsets, values, scales, transposed, transposed_scales, R, I, groups, E: tl.constexpr,  # noqa: E741
):  # fmt: skip
    row, end = rows_of_slot(offsets, R, groups, E)
    if row >= end:
        return
    column = tl.program_id(0) * 128
    tile = load_tile(x, row, column, end, I, I)
    store_both_ways(tile, row, end, column, values, scales, transposed, transposed_scales, R, I)


@jit
def rows_of_slot(offsets, R, groups, E: tl.constexpr):
    """The first row of the tile of a program of `row_slots`, and the row at which its rows end."""
    if offsets is None:
        return tl.program_id(1) * 128, R
    else:
        _, row, end = group_of_slot(offsets, tl.program_id(1), groups, E)
        return row, end


@jit
def load_tile(x, row, column, end, limit, stride, COLUMNS: tl.constexpr = 128):
    """The 128 x COLUMNS numbers of x [R, `stride`] at (row, column); zeros from `end` and from `limit` on."""
    rows, columns = tl.arange(0, 128), tl.arange(0, COLUMNS)
    inside = (row + rows < end)[:, None] & (column + columns < limit)[None, :]
    corner = x + row.to(tl.int64) * stride + column
    return tl.load(corner + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def store_both_ways(tile, row, end, column, values, scales, transposed, transposed_scales, R, I):  # noqa: E741
    """Cast the 128 x 128 tile of an activation [R, I] at (row, column), along its rows and its columns.

    It holds zeros outside of the activation and its group; those from `end` on go into the tile's filling.
    """
    rows, columns = tl.arange(0, 128), tl.arange(0, 128)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    wide, bits = tile.to(tl.float32), magnitude(tile)
    below, beside = row + rows < end, column + columns < I

    scale, inverse = power_of_two(tl.max(bits, 1), 0x43E00000)  # 448
    corner = values + row.to(tl.int64) * I + column
    cast = (wide * inverse[:, None]).to(tl.float8e4nv)
    tl.store(corner + rows[:, None] * I + columns[None, :], cast, mask=below[:, None] & beside[None, :])
    tl.store(scales + (column // 128).to(tl.int64) * R + row + rows, scale, mask=below)

    scale, inverse = power_of_two(tl.max(bits, 0), 0x43E00000)
    corner = transposed + column.to(tl.int64) * slots * 128 + slot * 128
    cast = tl.trans((wide * inverse[None, :]).to(tl.float8e4nv))
    tl.store(corner + columns[:, None] * (slots * 128) + rows[None, :], cast, mask=beside[:, None])
    tl.store(transposed_scales + slot.to(tl.int64) * I + column + columns, scale, mask=beside)


@launched
@jit
def _cast_weight_kernel(weight, values, scales, transposed, transposed_scales, O, I):  # noqa: E741
    row, column = tl.program_id(1) * 128, tl.program_id(0) * 128
    start = tl.program_id(2).to(tl.int64) * O * I
    rows, columns = tl.arange(0, 128), tl.arange(0, 128)
    tile = load_tile(weight + start, row, column, O, I, I)
    scale, inverse = power_of_two(tl.max(tl.max(magnitude(tile), 1), 0), 0x43E00000)  # 448
    cast = (tile.to(tl.float32) * inverse).to(tl.float8e4nv)
    below, beside = row + rows < O, column + columns < I
    corner = values + start + row.to(tl.int64) * I + column
    tl.store(corner + rows[:, None] * I + columns[None, :], cast, mask=below[:, None] & beside[None, :])
    corner = transposed + start + column.to(tl.int64) * O + row
    mask = beside[:, None] & below[None, :]
    tl.store(corner + columns[:, None] * O + rows[None, :], tl.trans(cast), mask=mask)
    blocks = tl.program_id(2).to(tl.int64) * tl.num_programs(0) * tl.num_programs(1)
    tl.store(scales + blocks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), scale)
    tl.store(transposed_scales + blocks + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@launched
@jit(varying=("groups",))
def _fp4_kernel(master, out, groups, per_row, N, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    row, column = group // per_row, group % per_row * 32
    columns = column[:, None] + tl.arange(0, 32)[None, :]
    inside = (group < groups)[:, None] & (columns < N)
    place = row[:, None] * N + columns
    x = tl.load(master + place, mask=inside, other=0.0)
    scale, inverse = power_of_two(tl.max(magnitude(x), 1), 0x40C00000)  # 6
    sized = tl.abs(x) * inverse[:, None]
    step = tl.where(sized < 2, 0.5, tl.where(sized < 4, 1.0, 2.0))
    per_step = tl.where(sized < 2, 2.0, tl.where(sized < 4, 1.0, 0.5))
    # Of two sums as near the larger fp32 number is even: adding and taking off 1.5 * 2^23 rounds to integers.
    rounded = (sized * per_step + 12582912.0) - 12582912.0
    value = rounded * step * scale[:, None]
    sign = x.to(tl.int32, bitcast=True) ^ magnitude(x)  # of zeros too
    value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
