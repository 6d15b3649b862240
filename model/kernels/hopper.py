"""Grouped products of FP8 numbers at the speed of Hopper, in Gluon, the lower level of Triton.

A program computes tiles of 128 x 256 in turn. One warp loads operands through the tensor memory accelerator,
STAGES tiles ahead; two groups of four warps multiply, each for 128 columns, in two halves of 64 rows: while
one scales and adds what its tensor cores summed up, the other's tensor cores work. What made it fast, beside
`model.kernels.grouped` (H100, V4-Flash's experts): tiles that two groups share, so that L2 is asked for less
(128 x 128 is bound by it); scales that are loaded a step ahead (without, 1.27x slower); outputs that leave
through shared memory while the next tile is computed, where a tile has few steps.

Needs a Triton with Gluon, and sizes that are multiples of 128 (`suits`).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from model.kernels.gpu import HOPPER, TILE, compute_capability, power_of_two_of, slots_of, tiles, triton

try:
    if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        raise ImportError("Gluon's loads have other names from there on")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:
    gluon = gl = None  # type: ignore[assignment]

STAGES = 3  # steps of operands in shared memory
GROUP = 4  # row tiles that share column tiles in L2
LOADER_REGISTERS, REGISTERS = 24, 240  # of a thread that loads, and of one that multiplies


def jit(kernel: Any = None, varying: tuple[str, ...] = ()) -> Any:
    """`gluon.jit`, or the function itself, as `model.kernels.gpu.jit` is of Triton's."""
    if kernel is None:
        return partial(jit, varying=varying)
    return kernel if gluon is None else gluon.jit(kernel, do_not_specialize=varying)


def suits(columns: int, inner: int, device: torch.device) -> bool:
    """Whether these kernels compute a product with so many columns on this device."""
    hopper = compute_capability(device) == HOPPER
    return gluon is not None and hopper and columns % TILE == 0 and inner % TILE == 0


