"""The backward of `model.kernels.swiglu` for Hopper, the same bits in less time: in Gluon.

A program casts tiles of 128 x 128 of the gates' gradient and of the ups' in turn. One warp loads gates, ups
and dh through the tensor memory accelerator, STAGES halves of 64 rows ahead; WARPS warps compute both
gradients of a half, cast them along rows, and keep them in shared memory, from where they are cast along
columns once both halves are there. Loads, arithmetic and stores overlap.

Needs a Triton with Gluon, bf16, and a width that is a multiple of 128 (`suits`).

Legend: R rows (tokens), W expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import gpu
from model.kernels.gpu import HOPPER, TILE, compute_capability, power_of_two_of, tiles
from model.kernels.hopper import descriptor, gl, gluon, jit

if gluon is not None:
    import triton.language as tl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

    constexpr_function = gluon.constexpr_function
    power_of_two = gluon.jit(gpu.power_of_two.fn)
else:
    constexpr_function = jit

STAGES = 3  # halves of tiles of gates, ups and dh in shared memory
WARPS = 16  # that compute
LOADER_REGISTERS = 24  # of a thread that loads; those that compute share the others


def suits(grad: Tensor, gate_up: Tensor) -> bool:
    """Whether this kernel computes the backward of these tensors on their device."""
    hopper = compute_capability(grad.device) == HOPPER
    bf16 = grad.dtype == gate_up.dtype == torch.bfloat16
    aligned = grad.data_ptr() % 16 == 0 and gate_up.data_ptr() % 16 == 0
    return gluon is not None and hopper and bf16 and aligned and grad.shape[1] % TILE == 0


def backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float,
    values: Tensor, scales: Tensor, transposed: Tensor, transposed_scales: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """The outputs of `model.kernels.swiglu._empty_backward`, written."""
    (rows, width), slots = grad.shape, len(transposed_scales)
    groups = 0 if offsets is None else len(offsets)
    ends = weights if offsets is None else offsets  # not read without groups
    count = slots * tiles(width)
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count
    _kernel[(min(count, processors),)](
        descriptor(gate_up, 64), descriptor(grad, 64), weights, ends, values, scales, transposed,
        transposed_scales, sums, rows, width, limit, groups, slots, count,
        E=power_of_two_of(groups) if groups else 0,
        STAGES=STAGES, WARPS=WARPS, LOADER=LOADER_REGISTERS, num_warps=WARPS,
    )  # fmt: skip


@jit(varying=("R", "groups", "slots", "count"))
def _kernel(
    gate_up, grad, weights, offsets, values, scales, transposed, transposed_scales, sums, R, W, limit, groups,
    slots, count,
    E: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    inputs = gl.allocate_shared_memory(gl.bfloat16, [3 * STAGES, 64, 128], grad.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    staged = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 128], plain)
    work = (offsets, groups, slots, count, R, W)
    shared = (inputs, full, empty)
    outputs = (values, scales, transposed, transposed_scales, sums)
    gl.warp_specialize(
        [
            (_compute, (weights, limit, work, shared, staged, outputs, STAGES, WARPS, E)),
            (_load, (gate_up, grad, work, shared, STAGES, E)),
        ],
        [1],
        [LOADER],
    )


@jit
def _load(gate_up, grad, work, shared, STAGES: gl.constexpr, E: gl.constexpr):
    """The halves of the tiles of this program, as soon as there is room for them."""
    inputs, full, empty = shared
    width = work[5]
    groups = _groups(work, 1, E)
    done = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        _slot, row, end, column = _tile(tile, work, groups, E)
        if row < end:
            for half in range(2):
                stage = done % STAGES
                mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
                arrived = full.index(stage)
                mbarrier.expect(arrived, 3 * 64 * 128 * 2)
                at = row + 64 * half
                gate, up, dh = 3 * stage, 3 * stage + 1, 3 * stage + 2
                tma.async_copy_global_to_shared(gate_up, [at, column], arrived, inputs.index(gate))
                tma.async_copy_global_to_shared(gate_up, [at, column + width], arrived, inputs.index(up))
                tma.async_copy_global_to_shared(grad, [at, column], arrived, inputs.index(dh))
                done += 1


@jit
def _compute(
    weights, limit, work, shared, staged, outputs,
    STAGES: gl.constexpr, WARPS: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Both gradients of every tile of this program, and the parts of d weights."""
    inputs, full, empty = shared
    values, scales, transposed, transposed_scales, sums = outputs
    R, W = work[4], work[5]
    across: gl.constexpr = _across(WARPS)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, across))
    halves = staged._reinterpret(gl.bfloat16, [4, 64, 128], staged.layout)
    groups = _groups(work, WARPS, E)
    done = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        slot, row, end, column = _tile(tile, work, groups, E)
        if row < end:
            for half in range(2):
                first = row + 64 * half
                inside = first + rows < end
                weight = gl.load(weights + first + rows, mask=inside, other=0.0).to(gl.float32)
                stage = done % STAGES
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                gate = inputs.index(3 * stage).load(across)
                up = inputs.index(3 * stage + 1).load(across)
                dh = inputs.index(3 * stage + 2).load(across)
                mbarrier.arrive(empty.index(stage), count=1)
                done += 1
                of_gates, of_ups, part = _gradients(gate, up, dh, weight, inside, limit)
                gl.store(sums + (column // 128).to(gl.int64) * R + first + rows, part, mask=inside)
                halves.index(half).store(of_gates)
                halves.index(2 + half).store(of_ups)
                _store_rows(of_gates, first, rows, inside, column, values, scales, R, W)
                _store_rows(of_ups, first, rows, inside, column + W, values, scales, R, W)
            for side in range(2):
                at = column + side * W
                _store_columns(staged.index(side), slot, at, transposed, transposed_scales, work, WARPS)


@jit
def _gradients(gate, up, dh, weight, inside, limit):
    """`model.kernels.swiglu._gradients` of 64 x 128 numbers, zeros outside of the group."""
    gate, up, dh = _wide(gate), _wide(up), _wide(dh)
    x = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    clipped = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    clipped = gl.minimum(clipped, limit, propagate_nan=tl.PropagateNan.ALL)
    sigmoid = _sigmoid(x)
    silu = x * sigmoid
    part = gl.sum(gl.sum((dh * silu * clipped).reshape([64, 2, 64]), 2), 1)
    dh *= weight[:, None]
    of_gates = gl.where(x == gate, dh * clipped * (sigmoid + silu * (1.0 - sigmoid)), 0.0)
    of_ups = gl.where(clipped == up, dh * silu, 0.0)
    kept = gl.where(inside, -1, 0)[:, None]
    return _rounded(of_gates, kept), _rounded(of_ups, kept), gl.convert_layout(part, weight.type.layout)


@jit
def _magnitude(x, axis: gl.constexpr):
    """`model.kernels.gpu.magnitude` of the largest |x|; NaN is on top."""
    return gl.reduce(gl.abs(x), axis, _larger).to(gl.int32, bitcast=True)


@jit
def _larger(x, y):
    return gl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@jit
def _sigmoid(x):
    """The instructions of `model.kernels.swiglu._sigmoid`, fewer of them: 1 / (1 + 2^(-x / ln 2))."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _wide(x):
    """bf16 in fp32, two numbers at a time."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.b32 t, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000; }",
        "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@jit
def _rounded(x, kept):
    """x in bf16, two numbers an instruction, and zeros where the bits `kept` are."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; and.b32 $0, t, $3; }",
        "=r,f,f,r,r", [x, kept], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@jit
def _store_rows(tile, first, rows, inside, column, values, scales, R, W):
    """Cast 64 x 128 numbers along rows, as `model.kernels.cast.store_both_ways` does."""
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, tile.type.layout))
    wide = _wide(tile)
    scale, inverse = power_of_two(_magnitude(wide, 1), 0x43E00000)  # 448
    cast = (wide * inverse[:, None]).to(gl.float8e4nv)
    corner = values + first.to(gl.int64) * (2 * W) + column
    gl.store(corner + rows[:, None] * (2 * W) + columns[None, :], cast, mask=inside[:, None])
    gl.store(scales + (column // 128).to(gl.int64) * R + first + rows, scale, mask=inside)


@jit
def _store_columns(tile, slot, column, transposed, transposed_scales, work, WARPS: gl.constexpr):
    """Cast 128 x 128 numbers in shared memory along columns, likewise."""
    down: gl.constexpr = _down(WARPS)
    flat: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    wide = _wide(tile.load(down))
    scale, inverse = power_of_two(_magnitude(wide, 0), 0x43E00000)
    cast = (wide * inverse[None, :]).to(gl.float8e4nv)
    cast = gl.convert_layout(cast.permute((1, 0)), flat)
    stride = work[2] * 128
    columns = gl.arange(0, 128, layout=gl.SliceLayout(1, flat))
    rows = gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    corner = transposed + column.to(gl.int64) * stride + slot * 128
    gl.store(corner + columns[:, None] * stride + rows[None, :], cast)
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, down))
    gl.store(transposed_scales + slot.to(gl.int64) * (2 * work[5]) + column + columns, scale)


@constexpr_function
def _across(warps):
    """Of [64, 128]: a thread holds 8 columns of either half."""
    rows = [[1 << i, 0] for i in range(6)]
    bits = warps.bit_length() - 1
    registers = [[0, 1], [0, 2], [0, 4], [0, 64], *rows[2 + bits :]]
    lanes = [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, rows[2 : 2 + bits], [], [64, 128])


@constexpr_function
def _down(warps):
    """Of [128, 128]: a thread holds pairs of rows, for its casts."""
    bits = warps.bit_length() - 1
    registers = [[1, 0], [2, 0], [0, 1], [0, 2], [0, 4]]
    lanes = [[0, 8], [0, 16], [0, 32], [4, 0], [8, 0]]
    rest = [[16, 0], [32, 0], [64, 0], [0, 64]]
    return gl.DistributedLinearLayout([*registers, *rest[bits:]], lanes, rest[:bits], [], [128, 128])


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
