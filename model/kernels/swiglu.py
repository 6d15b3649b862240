"""The clamped, weighted SwiGLU of experts, from products to FP8 operands of the next ones, and its backward.

    h   = w * silu(g') * u'                              g' = min(g, limit), u' = clip(u, -limit, limit)
    dg  = dh * w * u' * silu'(g')      if g <= limit,    silu'(x) = s(x) * (1 + x * (1 - s(x))), s the sigmoid
    du  = dh * w * silu(g')            if -limit <= u <= limit
    dw  = sum over F of dh * silu(g') * u'

Each is one pass: what it computes is cast where it is, along rows and columns, and never in memory. Sums
over F are of tiles of 128 columns first, always in the same order. The GPU's exp and division, unlike the
casts, are not torch's to the last bit: about one number in a thousand is rounded to the next in bf16.

Legend: R rows (tokens), F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cast_hopper
from model.kernels.cast import (
    INPUTS,
    activations,
    cast_activation,
    empty_activations,
    groups_of,
    load_tile,
    row_slots,
    rows_of_slot,
    store_both_ways,
)
from model.kernels.gpu import TILE, jit, launched, operator, runs_kernels, tiles, tl
from model.norm import widen
from model.quant import Quantised

if tl is not None:
    from triton.language.extra import libdevice

WARPS, REGISTERS = 8, 128  # of a program that casts a tile of 128 x 128, and of its threads forward: two fit


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), elementwise (V4 report, on SwiGLU clamping)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def cast_swiglu(
    gate_up: Tensor, weights: Tensor, limit: float, offsets: Tensor | None = None
) -> tuple[Quantised, Quantised]:
    """gate_up [R, 2F], gates before ups, weights [R] fp32 -> `cast_activation` of h [R, F] with `offsets`.

    Computed in fp32 and rounded to gate_up's dtype before the cast, as if h had been in memory.
    """
    if runs_kernels(gate_up) and gate_up.dtype in INPUTS:
        parts = torch.ops.fourfold.cast_swiglu(gate_up, weights, offsets, limit)
        return activations(parts, len(gate_up), offsets)
    return cast_activation(_weighted(gate_up, weights, limit), offsets)


def cast_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, limit: float, offsets: Tensor | None = None
) -> tuple[Quantised, Quantised, Tensor]:
    """dh [R, F] and the inputs of `cast_swiglu` -> `cast_activation` of d gate_up [R, 2F], d weights [R].

    The kernel wants gates and ups in tiles of their own: F in 128s.
    """
    if runs_kernels(gate_up) and gate_up.dtype in INPUTS and grad.shape[1] % TILE == 0:
        *parts, sums = torch.ops.fourfold.cast_swiglu_backward(grad, gate_up, weights, offsets, limit)
        return *activations(tuple(parts), len(grad), offsets), sums.sum(0).to(weights.dtype)
    with torch.enable_grad():
        gate_up, weights = gate_up.detach().requires_grad_(), weights.detach().requires_grad_()
        hidden = _weighted(gate_up, weights, limit)
    gate_up_grad, weights_grad = torch.autograd.grad(hidden, (gate_up, weights), grad)
    return *cast_activation(gate_up_grad, offsets), weights_grad


def _weighted(gate_up: Tensor, weights: Tensor, limit: float) -> Tensor:
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (clamped_swiglu(gate, up, limit) * weights.unsqueeze(-1)).to(gate_up.dtype)


@operator("cast_swiglu")
def _cast_swiglu(
    gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    parts = empty_activations(gate_up, rows, width, offsets)
    inputs = gate_up.contiguous(), weights.contiguous(), offsets
    if rows and width % TILE == 0 and cast_hopper.suits(inputs[0], limit=limit):
        cast_hopper.swiglu(*inputs, limit, *parts)
    elif rows and width:
        grid = (tiles(width), row_slots(rows, offsets))
        count, most = groups_of(offsets)
        _swiglu_kernel[grid](
            *inputs, *parts, rows, width, limit, count, E=most, num_warps=WARPS, maxnreg=REGISTERS
        )
    return parts


@torch.library.register_fake("fourfold::cast_swiglu")
def _(
    gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_activations(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, offsets)


@operator("cast_swiglu_backward")
def _cast_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`empty_activations` of d gate_up, and the parts [F / 128, R] of d weights."""
    parts = _empty_backward(grad, gate_up, weights, offsets, limit)
    rows, width = grad.shape
    inputs = grad.contiguous(), gate_up.contiguous(), weights.contiguous(), offsets
    if rows and width and cast_hopper.suits(*inputs[:2], limit=limit):
        cast_hopper.swiglu_backward(*inputs, limit, *parts)
    elif rows and width:
        grid = (tiles(width), row_slots(rows, offsets))
        count, most = groups_of(offsets)
        _swiglu_backward_kernel[grid](*inputs, *parts, rows, width, limit, count, E=most, num_warps=WARPS)
    return parts