def grouped(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor) -> None:
    """a [R, K] times b [E, O, K] transposed -> out [R, O]; scales [K / 128, R], [E, O / 128, K / 128]."""
    (rows, inner), columns = a.shape, b.shape[1]
    operands = descriptor(a, 64), a_scales, descriptor(b.flatten(0, 1), TILE), b_scales, offsets, out
    _launch(operands, slots_of(rows, len(offsets)), rows, columns, steps=inner // TILE)


def outer(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor) -> None:
    """a [O, P] times b [I, P] transposed, by groups -> out [E, O, I]; scales [P / 128, O], [P / 128, I]."""
    left, right, scales = descriptor(a, 64), descriptor(b, TILE), descriptor(b_scales, 1)
    operands = left, a_scales, right, scales, offsets, descriptor(out.flatten(0, 1), 64)
    _launch(operands, tiles(len(a)), len(a), len(b), outer=True)


def _launch(
    operands: tuple[Any, ...], row_tiles: int, rows: int, columns: int, steps: int = 0, outer: bool = False
) -> None:
    """`row_tiles` cover `rows`: those of all groups' output, or where `outer` of each group's."""
    offsets = operands[4]
    groups, blocks = len(offsets), -(-columns // (2 * TILE))
    count = row_tiles * blocks * (groups if outer else 1)
    processors = torch.cuda.get_device_properties(offsets.device).multi_processor_count
    _kernel[(min(count, processors),)](
        *operands, groups, count, row_tiles, blocks, rows, columns, steps, OUTER=outer, GROUP=GROUP,
        STAGES=STAGES, E=power_of_two_of(groups), LOADER=LOADER_REGISTERS, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip


KINDS = {torch.float8_e4m3fn: "float8e4nv", torch.bfloat16: "bfloat16", torch.float16: "float16"}
KINDS |= {torch.int16: "int16", torch.int32: "int32"}


def descriptor(x: Tensor, rows: int, columns: int = TILE) -> Any:
    """Of tiles of `rows` x `columns` of x [M, N]; what a tile has outside of x reads as zero."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns], _layout(rows, columns, x.dtype))


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, KINDS[dtype]))


@jit
def _kernel(
    a, a_scales, b, b_scales, offsets, out, groups, count, per_group, blocks, R, N, K_TILES,
    OUTER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, E: gl.constexpr, LOADER: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """`count` tiles of out; R rows and N columns of a group's output (of all groups', where not OUTER)."""
    x = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], a.layout)
    y = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 128, 128], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if OUTER:
        t = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 128], b_scales.layout)
        staged = gl.allocate_shared_memory(out.dtype, [4, 64, 128], out.layout)
    else:
        t = full  # not used
        staged = full
    work = (offsets, groups, count, per_group, blocks, K_TILES, N)
    shared = (x, y, t, full, empty)
    operands = (a_scales, b_scales, out, R, N)
    gl.warp_specialize(
        [
            (_multiply, (operands, work, shared, staged, 0, OUTER, GROUP, STAGES, E)),
            (_multiply, (operands, work, shared, staged, 1, OUTER, GROUP, STAGES, E)),
            (_load, (a, b, b_scales, work, shared, OUTER, GROUP, STAGES, E)),
        ],
        [4, 1],
        [REGISTERS, LOADER],
    )


@jit
def _load(
    a, b, b_scales, work, shared,
    OUTER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """The operands of every step of every tile of this program, as soon as there is room for them."""
    x, y, t, full, empty = shared
    groups = _groups(work, 1, E)
    done = 0
    for tile in range(gl.program_id(0), work[2], gl.num_programs(0)):
        _e, row, _end, column, b_row, first, steps = _tile(tile, work, groups, OUTER, GROUP)
        for k in range(first, first + steps):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, 3 * 128 * 128 + (2 * 128 * 4 if OUTER else 0))
            for half in gl.static_range(2):
                place = 2 * stage + half
                tma.async_copy_global_to_shared(a, [row + 64 * half, k * 128], arrived, x.index(place))
                tma.async_copy_global_to_shared(b, [b_row + 128 * half, k * 128], arrived, y.index(place))
                if OUTER:
                    scales = [k, column + 128 * half]
                    tma.async_copy_global_to_shared(b_scales, scales, arrived, t.index(place))
            done += 1


@jit
def _multiply(
    operands, work, shared, staged,
    SIDE: gl.constexpr, OUTER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Columns 128 * SIDE to 128 * SIDE + 127 of every tile of this program."""
    out = operands[2]
    x, y, t, full, empty = shared
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, wgmma))
    zero = gl.zeros((64, 128), gl.float32, wgmma)
    groups = _groups(work, 4, E)
    place = _tile(gl.program_id(0), work, groups, OUTER, GROUP)
    s_top, s_bottom, t_scale = _scales(operands, work, place, place[5], rows, SIDE, OUTER)
    done = 0
    for tile in range(gl.program_id(0), work[2], gl.num_programs(0)):
        e, row, end, column, _b_row, first, steps = place
        above = gl.zeros((64, 128), gl.float32, wgmma)
        below = gl.zeros((64, 128), gl.float32, wgmma)
        for k in range(first, first + steps):
            after = gl.minimum(k + 1, first + steps - 1)
            s_top_next, s_bottom_next, t_next = _scales(operands, work, place, after, rows, SIDE, OUTER)
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            if OUTER:
                scale = t.index(2 * stage + SIDE).load(wgmma)  # [1, 128]
            else:
                scale = t_scale
            other = y.index(2 * stage + SIDE).permute((1, 0))
            above += _scaled(_product(x.index(2 * stage), other, zero), s_top, scale, OUTER)
            part = _product(x.index(2 * stage + 1), other, zero)
            mbarrier.arrive(empty.index(stage), count=1)
            below += _scaled(part, s_bottom, scale, OUTER)
            s_top, s_bottom, t_scale = s_top_next, s_bottom_next, t_next
            done += 1
        place = _tile(gl.minimum(tile + gl.num_programs(0), work[2] - 1), work, groups, OUTER, GROUP)
        s_top, s_bottom, t_scale = _scales(operands, work, place, place[5], rows, SIDE, OUTER)
        column += SIDE * 128
        if OUTER:
            row += e * operands[3]
            tma.store_wait(pendings=0)
            staged.index(2 * SIDE).store(above.to(out.dtype))
            staged.index(2 * SIDE + 1).store(below.to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [row, column], staged.index(2 * SIDE))
            tma.async_copy_shared_to_global(out, [row + 64, column], staged.index(2 * SIDE + 1))
        else:
            _store(above, out, row, column, end, operands[4])
            _store(below, out, row + 64, column, end, operands[4])
    if OUTER:
        tma.store_wait(pendings=0)


