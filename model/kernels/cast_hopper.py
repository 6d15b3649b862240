"""The casts of activations, with and without SwiGLU, for Hopper: the same FP8 in less time, in Gluon.

A program casts tiles of 128 x 128 in turn, in three parts that overlap:

    `_load`       one warp: inputs through the tensor memory accelerator, STAGES times ROWS rows ahead
    `_rows`       WARPS warps: what is to be cast, its cast along rows, itself into shared memory
    `_columns`    COLUMN_WARPS warps: from there, its cast along columns, out through the accelerator

All three take numbers in pairs, two bf16 in 32 bits: extrema and scaling by powers of two, which is exact,
are one instruction for both. No column's largest number is looked for beyond a warp. KIND, the number of
inputs, says what is cast: an activation (1), SwiGLU of gates and ups (2), its gradient by both with dh (3). d
weights alone are added up in another order than by the kernel in `model.kernels.swiglu`.

Needs a Triton with Gluon, bf16, and widths that are multiples of 128 (`suits`).

Legend: R rows (tokens), W width of what is cast; of SwiGLU, the experts'.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.kernels import gpu
from model.kernels.gpu import HOPPER, TILE, compute_capability, power_of_two_of, tiles
from model.kernels.hopper import descriptor, gl, gluon, jit

if gluon is not None:
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

    constexpr_function = gluon.constexpr_function
    power_of_two = gluon.jit(gpu.power_of_two.fn)
else:
    constexpr_function = jit

CAST, SWIGLU, BACKWARD = 1, 2, 3  # KIND
SETTINGS = {CAST: (8, 32, 4), SWIGLU: (16, 64, 3), BACKWARD: (16, 64, 2)}  # WARPS, ROWS, STAGES
COLUMN_WARPS = 8
LOADER_REGISTERS, COLUMN_REGISTERS = 24, 96  # of a thread; those of the rows share the others


def suits(*inputs: Tensor, limit: float = 0.0) -> bool:
    """Whether this kernel casts these inputs on their device. SwiGLU's limit has to be a bf16."""
    hopper = gluon is not None and compute_capability(inputs[0].device) == HOPPER
    return hopper and _is_bf16(limit) and all(_suits(x) for x in inputs)


def _suits(x: Tensor) -> bool:
    whole = x.stride() == (x.shape[1], 1) and x.shape[1] % TILE == 0
    return x.dtype == torch.bfloat16 and whole and x.data_ptr() % 16 == 0


@cache
def _is_bf16(number: float) -> bool:
    return float(torch.tensor(number, dtype=torch.bfloat16)) == number


def cast_activation(x: Tensor, offsets: Tensor | None, *parts: Tensor) -> None:
    """`parts`: those of `model.kernels.cast.empty_activations`, written."""
    _launch(CAST, x, x, parts[1], offsets, 0.0, (*parts, parts[1]))


def swiglu(gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float, *parts: Tensor) -> None:
    """Likewise, of `model.kernels.swiglu.cast_swiglu`."""
    _launch(SWIGLU, gate_up, gate_up, weights, offsets, limit, (*parts, parts[1]))


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float, *parts: Tensor
) -> None:
    """Likewise, with the parts of d weights."""
    _launch(BACKWARD, gate_up, grad, weights, offsets, limit, parts)


def _launch(
    kind: int, x: Tensor, grad: Tensor, weights: Tensor, offsets: Tensor | None, limit: float,
    parts: tuple[Tensor, ...],
) -> None:  # fmt: skip
    values, scales, transposed, transposed_scales, sums = parts
    rows, slots = len(x), len(transposed_scales)
    width = values.shape[1] // (2 if kind == BACKWARD else 1)
    groups = 0 if offsets is None else len(offsets)
    ends = scales if offsets is None else offsets  # not read without groups
    count = slots * tiles(width)
    warps, together, stages = SETTINGS[kind]
    inputs = _pairs(x, together)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    _kernel[(min(count, processors),)](
        inputs, inputs if grad is x else _pairs(grad, together), weights, ends, values.view(torch.int16),
        scales, descriptor(transposed.view(torch.int16), TILE, 64), transposed_scales, sums, rows, width,
        limit, groups, slots, count,
        KIND=kind, E=power_of_two_of(groups) if groups else 0, ROWS=together, STAGES=stages, WARPS=warps,
        COLUMN_WARPS=COLUMN_WARPS, COLUMN=COLUMN_REGISTERS, LOADER=LOADER_REGISTERS, num_warps=warps,
    )  # fmt: skip


