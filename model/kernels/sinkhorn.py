"""Sinkhorn's iteration on small matrices, N x N for every token: forward and backward in one kernel each.

    comb = softmax(logits) + eps over rows,  then columns and rows in turn are divided by their sums + eps

It ends with columns (axis -2), which sum to 1 up to eps; rows do as far as `iterations` bring them. torch
has some 40 operations on tiny tensors forward, and 100 backward. Backward undoes the steps: y = x / d, with
the divisors d that forward has kept, 4 bytes for every row and column of a step:

    x = y d,    dx = (dy - sum(dy y)) / d      over the row or column that d belongs to

Legend: M matrices (tokens), N streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, runs_kernels, tl

BLOCK = 64  # matrices of a program


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices from logits [..., N, N] (V4 report, section 2.2)."""
    streams = logits.shape[-1]
    if runs_kernels(logits) and logits.dtype == torch.float32 and streams & (streams - 1) == 0:
        return torch.ops.fourfold.sinkhorn(logits, iterations, eps)[0]
    comb = (
        (logits.softmax(dim=-1) + eps).flatten(0, -3).permute(1, 2, 0).contiguous()
    )  # [N, N, tokens]: tokens
    comb = comb / (comb.sum(0, keepdim=True) + eps)  # are the fast axis of some 40 tiny sums and divisions
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb.permute(2, 0, 1).contiguous().view(logits.shape)  # products of strided 4 x 4s are slow


@operator("sinkhorn")
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """comb [..., N, N] and divisors [2 iterations - 1, M, N]."""
    logits = logits.contiguous()
    comb, divisors = _empty(logits, iterations, eps)
    if logits.numel():
        matrices, streams = divisors.shape[1:]
        grid = (-(-matrices // BLOCK),)
        _forward_kernel[grid](logits, comb, divisors, matrices, iterations, eps, streams, BLOCK)
    return comb, divisors


@torch.library.register_fake("fourfold::sinkhorn")
def _empty(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    streams = logits.shape[-1]
    steps, matrices = 2 * iterations - 1, logits.numel() // streams**2
    return logits.new_empty(logits.shape), logits.new_empty(steps, matrices, streams)


@operator("sinkhorn_backward")
def _sinkhorn_backward(grad: Tensor, comb: Tensor, divisors: Tensor, eps: float) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        steps, matrices, streams = divisors.shape
        grid = (-(-matrices // BLOCK),)
        _backward_kernel[grid](grad, comb, divisors, out, matrices, steps // 2 + 1, eps, streams, BLOCK)
    return out


@torch.library.register_fake("fourfold::sinkhorn_backward")
def _empty_backward(grad: Tensor, comb: Tensor, divisors: Tensor, eps: float) -> Tensor:
    return grad.new_empty(grad.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.eps = inputs[2]
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.fourfold.sinkhorn_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


torch.library.register_autograd("fourfold::sinkhorn", _backward, setup_context=_save)


@launched
@jit(varying=("M",))
def _forward_kernel(logits, comb, divisors, M, ITERATIONS, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = matrix < M
    at, exists = places(matrix, N), inside[:, None, None]
    x = tl.load(logits + at, mask=exists, other=0.0)
    x = tl.exp(x - tl.max(x, 2)[:, :, None])
    x = x / tl.sum(x, 2)[:, :, None] + eps
    own = divisors + matrix[:, None] * N + tl.arange(0, N)[None, :]
    d = tl.sum(x, 1) + eps
    tl.store(own, d, mask=inside[:, None])
    x = x / d[:, None, :]
    for _ in range(ITERATIONS - 1):
        own += M.to(tl.int64) * N
        d = tl.sum(x, 2) + eps
        tl.store(own, d, mask=inside[:, None])
        x = x / d[:, :, None]
        own += M.to(tl.int64) * N
        d = tl.sum(x, 1) + eps
        tl.store(own, d, mask=inside[:, None])
        x = x / d[:, None, :]
    tl.store(comb + at, x, mask=exists)


@launched
@jit(varying=("M",))
def _backward_kernel(grad, comb, divisors, out, M, ITERATIONS, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = matrix < M
    at, exists = places(matrix, N), inside[:, None, None]
    y, g = tl.load(comb + at, mask=exists, other=0.0), tl.load(grad + at, mask=exists, other=0.0)
    step = M.to(tl.int64) * N
    own = divisors + matrix[:, None] * N + tl.arange(0, N)[None, :] + (2 * ITERATIONS - 2) * step
    for _ in range(ITERATIONS - 1):
        d = tl.load(own, mask=inside[:, None], other=1.0)[:, None, :]
        g, y = (g - tl.sum(g * y, 1)[:, None, :]) / d, y * d
        d = tl.load(own - step, mask=inside[:, None], other=1.0)[:, :, None]
        g, y = (g - tl.sum(g * y, 2)[:, :, None]) / d, y * d
        own -= 2 * step
    d = tl.load(own, mask=inside[:, None], other=1.0)[:, None, :]
    g, y = (g - tl.sum(g * y, 1)[:, None, :]) / d, y * d
    p = y - eps
    tl.store(out + at, p * (g - tl.sum(g * p, 2)[:, :, None]), mask=exists)


@jit
def places(matrix, N: tl.constexpr):
    """Of the numbers of matrices [BLOCK] -> [BLOCK, N, N]."""
    i = tl.arange(0, N)
    return (matrix * N * N)[:, None, None] + i[None, :, None] * N + i[None, None, :]
