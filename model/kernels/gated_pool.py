"""Kernels of gated pooling and its gradients, one pass over memory each (`model.kernels.pooling`).

    p_j = softmax_j(gate_j + bias_j),    dkv_j = p_j * d,    dgate_j = p_j * d * (kv_j - entry)

A program goes through some windows for a block of channels, and holds all slots of them; with overlap also
those of the windows before. Backward computes the softmax anew, from what it reads anyway. The bias' gradient
is added up in parts, always in the same order. Norm and rotation follow on a 1 / m of the data.

Legend: B batch, S sequence, T compressed slots, m rate, C channels, W = C, or 2C with overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.cast import INPUTS
from model.kernels.gpu import jit, launched, operator, runs_kernels, tl


class Setting(NamedTuple):
    """How work is cut up; tests/bench/indexer.py --tune compares settings."""

    elements: int = 8192  # of a half of the windows held at once
    channels: int = 64
    blocks: int = 1  # of windows, one after the other: the bias' gradient is one part of all
    warps: int = 4


FORWARD, BACKWARD = Setting(), Setting()


def runs(kv: Tensor, tokens: Tensor) -> bool:
    """Whether the kernels take kv [B, S, W] in windows of tokens [B, T, m]."""
    rate = tokens.shape[2]
    return runs_kernels(kv) and kv.dtype in INPUTS and tokens.numel() > 0 and rate & (rate - 1) == 0


@operator("gated_pool")
def pool(kv: Tensor, gate: Tensor, bias: Tensor, tokens: Tensor, chained: Tensor | None) -> Tensor:
    kv, gate, bias, tokens = (x.contiguous() for x in (kv, gate, bias, tokens))
    out = _empty_entries(kv, gate, bias, tokens, chained)
    grid, sizes = _cut(FORWARD, kv, tokens, chained)
    links = tokens if chained is None else chained.contiguous()
    _pool_kernel[grid](kv, gate, bias, tokens, links, out, *sizes, num_warps=FORWARD.warps)
    return out


@torch.library.register_fake("fourfold::gated_pool")
def _empty_entries(kv: Tensor, gate: Tensor, bias: Tensor, tokens: Tensor, chained: Tensor | None) -> Tensor:
    return kv.new_empty(*tokens.shape[:2], kv.shape[2] // (1 if chained is None else 2))


@operator("gated_pool_backward")
def pool_backward(
    grad: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, tokens: Tensor, chained: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of kv, gate and bias. Of slots that share tokens at most one may have a gradient.

    Slots without an entry hold tokens of others; they get none, and write none.
    """
    grad, kv, gate, bias, tokens = (x.contiguous() for x in (grad, kv, gate, bias, tokens))
    grid, sizes = _cut(BACKWARD, kv, tokens, chained)
    dkv, dgate = torch.zeros_like(kv), torch.zeros_like(gate)
    parts = bias.new_empty(grid[2], grid[0], *bias.shape, dtype=torch.float32)
    links = tokens if chained is None else chained.contiguous()
    outputs = dkv, dgate, parts
    _pool_backward_kernel[grid](
        grad, kv, gate, bias, tokens, links, *outputs, *sizes, num_warps=BACKWARD.warps
    )
    return dkv, dgate, parts.flatten(0, 1).sum(0).to(bias.dtype)


