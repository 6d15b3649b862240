"""The clamped, weighted SwiGLU of experts, from products to FP8 operands of the next ones, and its backward.

    h = w * silu(min(g, limit)) * clip(u, -limit, limit)

Legend: R rows (tokens), F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cast import cast_activation
from model.norm import widen
from model.quant import Quantised


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), elementwise (V4 report, on SwiGLU clamping)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def cast_swiglu(gate_up: Tensor, weights: Tensor, limit: float) -> tuple[Quantised, Quantised]:
    """gate_up [R, 2F], gates before ups, weights [R] fp32 -> `cast_activation` of h [R, F].

    Computed in fp32 and rounded to gate_up's dtype before the cast, as if h had been in memory.
    """
    return cast_activation(_weighted(gate_up, weights, limit))


def cast_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, limit: float
) -> tuple[Quantised, Quantised, Tensor]:
    """dh [R, F] and the inputs of `cast_swiglu` -> `cast_activation` of d gate_up [R, 2F], d weights [R]."""
    with torch.enable_grad():
        gate_up, weights = gate_up.detach().requires_grad_(), weights.detach().requires_grad_()
        hidden = _weighted(gate_up, weights, limit)
    gate_up_grad, weights_grad = torch.autograd.grad(hidden, (gate_up, weights), grad)
    return *cast_activation(gate_up_grad), weights_grad


def _weighted(gate_up: Tensor, weights: Tensor, limit: float) -> Tensor:
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (clamped_swiglu(gate, up, limit) * weights.unsqueeze(-1)).to(gate_up.dtype)
