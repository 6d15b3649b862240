"""Casts to FP8 in the layouts in which products take their operands: summed over along the last axis.

    q = e4m3(x / s),    s = 2^ceil(log2(amax / 448)) of x's tile of 1 x 128 or block of 128 x 128

Tensor cores of Hopper read FP8 operands only along the axis that is summed over, so everything is written
twice, in one pass: as it is and transposed. What the kernels add to the references is memory layout:

    rows of a transposed activation begin at multiples of 128 bytes, filled up with zeros (NaN in NaN tiles)
    scales of activations lie column after column, as products read them

Legend: R rows (tokens), I input features, O output features, E groups (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gpu import TILE, jit, magnitude, power_of_two, runs_kernels, tiles, tl
from model.quant import FP4_BLOCK, FP8_BLOCK, FP8_TILE, Quantised, quantise_fp8, round_fp4

INPUTS = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels read
WARPS = 8  # of a program that casts a tile of 128 x 128
FP4_GROUPS = 128  # blocks of 1 x 32 that a program of 4 warps rounds


def cast_activation(x: Tensor) -> tuple[Quantised, Quantised]:
    """x [R, I] -> itself [R, I] and transposed [I, R], each in tiles of 1 x 128 of its own.

    The first is for products with weights, the second for the weights' gradient, which sums over rows.
    """
    if runs_kernels(x) and x.dtype in INPUTS:
        return activations(torch.ops.fourfold.cast_activation(x), len(x))
    return quantise_fp8(x), quantise_fp8(x.mT.contiguous())


def cast_weight(weight: Tensor) -> tuple[Quantised, Quantised]:
    """weight [..., O, I] -> itself and transposed [..., I, O], the same numbers in blocks of 128 x 128."""
    if runs_kernels(weight) and weight.dtype in INPUTS:
        values, scales, transposed, transposed_scales = torch.ops.fourfold.cast_weight(weight)
        return Quantised(values, scales, FP8_BLOCK), Quantised(transposed, transposed_scales, FP8_BLOCK)
    quantised = quantise_fp8(weight, FP8_BLOCK)
    return quantised, quantised.mT


def fp4_values(master: Tensor, dtype: torch.dtype) -> Tensor:
    """master fp32 [..., M, N] rounded to FP4, blocks of 1 x 32, in `dtype`: bf16 holds all but denormals."""
    if runs_kernels(master) and master.dtype == torch.float32:
        return torch.ops.fourfold.fp4_values(master, dtype)
    return round_fp4(master).to(dtype)


def activations(parts: tuple[Tensor, Tensor, Tensor, Tensor], rows: int) -> tuple[Quantised, Quantised]:
    """What `cast_activation` returns, from tensors as its kernel writes them (`empty_activations`)."""
    values, scales, transposed, transposed_scales = parts
    return (
        Quantised(values, scales.mT, FP8_TILE),
        Quantised(transposed[:, :rows], transposed_scales.mT, FP8_TILE),
    )


def empty_activations(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [R, I], scales [ceil(I / 128), R]; transposed, [I, R filled to 128s] and [ceil(R / 128), I]."""
    return (
        like.new_empty(rows, columns, dtype=torch.float8_e4m3fn),
        like.new_empty(tiles(columns), rows, dtype=torch.float32),
        like.new_empty(columns, tiles(rows) * TILE, dtype=torch.float8_e4m3fn),
        like.new_empty(tiles(rows), columns, dtype=torch.float32),
    )


@torch.library.custom_op("fourfold::cast_activation", mutates_args=())
def _cast_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    parts = empty_activations(x, rows, columns)
    if rows and columns:
        grid = (tiles(columns), tiles(rows))
        _cast_activation_kernel[grid](x.contiguous(), *parts, rows, columns, num_warps=WARPS)
    return parts


@_cast_activation.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_activations(x, *x.shape)


