"""Products of FP8 numbers, added up in fp32: one matrix, or a matrix for every group of rows.

    y_ro = sum_c  s_rc t_oc  sum_{k in tile c} a_rk b_ok        c: tiles of 128 along what is summed over

Each operand has the axis that is summed over last, with the scales of `model.kernels.cast`. Tensor cores
sum over a tile with about 14 bits; sums of tiles, times their scales, are fp32. One product is cuBLAS's
where its demands hold, which for what the casts return are

    tiles of 1 x 128 for a; for b either those, or blocks of 128 x 128 of a matrix of 128s of rows
    128s of what is summed over, 16s of rows and of columns, an output in bf16 or fp16

and otherwise, like every grouped product, that of a kernel of ours: `model.kernels.hopper` where sizes are
128s, else `model.kernels.grouped`. Elsewhere than on Hopper and newer the same numbers are multiplied in the
output's dtype, in which FP8 numbers are exact.

Legend: R rows sorted by group, E groups (experts), K what is summed over, O and I output features, P rows of
groups that each begin a tile of 128 (`model.kernels.cast`).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import grouped, hopper
from model.kernels.cast import ends_in_tiles
from model.kernels.gpu import HOPPER, TILE, compute_capability, operator, runs_kernels
from model.linear import grouped_linear
from model.quant import FP8_BLOCK, FP8_TILE, Quantised, dequantise

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels write


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [O, K] transposed -> [M, O]."""
    if not _runs(a, dtype):
        return F.linear(dequantise(a, dtype), dequantise(b, dtype))
    tiled = b.block == FP8_TILE
    return torch.ops.fourfold.product(a.values, a.scales, b.values, b.scales, tiled, dtype)


def grouped_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of group e of a [R, K] times b[e] transposed, b [E, O, K] -> [R, O].

    `offsets` [E] int32: the end row of each group, the last of which is R.
    """
    if _runs(a, dtype):
        return torch.ops.fourfold.grouped_product(a.values, a.scales, b.values, b.scales, offsets, dtype)
    return grouped_linear(dequantise(a, dtype), dequantise(b, dtype), offsets)


def grouped_outer_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """a [O, P] times b [I, P] transposed over the rows of each group -> [E, O, I]; zeros of an empty group.

    a and b are what `cast_activation` returns second for rows with these offsets.
    """
    if _runs(a, dtype):
        operands = a.values, a.scales, b.values, b.scales
        return torch.ops.fourfold.grouped_outer_product(*operands, offsets, dtype)
    if not a.values.shape[-1]:
        return a.scales.new_zeros(len(offsets), len(a.values), len(b.values), dtype=dtype)
    packed, ends = torch.contiguous_format, ends_in_tiles(offsets)  # `contiguous()` leaves a row strides of 1
    rows = [dequantise(x, dtype).mT.clone(memory_format=packed) for x in (a, b)]  # [P, O], [P, I]
    if dtype == torch.float64:  # torch has no grouped product in fp64
        parts = zip(*(x.tensor_split(ends.tolist())[:-1] for x in rows))
        return torch.stack([own.mT @ other for own, other in parts])
    return F.grouped_mm(rows[0].mT, rows[1], offs=ends)


def _runs(a: Quantised, dtype: torch.dtype) -> bool:
    return runs_kernels(a.values) and dtype in OUTPUTS and a.block == FP8_TILE


def _library_takes(a: Quantised, b: Quantised, dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies these; see the module's docstring."""
    (rows, inner), columns = a.values.shape, len(b.values)
    every = TILE if b.block == FP8_BLOCK else 16
    fits = rows % 16 == 0 and inner % TILE == 0 and columns % every == 0 and rows * inner * columns > 0
    return fits and dtype != torch.float32 and _library_has_scales(a.values.device)


@cache
def _library_has_scales(device: torch.device) -> bool:
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return compute_capability(device) == HOPPER and version >= (12, 9)


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


@operator("product")
def _product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, tiled: bool, dtype: torch.dtype
) -> Tensor:
    """b in tiles of 1 x 128, or in blocks of 128 x 128."""
    left, right = Quantised(a, a_scales, FP8_TILE), Quantised(b, b_scales, FP8_TILE if tiled else FP8_BLOCK)
    if _library_takes(left, right, dtype):
        return _library_product(left, right, dtype)
    everything = torch.full((1,), a.shape[1] if tiled else len(a), dtype=torch.int32, device=a.device)
    if tiled:
        return _grouped_outer_product(a, a_scales, b, b_scales, everything, dtype).squeeze(0)
    return _grouped_product(a, a_scales, b.unsqueeze(0), b_scales.unsqueeze(0), everything, dtype)


@torch.library.register_fake("fourfold::product")
def _empty_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, tiled: bool, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(len(a), len(b), dtype=dtype)


@operator("grouped_product")
def _grouped_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    out = _empty_grouped(a, a_scales, b, b_scales, offsets, dtype)
    if not (out.numel() and a.numel()):
        return out.zero_()
    operands = grouped.aligned(a), _by_columns(a_scales), grouped.aligned(b), b_scales.contiguous()
    if not a.is_meta:
        kernels = hopper if hopper.suits(b.shape[1], a.shape[1], a.device) else grouped
        kernels.grouped(*operands, offsets, out)
    return out


@torch.library.register_fake("fourfold::grouped_product")
def _empty_grouped(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@operator("grouped_outer_product")
def _grouped_outer_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    out = _empty_outer(a, a_scales, b, b_scales, offsets, dtype)
    if not (out.numel() and a.numel()):
        return out.zero_()
    operands = grouped.aligned(a), _by_columns(a_scales), grouped.aligned(b), _by_columns(b_scales)
    if not a.is_meta:
        fast = hopper.suits(len(b), len(a), a.device) and dtype != torch.float32  # shared memory is full
        (hopper if fast else grouped).outer(*operands, offsets, out)
    return out


@torch.library.register_fake("fourfold::grouped_outer_product")
def _empty_outer(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[0], dtype=dtype)