@torch.library.register_fake("fourfold::gated_pool_backward")
def _(
    grad: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, tokens: Tensor, chained: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(kv), torch.empty_like(gate), torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *pool_backward(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("fourfold::gated_pool", _backward, setup_context=_save)


def _cut(
    setting: Setting, kv: Tensor, tokens: Tensor, chained: Tensor | None
) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The grid, and what kernels are told of sizes: S, T, C, m, windows, channels, blocks, overlap."""
    (batch, length, width), (_, slots, rate) = kv.shape, tokens.shape
    overlap = int(chained is not None)
    channels = width // (1 + overlap)
    windows = max(1, setting.elements // (rate * setting.channels))
    grid = (-(-slots // (windows * setting.blocks)), -(-channels // setting.channels), batch)
    return grid, (length, slots, channels, rate, windows, setting.channels, setting.blocks, overlap)


@launched
@jit
def _pool_kernel(
    kv, gate, bias, tokens, chained, out, S, T, C, M: tl.constexpr, WINDOWS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b, channel = tl.program_id(2).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inputs = kv, gate, bias, tokens, chained
    for block in range(BLOCKS):
        slot = (tl.program_id(0) * BLOCKS + block) * WINDOWS + tl.arange(0, WINDOWS)
        _, _, _, entry = _pooled(inputs, b, slot, channel, S, T, C, M, OVERLAP)
        inside = (slot < T)[:, None] & (channel < C)[None, :]
        place = out + (b * T + slot)[:, None] * C + channel[None, :]
        tl.store(place, entry.to(out.dtype.element_ty), mask=inside)


@launched
@jit
def _pool_backward_kernel(
    grad, kv, gate, bias, tokens, chained, dkv, dgate, parts, S, T, C, M: tl.constexpr,
    WINDOWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b, channel = tl.program_id(2).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inputs = kv, gate, bias, tokens, chained
    own_bias, before_bias = tl.zeros((M, CHANNELS), tl.float32), tl.zeros((M, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        slot = (tl.program_id(0) * BLOCKS + block) * WINDOWS + tl.arange(0, WINDOWS)
        inside = (slot < T)[:, None] & (channel < C)[None, :]
        d = tl.load(grad + (b * T + slot)[:, None] * C + channel[None, :], mask=inside, other=0.0)
        d = d.to(tl.float32)
        own, before, total, entry = _pooled(inputs, b, slot, channel, S, T, C, M, OVERLAP)
        given = (tl.max(tl.abs(d), 1) > 0)[:, None, None]
        d = (d / total)[:, None, :]
        own_bias += _store(dkv, dgate, own, given, d, entry)
        if OVERLAP:
            before_bias += _store(dkv, dgate, before, given, d, entry)
    row = (b * tl.num_programs(0) + tl.program_id(0)) * M + tl.arange(0, M)
    place = parts + row[:, None] * (C * (1 + OVERLAP)) + channel[None, :]
    tl.store(place + OVERLAP * C, own_bias, mask=(channel < C)[None, :])
    if OVERLAP:
        tl.store(place, before_bias, mask=(channel < C)[None, :])


@jit
def _pooled(inputs, b, slot, channel, S, T, C, M: tl.constexpr, OVERLAP: tl.constexpr):
    """Of windows, and with overlap of the windows before: kv and exp(logit - top) [WINDOWS, m, CHANNELS],
    their places and mask; then the sum of the latter, and the entries [WINDOWS, CHANNELS]."""
    x, logit, place, mask = _load(inputs, b, slot, channel, slot < T, OVERLAP * C, S, T, C, M, OVERLAP)
    top = tl.max(logit, 1)
    if OVERLAP:
        chained = (slot < T) & (slot > 0)
        chained &= tl.load(inputs[4] + b * T + slot, mask=chained, other=0) != 0
        before, before_logit, before_place, before_mask = _load(
            inputs, b, slot - 1, channel, chained, 0, S, T, C, M, OVERLAP
        )
        before_logit = tl.where(chained[:, None, None], before_logit, float("-inf"))
        top = tl.maximum(top, tl.max(before_logit, 1))
    p = tl.exp(logit - top[:, None, :])
    total, entry = tl.sum(p, 1), tl.sum(p * x, 1)
    own = x, p, place, mask
    other = own
    if OVERLAP:
        before_p = tl.exp(before_logit - top[:, None, :])
        total, entry = total + tl.sum(before_p, 1), entry + tl.sum(before_p * before, 1)
        other = before, before_p, before_place, before_mask
    return own, other, total, entry / total


@jit
def _load(inputs, b, slot, channel, there, offset, S, T, C, M: tl.constexpr, OVERLAP: tl.constexpr):
    """kv and logits [WINDOWS, m, CHANNELS] in fp32 of windows, from column `offset` on; places and mask."""
    kv, gate, bias, tokens, _ = inputs
    j, width, column = tl.arange(0, M), C * (1 + OVERLAP), channel + offset
    token = tl.load(tokens + (b * T + slot)[:, None] * M + j[None, :], mask=there[:, None], other=0)
    place = (b * S + token)[:, :, None] * width + column[None, None, :]
    mask = there[:, None, None] & (channel < C)[None, None, :]
    x = tl.load(kv + place, mask=mask, other=0.0).to(tl.float32)
    logit = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + j[:, None] * width + column[None, :], mask=(channel < C)[None, :], other=0.0)
    return x, logit + shift.to(tl.float32)[None, :, :], place, mask


@jit
def _store(dkv, dgate, windows, given, d, entry):
    """Store gradients of windows where one is `given`, by d over the sum; returns the bias'."""
    x, p, place, mask = windows
    of_kv = p * d
    of_gate = of_kv * (x - entry[:, None, :])
    tl.store(dkv + place, of_kv.to(dkv.dtype.element_ty), mask=mask & given)
    tl.store(dgate + place, of_gate.to(dgate.dtype.element_ty), mask=mask & given)
    return tl.sum(of_gate, 0)