@torch.library.register_fake("fourfold::cast_swiglu_backward")
def _empty_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, offsets: Tensor | None, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = weights.new_empty(tiles(grad.shape[1]), grad.shape[0], dtype=torch.float32)
    return *empty_activations(gate_up, gate_up.shape[0], gate_up.shape[1], offsets), sums


@launched
@jit(varying=("R", "groups"))
def _swiglu_kernel(
    gate_up, weights, offsets, values, scales, transposed, transposed_scales, R, width, limit, groups,
    E: tl.constexpr,
):  # fmt: skip
    row, end = rows_of_slot(offsets, R, groups, E)
    if row >= end:
        return
    column = tl.program_id(0) * 128
    gate = load_tile(gate_up, row, column, end, width, 2 * width)
    up = load_tile(gate_up + width, row, column, end, width, 2 * width)
    x = _below(gate.to(tl.float32), limit)
    hidden = x * _sigmoid(x) * _within(up.to(tl.float32), limit) * _weights(weights, row, end)[:, None]
    hidden = hidden.to(gate.dtype)
    store_both_ways(hidden, row, end, column, values, scales, transposed, transposed_scales, R, width)


@launched
@jit(varying=("R", "groups"))
def _swiglu_backward_kernel(
    grad, gate_up, weights, offsets, values, scales, transposed, transposed_scales, sums, R, width, limit,
    groups, E: tl.constexpr,
):  # fmt: skip
    """A program casts a tile of the gates' gradient and one of the ups', computed in halves for fewer
    registers."""
    row, end = rows_of_slot(offsets, R, groups, E)
    if row >= end:
        return
    column = tl.program_id(0) * 128
    inputs = grad, gate_up, weights
    gates_left, ups_left, left = _gradients(inputs, row, end, column, width, limit)
    gates_right, ups_right, right = _gradients(inputs, row, end, column + 64, width, limit)
    rows = row + tl.arange(0, 128)
    tl.store(sums + tl.program_id(0).to(tl.int64) * R + rows, left + right, mask=rows < end)
    gates, ups = _beside(gates_left, gates_right), _beside(ups_left, ups_right)
    store_both_ways(gates, row, end, column, values, scales, transposed, transposed_scales, R, 2 * width)
    column += width
    store_both_ways(ups, row, end, column, values, scales, transposed, transposed_scales, R, 2 * width)


@jit
def _gradients(inputs, row, end, column, width, limit):
    """128 x 64 numbers of dg and of du in gate_up's dtype, and their part of dw [128]."""
    grad, gate_up, weights = inputs
    gate = load_tile(gate_up, row, column, end, width, 2 * width, 64)
    wide = gate.to(tl.float32)
    up = load_tile(gate_up + width, row, column, end, width, 2 * width, 64).to(tl.float32)
    dh = load_tile(grad, row, column, end, width, width, 64).to(tl.float32)
    x, clipped = _below(wide, limit), _within(up, limit)
    sigmoid = _sigmoid(x)
    silu = x * sigmoid
    part = tl.sum(dh * silu * clipped, 1)
    dh *= _weights(weights, row, end)[:, None]
    of_gates = tl.where(x == wide, dh * clipped * (sigmoid + silu * (1.0 - sigmoid)), 0.0)
    of_ups = tl.where(clipped == up, dh * silu, 0.0)
    return of_gates.to(gate.dtype), of_ups.to(gate.dtype), part


@jit
def _beside(left, right):
    return tl.join(left, right).permute(0, 2, 1).reshape(128, 128)


@jit
def _sigmoid(x):
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@jit
def _below(x, limit):
    """min(x, limit); NaN stays, as in torch's clamp."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@jit
def _within(x, limit):
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@jit
def _weights(weights, row, end):
    rows = row + tl.arange(0, 128)
    return tl.load(weights + rows, mask=rows < end, other=0.0).to(tl.float32)
