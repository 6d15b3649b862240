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

from model.kernels.cast import (
    INPUTS,
    activations,
    cast_activation,
    empty_activations,
    load_tile,
    store_both_ways,
)
from model.kernels.gpu import TILE, jit, runs_kernels, tiles, tl
from model.norm import widen
from model.quant import Quantised

WARPS, BACKWARD_WARPS = 8, 16  # of a program that casts a tile of 128 x 128


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), elementwise (V4 report, on SwiGLU clamping)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def cast_swiglu(gate_up: Tensor, weights: Tensor, limit: float) -> tuple[Quantised, Quantised]:
    """gate_up [R, 2F], gates before ups, weights [R] fp32 -> `cast_activation` of h [R, F].

    Computed in fp32 and rounded to gate_up's dtype before the cast, as if h had been in memory.
    """
    if runs_kernels(gate_up) and gate_up.dtype in INPUTS:
        return activations(torch.ops.fourfold.cast_swiglu(gate_up, weights, limit), len(gate_up))
    return cast_activation(_weighted(gate_up, weights, limit))


def cast_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, limit: float
) -> tuple[Quantised, Quantised, Tensor]:
    """dh [R, F] and the inputs of `cast_swiglu` -> `cast_activation` of d gate_up [R, 2F], d weights [R].

    The kernel wants gates and ups in tiles of their own: F in 128s.
    """
    if runs_kernels(gate_up) and gate_up.dtype in INPUTS and grad.shape[1] % TILE == 0:
        *parts, sums = torch.ops.fourfold.cast_swiglu_backward(grad, gate_up, weights, limit)
        return *activations(tuple(parts), len(grad)), sums.sum(0).to(weights.dtype)
    with torch.enable_grad():
        gate_up, weights = gate_up.detach().requires_grad_(), weights.detach().requires_grad_()
        hidden = _weighted(gate_up, weights, limit)
    gate_up_grad, weights_grad = torch.autograd.grad(hidden, (gate_up, weights), grad)
    return *cast_activation(gate_up_grad), weights_grad


def _weighted(gate_up: Tensor, weights: Tensor, limit: float) -> Tensor:
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (clamped_swiglu(gate, up, limit) * weights.unsqueeze(-1)).to(gate_up.dtype)


@torch.library.custom_op("fourfold::cast_swiglu", mutates_args=())
def _cast_swiglu(gate_up: Tensor, weights: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    parts = empty_activations(gate_up, rows, width)
    if rows and width:
        grid = (tiles(width), tiles(rows))
        inputs = gate_up.contiguous(), weights.contiguous()
        _swiglu_kernel[grid](*inputs, *parts, rows, width, limit, num_warps=WARPS)
    return parts


@_cast_swiglu.register_fake
def _(gate_up: Tensor, weights: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_activations(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("fourfold::cast_swiglu_backward", mutates_args=())
def _cast_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`empty_activations` of d gate_up, and the parts [F / 128, R] of d weights."""
    parts = _empty_backward(grad, gate_up, weights, limit)
    rows, width = grad.shape
    if rows and width:
        grid = (2 * tiles(width), tiles(rows))
        inputs = grad.contiguous(), gate_up.contiguous(), weights.contiguous()
        _swiglu_backward_kernel[grid](*inputs, *parts, rows, width, limit, num_warps=BACKWARD_WARPS)
    return parts


@_cast_swiglu_backward.register_fake
def _empty_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = weights.new_empty(tiles(grad.shape[1]), grad.shape[0], dtype=torch.float32)
    return *empty_activations(gate_up, *gate_up.shape), sums


@jit(varying=("R",))
def _swiglu_kernel(gate_up, weights, values, scales, transposed, transposed_scales, R, width, limit):
    row, column = tl.program_id(1) * 128, tl.program_id(0) * 128
    gate = load_tile(gate_up, row, column, R, width, 2 * width)
    up = load_tile(gate_up + width, row, column, R, width, 2 * width)
    x = _below(gate, limit)
    hidden = x * _sigmoid(x) * _within(up, limit) * _weights(weights, row, R)[:, None]
    hidden = hidden.to(gate.dtype)
    store_both_ways(hidden, row, column, values, scales, transposed, transposed_scales, R, width)


@jit(varying=("R",))
def _swiglu_backward_kernel(
    grad, gate_up, weights, values, scales, transposed, transposed_scales, sums, R, width, limit
):
    """A program casts a tile of the gates' or the ups' gradient, computed in halves: else registers spill."""
    block, of_ups = tl.program_id(0) // 2, tl.program_id(0) % 2  # neighbours read the same, once from L2
    row, column = tl.program_id(1) * 128, block * 128
    left, left_sum = _gradient(grad, gate_up, weights, row, column, R, width, limit, of_ups)
    right, right_sum = _gradient(grad, gate_up, weights, row, column + 64, R, width, limit, of_ups)
    rows = row + tl.arange(0, 128)
    mask = (rows < R) & (of_ups == 0)
    tl.store(sums + block.to(tl.int64) * R + rows, left_sum + right_sum, mask=mask)
    tile = tl.join(left, right).permute(0, 2, 1).reshape(128, 128)
    column += of_ups * width
    store_both_ways(tile, row, column, values, scales, transposed, transposed_scales, R, 2 * width)


@jit
def _gradient(grad, gate_up, weights, row, column, R, width, limit, of_ups):
    """128 x 64 numbers of dg or of du in gate_up's dtype, and their part of dw [128]."""
    gate = load_tile(gate_up, row, column, R, width, 2 * width, 64)
    up = load_tile(gate_up + width, row, column, R, width, 2 * width, 64).to(tl.float32)
    dh = load_tile(grad, row, column, R, width, width, 64).to(tl.float32)
    x, clipped = _below(gate, limit), _within(up, limit)
    sigmoid = _sigmoid(x)
    part = tl.sum(dh * (x * sigmoid * clipped), 1)
    dh *= _weights(weights, row, R)[:, None]
    gradient = dh * (sigmoid * tl.where(of_ups == 1, x, clipped * (1.0 + x * (1.0 - sigmoid))))
    inside = tl.where(of_ups == 1, (up >= -limit) & (up <= limit), gate.to(tl.float32) <= limit)
    return tl.where(inside, gradient, 0.0).to(gate.dtype), part


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _below(x, limit):
    """min(x, limit) in fp32; NaN stays, as in torch's clamp."""
    x = x.to(tl.float32)
    return tl.where(x > limit, limit, x)


@jit
def _within(x, limit):
    x = _below(x, limit)
    return tl.where(x < -limit, -limit, x)


@jit
def _weights(weights, row, R):
    rows = row + tl.arange(0, 128)
    return tl.load(weights + rows, mask=rows < R, other=0.0).to(tl.float32)