@torch.library.custom_op("fourfold::cast_weight", mutates_args=())
def _cast_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = _empty_weights(weight)
    if weight.numel():
        rows, columns = weight.shape[-2:]
        grid = (tiles(columns), tiles(rows), weight.numel() // (rows * columns))
        _cast_weight_kernel[grid](weight.contiguous(), *parts, rows, columns, num_warps=WARPS)
    return parts


@_cast_weight.register_fake
def _empty_weights(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [..., O, I], scales [..., ceil(O / 128), ceil(I / 128)], and both transposed."""
    *stack, rows, columns = weight.shape
    return (
        weight.new_empty(*stack, rows, columns, dtype=torch.float8_e4m3fn),
        weight.new_empty(*stack, tiles(rows), tiles(columns), dtype=torch.float32),
        weight.new_empty(*stack, columns, rows, dtype=torch.float8_e4m3fn),
        weight.new_empty(*stack, tiles(columns), tiles(rows), dtype=torch.float32),
    )


@torch.library.custom_op("fourfold::fp4_values", mutates_args=())
def _fp4_values(master: Tensor, dtype: torch.dtype) -> Tensor:
    out = _empty_fp4(master, dtype)
    if master.numel():
        columns = master.shape[-1]
        per_row = -(-columns // FP4_BLOCK[1])
        groups = master.numel() // columns * per_row
        grid = (-(-groups // FP4_GROUPS),)
        _fp4_kernel[grid](master.contiguous(), out, groups, per_row, columns, FP4_GROUPS, num_warps=4)
    return out


@_fp4_values.register_fake
def _empty_fp4(master: Tensor, dtype: torch.dtype) -> Tensor:
    return master.new_empty(master.shape, dtype=dtype)


@jit(varying=("R",))
def _cast_activation_kernel(x, values, scales, transposed, transposed_scales, R, I):  # noqa: E741
    row, column = tl.program_id(1) * 128, tl.program_id(0) * 128
    tile = load_tile(x, row, column, R, I, I)
    store_both_ways(tile, row, column, values, scales, transposed, transposed_scales, R, I)


@jit
def load_tile(x, row, column, R, limit, stride, COLUMNS: tl.constexpr = 128):
    """The 128 x COLUMNS numbers of x [R, `stride`] at (row, column); zeros below R and from `limit` on."""
    rows, columns = tl.arange(0, 128), tl.arange(0, COLUMNS)
    inside = (row + rows < R)[:, None] & (column + columns < limit)[None, :]
    corner = x + row.to(tl.int64) * stride + column
    return tl.load(corner + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def store_both_ways(tile, row, column, values, scales, transposed, transposed_scales, R, I):  # noqa: E741
    """Cast the 128 x 128 tile of an activation [R, I] at (row, column), along its rows and its columns.

    It holds zeros outside of the activation; those below R go into the rows' filling.
    """
    rows, columns = tl.arange(0, 128), tl.arange(0, 128)
    wide, bits = tile.to(tl.float32), magnitude(tile)
    below, beside = row + rows < R, column + columns < I

    scale, inverse = power_of_two(tl.max(bits, 1), 0x43E00000)  # 448
    corner = values + row.to(tl.int64) * I + column
    cast = (wide * inverse[:, None]).to(tl.float8e4nv)
    tl.store(corner + rows[:, None] * I + columns[None, :], cast, mask=below[:, None] & beside[None, :])
    tl.store(scales + (column // 128).to(tl.int64) * R + row + rows, scale, mask=below)

    scale, inverse = power_of_two(tl.max(bits, 0), 0x43E00000)
    stride = (R + 127) // 128 * 128
    corner = transposed + column.to(tl.int64) * stride + row
    cast = tl.trans((wide * inverse[None, :]).to(tl.float8e4nv))
    tl.store(corner + columns[:, None] * stride + rows[None, :], cast, mask=beside[:, None])
    tl.store(transposed_scales + (row // 128).to(tl.int64) * I + column + columns, scale, mask=beside)


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