def _pairs(x: Tensor, rows: int) -> Any:
    return descriptor(x.view(torch.int32), rows, TILE // 2)


@jit(varying=("R", "groups", "slots", "count"))
def _kernel(
    x, grad, weights, offsets, values, scales, transposed, transposed_scales, sums, R, W, limit, groups,
    slots, count,
    KIND: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    COLUMN_WARPS: gl.constexpr, COLUMN: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    SIDES: gl.constexpr = 2 if KIND == 3 else 1  # gates and ups
    inputs = gl.allocate_shared_memory(gl.int32, [KIND * STAGES, ROWS, 64], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 8, 4, [1, 0])  # for `_down`
    staged = gl.allocate_shared_memory(gl.int32, [SIDES * (128 // ROWS), ROWS, 64], swizzled)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [SIDES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    for i in gl.static_range(SIDES):
        mbarrier.init(freed.index(i), count=1)
    turned = gl.allocate_shared_memory(gl.int16, [2, 128, 64], transposed.layout)
    fence_async_shared()
    work = (offsets, groups, slots, count, R, W)
    shared = (inputs, full, empty)
    between = (staged, ready, freed)
    outputs = (values, scales, sums)
    gl.warp_specialize(
        [
            (_rows, (weights, limit, work, shared, between, outputs, KIND, ROWS, STAGES, WARPS, E)),
            (_columns, (work, between, turned, transposed, transposed_scales, SIDES, COLUMN_WARPS, E)),
            (_load, (x, grad, work, shared, KIND, ROWS, STAGES, E)),
        ],
        [COLUMN_WARPS, 1],
        [COLUMN, LOADER],
    )


@jit
def _load(
    x, grad, work, shared, KIND: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, E: gl.constexpr
):
    """The inputs of the tiles of this program, as soon as there is room for them."""
    inputs, full, empty = shared
    half = work[5] // 2
    groups = _groups(work, 1, E)
    done = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        _slot, row, end, column = _tile(tile, work, groups, E)
        if row < end:
            for at in range(row, row + 128, ROWS):
                stage = done % STAGES
                mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
                arrived = full.index(stage)
                mbarrier.expect(arrived, KIND * ROWS * 128 * 2)
                tma.async_copy_global_to_shared(x, [at, column // 2], arrived, inputs.index(KIND * stage))
                if KIND > 1:
                    up = inputs.index(KIND * stage + 1)
                    tma.async_copy_global_to_shared(x, [at, half + column // 2], arrived, up)
                if KIND > 2:
                    dh = inputs.index(KIND * stage + 2)
                    tma.async_copy_global_to_shared(grad, [at, column // 2], arrived, dh)
                done += 1


@jit
def _rows(
    weights, limit, work, shared, between, outputs,
    KIND: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """What is cast, of every tile of this program: cast along rows, and kept for `_columns`."""
    inputs, full, empty = shared
    staged, ready, freed = between
    values, scales, sums = outputs
    R, W = work[4], work[5]
    across: gl.constexpr = _across(ROWS, WARPS)
    PARTS: gl.constexpr = 128 // ROWS
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, across))
    highest = limit.to(gl.int32, bitcast=True)
    highest = (highest >> 16) | (highest & -65536)  # as a pair
    groups = _groups(work, WARPS, E)
    done = 0
    turn = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        _slot, row, end, column = _tile(tile, work, groups, E)
        if row < end:
            for part in range(PARTS):
                at = row + ROWS * part + rows
                inside = at < end
                kept = gl.where(inside, -1, 0)[:, None]  # zeros outside of the group
                if KIND > 1:
                    weight = gl.load(weights + at, mask=inside, other=0.0).to(gl.float32)[:, None]
                stage = done % STAGES
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                first = inputs.index(KIND * stage).load(across)
                if KIND > 1:
                    up = inputs.index(KIND * stage + 1).load(across)
                if KIND > 2:
                    dh = inputs.index(KIND * stage + 2).load(across)
                mbarrier.arrive(empty.index(stage), count=1)
                done += 1
                if KIND == 1:
                    first = first & kept
                elif KIND == 2:
                    first = _hidden(first, up, weight, highest) & kept
                else:
                    first, up, sum = _gradients(first, up, dh, weight, highest)
                    first, up = first & kept, up & kept
                    gl.store(sums + (column // 128).to(gl.int64) * R + at, sum, mask=inside)
                if part == 0:
                    mbarrier.wait(freed.index(0), (turn & 1) ^ 1)
                staged.index(part).store(first)
                _store_rows(first, at, inside, column, values, scales, R, W if KIND < 3 else 2 * W)
                if KIND > 2:
                    if part == 0:
                        mbarrier.wait(freed.index(1), (turn & 1) ^ 1)
                    staged.index(PARTS + part).store(up)
                    _store_rows(up, at, inside, column + W, values, scales, R, 2 * W)
            mbarrier.arrive(ready.index(0), count=1)
            turn += 1


@jit
def _hidden(gate, up, weight, highest):
    """Pairs of w * silu(g') * u' (`model.kernels.swiglu`)."""
    gate, up = _clamped(gate, up, highest)
    low = _low(gate) * _sigmoid(_low(gate)) * _low(up) * weight
    high = _high(gate) * _sigmoid(_high(gate)) * _high(up) * weight
    return _pair(low, high)


@jit
def _gradients(gate, up, dh, weight, highest):
    """Pairs of dg and of du, and the sum of dw along rows."""
    of_gates, of_ups = _passed(gate, up, highest)
    gate, up = _clamped(gate, up, highest)
    low_gate, low_up, low = _gradient(_low(gate), _low(up), _low(dh), weight)
    high_gate, high_up, high = _gradient(_high(gate), _high(up), _high(dh), weight)
    return _pair(low_gate, high_gate) & of_gates, _pair(low_up, high_up) & of_ups, gl.sum(low + high, 1)


@jit
def _gradient(gate, up, dh, weight):
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    of_weight = dh * silu * up
    dh = dh * weight
    return dh * up * (sigmoid + silu * (1.0 - sigmoid)), dh * silu, of_weight


@jit
def _sigmoid(x):
    """The instructions of `model.kernels.swiglu._sigmoid`, fewer of them: 1 / (1 + 2^(-x / ln 2))."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _clamped(gate, up, highest):
    """Pairs of min(gate, limit) and of clip(up, -limit, limit); NaN stays."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; neg.bf16x2 t, $4; min.NaN.bf16x2 $0, $2, $4; max.NaN.bf16x2 t, $3, t;"
        " min.NaN.bf16x2 $1, t, $4; }",
        "=&r,=r,r,r,r", [gate, up, highest], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _passed(gate, up, highest):
    """Pairs of 16 bits set where gate <= limit, and where |up| <= limit: what has a gradient."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; set.le.u32.bf16x2 $0, $2, $4; abs.bf16x2 t, $3; set.le.u32.bf16x2 $1, t, $4; }",
        "=&r,=r,r,r,r", [gate, up, highest], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _low(pair):
    return (pair << 16).to(gl.float32, bitcast=True)


@jit
def _high(pair):
    return (pair & -65536).to(gl.float32, bitcast=True)


@jit
def _pair(low, high):
    """Two fp32 rounded to bf16."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@jit
def _largest(pairs, axis: gl.constexpr):
    """The largest bits of |x| of pairs: as integers they are in the order of the numbers, NaN on top."""
    return gl.reduce(pairs & 0x7FFF7FFF, axis, _larger)


@jit
def _larger(x, y):
    return gl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1
    )


@jit
def _store_rows(pairs, at, inside, column, values, scales, R, W):
    """Cast ROWS x 64 pairs along rows, as `model.kernels.cast.store_both_ways` does."""
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, pairs.type.layout))
    amax = _largest(pairs, 1)
    scale, inverse = power_of_two(gl.maximum(amax << 16, amax & -65536), 0x43E00000)  # 448
    inverse = inverse.to(gl.int32, bitcast=True)
    inverse = (inverse >> 16) | inverse  # the lower 16 bits of powers of two and of this NaN are zeros
    cast = gl.inline_asm_elementwise(
        "{ .reg .b32 s, l, h; mul.bf16x2 s, $1, $2; shl.b32 l, s, 16; and.b32 h, s, 0xFFFF0000;"
        " cvt.rn.satfinite.e4m3x2.f32 $0, h, l; }",
        "=h,r,r", [pairs, inverse[:, None]], dtype=gl.int16, is_pure=True, pack=1,
    )  # fmt: skip
    place = values + at.to(gl.int64)[:, None] * (W // 2) + (column // 2 + columns)[None, :]
    gl.store(place, cast, mask=inside[:, None])
    gl.store(scales + (column // 128).to(gl.int64) * R + at, scale, mask=inside)


@jit
def _columns(
    work, between, turned, transposed, transposed_scales,
    SIDES: gl.constexpr, WARPS: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """What `_rows` kept, cast along columns and transposed."""
    staged, ready, freed = between
    W = work[5]
    down: gl.constexpr = _down(WARPS)
    whole = staged._reinterpret(gl.int32, [SIDES, 128, 64], staged.layout)
    groups = _groups(work, WARPS, E)
    turn = 0
    done = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        slot, row, end, column = _tile(tile, work, groups, E)
        if row < end:
            mbarrier.wait(ready.index(0), turn & 1)
            for side in range(SIDES):
                pairs = whole.index(side).load(down)
                mbarrier.arrive(freed.index(side), count=1)
                cast = _cast_columns(pairs, slot, column + side * W, transposed_scales, SIDES * W)
                tma.store_wait(pendings=1)
                out = turned.index(done % 2)
                out.store(cast)
                fence_async_shared()
                tma.async_copy_shared_to_global(transposed, [column + side * W, slot * 64], out)
                done += 1
            turn += 1
    tma.store_wait(pendings=0)


@jit
def _cast_columns(pairs, slot, column, transposed_scales, W):
    """128 x 64 pairs -> transposed [128, 64], two FP8 of a column in 16 bits. Stores the columns' scales."""
    amax = _largest(pairs, 0)
    low, low_inverse = power_of_two(amax << 16, 0x43E00000)
    high, high_inverse = power_of_two(amax & -65536, 0x43E00000)
    columns = gl.arange(0, 64, layout=amax.type.layout)
    place = transposed_scales + slot.to(gl.int64) * W + column + 2 * columns
    gl.store(place, low)
    gl.store(place + 1, high)
    inverse = (low_inverse.to(gl.int32, bitcast=True) >> 16) | high_inverse.to(gl.int32, bitcast=True)
    even, odd = pairs.reshape([64, 2, 64]).permute((0, 2, 1)).split()  # rows
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b32 s, t, ls, lt; mul.bf16x2 s, $2, $4; mul.bf16x2 t, $3, $4;"
        " shl.b32 ls, s, 16; shl.b32 lt, t, 16; and.b32 s, s, 0xFFFF0000; and.b32 t, t, 0xFFFF0000;"
        " cvt.rn.satfinite.e4m3x2.f32 $0, lt, ls; cvt.rn.satfinite.e4m3x2.f32 $1, t, s; }",
        "=&h,=h,r,r,r", [even, odd, gl.convert_layout(inverse[None, :], even.type.layout)],
        dtype=(gl.int16, gl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(low, high).permute((1, 2, 0)).reshape([128, 64])


@constexpr_function
def _across(rows, warps):
    """Of [rows, 64] pairs: a thread holds 4 pairs, 8 columns, side by side, and of both halves of a row."""
    bits = [[1 << i, 0] for i in range(2, rows.bit_length() - 1)]
    split = warps.bit_length() - 1
    registers = [[0, 1], [0, 2], [0, 32], *bits[split:]]
    lanes = [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, bits[:split], [], [rows, 64])


@constexpr_function
def _down(warps):
    """Of [128, 64] pairs: a warp holds whole columns, a thread 8 rows side by side of each."""
    rest = [[0, 4], [0, 8], [0, 32]]
    bits = warps.bit_length() - 1
    registers = [[1, 0], [2, 0], [4, 0], [32, 0], [64, 0], *rest[bits:]]
    lanes = [[8, 0], [16, 0], [0, 1], [0, 2], [0, 16]]
    return gl.DistributedLinearLayout(registers, lanes, rest[:bits], [], [128, 64])


@jit
def _groups(work, WARPS: gl.constexpr, E: gl.constexpr):
    """Every group's number, first and end row, in each warp: [E] each. Without groups (E = 0), all rows."""
    if E == 0:
        return 0, 0, work[4]
    else:
        layout: gl.constexpr = gl.BlockedLayout([E // 32], [32], [WARPS], [0])
        index = gl.arange(0, E, layout=layout)
        starts = gl.load(work[0] + index - 1, mask=(index > 0) & (index < work[1]), other=0)
        ends = gl.load(work[0] + index, mask=index < work[1], other=0)
        return index, starts, ends


@jit
def _tile(tile, work, groups, E: gl.constexpr):
    """Of the `tile`-th tile: its slot, first row, end row of its group, and first column."""
    _offsets, count, _slots, _count, _R, W = work
    blocks = W // 128
    slot, column = tile // blocks, tile % blocks * 128
    index, starts, ends = groups
    if E == 0:
        return slot, slot * 128, ends, column
    else:
        e = gl.sum(((starts // 128 + index <= slot) & (index < count)).to(gl.int32), 0) - 1
        start = gl.sum(gl.where(index == e, starts, 0), 0)
        end = gl.sum(gl.where(index == e, ends, 0), 0)
        return slot, start + (slot - start // 128 - e) * 128, end, column
