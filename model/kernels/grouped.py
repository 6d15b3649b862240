"""Grouped products of FP8 numbers in Triton: any size, any GPU that multiplies FP8.

A program computes a tile of 128 x 128 in two halves of 64 rows, so that two fit a multiprocessor: one's
tensor cores work while the other scales and adds. `model.kernels.hopper` does the same faster where it can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.gpu import TILE, group_of_slot, jit, power_of_two_of, slots_of, tiles, tl

ALIGNMENT = 16  # bytes at which rows begin for the tensor memory accelerator
STAGES, GROUP = 3, 8  # tiles of operands in flight; row tiles that share column tiles in L2


def grouped(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor) -> None:
    """a [R, K] times b [E, O, K] transposed -> out [R, O]; scales [K / 128, R], [E, O / 128, K / 128]."""
    (rows, inner), (groups, columns) = a.shape, b.shape[:2]
    grid = (slots_of(rows, groups) * tiles(columns),)
    operands = _descriptor(a, 64), a_scales, _descriptor(b.flatten(0, 1), TILE), b_scales
    _launch(grid, operands, offsets, out, rows, columns, inner, groups, outer=False)


def outer(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor) -> None:
    """a [O, P] times b [I, P] transposed, by groups -> out [E, O, I]; scales [P / 128, O], [P / 128, I]."""
    groups, rows, columns = len(offsets), len(a), len(b)
    grid = (tiles(rows) * tiles(columns), groups)
    operands = _descriptor(a, 64), a_scales, _descriptor(b, TILE), b_scales
    _launch(grid, operands, offsets, out, rows, columns, 0, groups, outer=True)


def _launch(
    grid: tuple[int, ...], operands: tuple, offsets: Tensor, out: Tensor, rows: int, columns: int, inner: int,
    groups: int, outer: bool,
) -> None:  # fmt: skip
    _kernel[grid](
        *operands, offsets, out, rows, columns, inner, groups,
        OUTER=outer, E=power_of_two_of(groups), GROUP=GROUP, STAGES=STAGES, num_warps=4,
    )  # fmt: skip


def aligned(values: Tensor) -> Tensor:
    """values [..., K], copied unless rows begin at multiples of 16 bytes: the casts' do where K is one."""
    flat = values.flatten(0, -2)
    if flat.stride(1) == 1 and flat.stride(0) % ALIGNMENT == 0 and flat.data_ptr() % ALIGNMENT == 0:
        return values
    size = values.shape[-1]
    padded = F.pad(values.view(torch.uint8), (0, -size % ALIGNMENT)).contiguous()
    return padded.view(values.dtype)[..., :size]


def _descriptor(values: Tensor, rows: int):
    """Of tiles of `rows` x 128 of values [M, K]; what a tile has outside of values reads as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(values, list(values.shape), list(values.stride()), [rows, TILE])


@jit(varying=("R", "groups"))
def _kernel(
    a, a_scales, b, b_scales, offsets, out, R, N, K, groups,
    OUTER: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """R rows and N columns of a group's output (of all groups' where not OUTER). Rows and columns outside are
    computed twice, not masked."""
    blocks = tl.cdiv(N, 128)
    if OUTER:
        e = tl.program_id(1)
        slot, block = _swizzled(tl.program_id(0), tl.cdiv(R, 128), blocks, GROUP)
        start = tl.load(offsets + e - 1, mask=e > 0, other=0)
        first, steps = start // 128 + e, tl.cdiv(tl.load(offsets + e) - start, 128)
        row, end, b_row = slot * 128, R, block * 128
        out += e.to(tl.int64) * R * N
    else:
        slot, block = _swizzled(tl.program_id(0), R // 128 + groups, blocks, GROUP)
        e, row, end = group_of_slot(offsets, slot, groups, E)
        first, steps, b_row = 0, tl.cdiv(K, 128), e * N + block * 128
    if row >= end:
        return
    column = block * 128
    top = tl.minimum(row + tl.arange(0, 64), end - 1)
    bottom = tl.minimum(row + 64 + tl.arange(0, 64), end - 1)
    columns = tl.minimum(column + tl.arange(0, 128), N - 1)
    above = tl.zeros((64, 128), tl.float32)
    below = tl.zeros((64, 128), tl.float32)
    for k in tl.range(first, first + steps, num_stages=STAGES):
        s_at = a_scales + tl.cast(k, tl.int64) * R
        s_top = tl.load(s_at + top)
        s_bottom = tl.load(s_at + bottom)
        if OUTER:
            t = tl.load(b_scales + tl.cast(k, tl.int64) * N + columns)[None, :]
        else:
            t = tl.load(b_scales + (e * blocks + block) * steps + k)
        y = tl.trans(b.load([b_row, k * 128]))
        above += tl.dot(a.load([row, k * 128]), y) * s_top[:, None] * t
        below += tl.dot(a.load([row + 64, k * 128]), y) * s_bottom[:, None] * t
    _store(above, out, row, column, end, N)
    _store(below, out, row + 64, column, end, N)


@jit
def _swizzled(index, rows, columns, GROUP: tl.constexpr):
    """The `index`-th of rows x columns tiles: GROUP rows at a time, so that L2 holds their operands."""
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = index % (GROUP * columns)
    return first + within % height, within // height


@jit
def _store(acc, out, row, column, end, N):
    rows, columns = tl.arange(0, 64), tl.arange(0, 128)
    place = out + row.to(tl.int64) * N + column + rows[:, None] * N + columns[None, :]
    inside = (row + rows < end)[:, None] & (column + columns < N)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