@jit
def _scales(operands, work, place, k, rows, SIDE: gl.constexpr, OUTER: gl.constexpr):
    """Those of step k of a tile: of its upper and lower rows [64], and where it is one, of the columns."""
    a_scales, b_scales, _out, R, N = operands
    e, row, _end, column, _b_row, _first, _steps = place
    s_at = a_scales + gl.cast(k, gl.int64) * R
    if OUTER:
        t = 1.0
    else:
        block = gl.minimum(column + 128 * SIDE, N - 128) // 128
        t = gl.load(b_scales + (e * (N // 128) + block) * work[5] + k)
    top = gl.load(s_at + gl.minimum(row + rows, R - 1))
    return top, gl.load(s_at + gl.minimum(row + 64 + rows, R - 1)), t


@jit
def _groups(work, WARPS: gl.constexpr, E: gl.constexpr):
    """Every group's number, first and end row: [E] each."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    index = gl.arange(0, E, layout=layout)
    starts = gl.load(work[0] + index - 1, mask=(index > 0) & (index < work[1]), other=0)
    ends = gl.load(work[0] + index, mask=index < work[1], other=0)
    return index, starts, ends


@jit
def _tile(tile, work, groups, OUTER: gl.constexpr, GROUP: gl.constexpr):
    """Of the `tile`-th tile: its group, first row, end row of the group, first column, first row of b, and
    the first and the number of tiles to sum over."""
    _offsets, count, _count, per_group, blocks, k_tiles, columns = work
    index, starts, ends = groups
    within = tile % (per_group * blocks)
    first = within // (GROUP * blocks) * GROUP
    height = gl.minimum(per_group - first, GROUP)
    within = within % (GROUP * blocks)
    slot, column = first + within % height, within // height * 256
    if OUTER:
        e = tile // (per_group * blocks)
    else:
        e = gl.sum(((starts // 128 + index <= slot) & (index < count)).to(gl.int32), 0) - 1
    start = gl.sum(gl.where(index == e, starts, 0), 0)
    end = gl.sum(gl.where(index == e, ends, 0), 0)
    if OUTER:
        return e, slot * 128, end, column, column, start // 128 + e, gl.cdiv(end - start, 128)
    else:
        row = start + (slot - start // 128 - e) * 128
        return e, row, end, column, e * columns + column, 0, gl.where(row < end, k_tiles, 0)


@jit
def _product(x, y, zero):
    """[64, 128] sums over 128, in the precision of tensor cores."""
    part = warpgroup_mma(x, y, zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(num_outstanding=0, deps=[part])


@jit
def _scaled(part, s, t, OUTER: gl.constexpr):
    if OUTER:
        return part * s[:, None] * t
    else:
        return part * (s * t)[:, None]


@jit
def _store(acc, out, row, column, end, N):
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    place = out + gl.cast(row, gl.int64) * N + column + rows[:, None] * N + columns[None, :]
    values = gl.convert_layout(acc.to(out.dtype.element_ty), flat)
    gl.store(place, values, mask=(row + rows < end)[:, None] & (column + columns < N)[None, :])
