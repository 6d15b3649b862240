"""Linear layers and experts whose products, forward and backward, are of FP8 numbers.

    y  = x w^T        x in tiles of 1 x 128, w in blocks of 128 x 128
    dx = dy w         dy in tiles of 1 x 128, w as before
    dw = dy^T x       both in tiles of 128 x 1: along the rows, over which it sums; an expert's begin anew

What backward needs is kept in FP8, a byte for a number. Outputs and gradients have x's dtype. Source:
DeepSeek-V3 report, section 3.3.

Legend: R rows (tokens), I input features, O output features, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.cast import cast_activation, cast_weight
from model.kernels.product import grouped_outer_product, grouped_product, product
from model.kernels.swiglu import cast_swiglu, cast_swiglu_backward
from model.linear import Kind
from model.quant import Quantised


def fp8_linear(x: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    """x [..., I] times weight [O, I] transposed -> [..., O]; see `model.linear.linear`."""
    return _Linear.apply(x, weight)


def fp8_expert_mlp(
    rows: Tensor, weights: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor, limit: float
) -> Tensor:
    """Rows [R, D] of experts -> [R, D]; see `model.moe.expert_mlp`."""
    return _ExpertMLP.apply(rows, weights, offsets, gate_up, down, limit)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        rows, columns = cast_activation(x.flatten(0, -2))
        w, w_transposed = cast_weight(weight)
        _keep(ctx, (columns, w_transposed))
        return product(rows, w, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (x, w), _ = _kept(ctx)
        rows, columns = cast_activation(grad.flatten(0, -2))
        return product(rows, w, grad.dtype).unflatten(0, grad.shape[:-1]), product(columns, x, grad.dtype)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        offsets: Tensor,
        gate_up: Tensor,
        down: Tensor,
        limit: float,
    ) -> Tensor:  # type: ignore[override]
        x, x_columns = cast_activation(rows, offsets)
        first, first_transposed = cast_weight(gate_up)
        second, second_transposed = cast_weight(down)
        both = grouped_product(x, first, offsets, rows.dtype)  # [R, 2F]
        hidden, hidden_columns = cast_swiglu(both, weights, limit, offsets)
        ctx.limit = limit
        kept = (x_columns, first_transposed, hidden_columns, second_transposed)
        _keep(ctx, kept, both, weights, offsets)
        return grouped_product(hidden, second, offsets, rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (x, first, hidden, second), (both, weights, offsets) = _kept(ctx)
        dtype = grad.dtype
        rows, columns = cast_activation(grad, offsets)
        down_grad = grouped_outer_product(columns, hidden, offsets, dtype)
        hidden_grad = grouped_product(rows, second, offsets, dtype)  # [R, F]
        rows, columns, weights_grad = cast_swiglu_backward(hidden_grad, both, weights, ctx.limit, offsets)
        gate_up_grad = grouped_outer_product(columns, x, offsets, dtype)
        rows_grad = grouped_product(rows, first, offsets, dtype)
        return rows_grad, weights_grad, None, gate_up_grad, down_grad, None


def _keep(ctx: Any, quantised: tuple[Quantised, ...], *tensors: Tensor) -> None:
    ctx.blocks = [block for _, _, block in quantised]
    ctx.save_for_backward(*(part for q in quantised for part in (q.values, q.scales)), *tensors)


def _kept(ctx: Any) -> tuple[list[Quantised], tuple[Tensor, ...]]:
    saved, count = ctx.saved_tensors, len(ctx.blocks)
    parts = zip(saved[: 2 * count : 2], saved[1 : 2 * count : 2], ctx.blocks)
    return [Quantised(*part) for part in parts], saved[2 * count :]
