"""Kernels of the lightning indexer's scores and of the best of them (`model.kernels.indexer`).

    score(t, s) = sum_h w_th * ReLU(q_th . k_s)

A program keeps a tile of keys and goes through queries, whose heads are the columns of one product: ReLU,
weights and the sum over heads follow in registers, and only scores reach memory, those of some queries at a
time. Tiles that no query sees are left out. Products of bf16 numbers are exact in fp32, in which all is
summed up; the reference rounds every head's product to bf16.

The best k of a query are found without sorting. Scores' bits, made integers of the same order, are searched
for the largest threshold that k scores reach, one bit at a time.

Legend: B batch, S queries, C of them at a time, T compressed slots, h index heads, c index channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, runs_kernels, tl

SCORES_AT_ONCE = 1 << 26  # scores in memory at a time
WIDEST = 1 << 18  # slots of a query that one program looks at


class Setting(NamedTuple):
    """How scores are cut up; tests/bench/indexer.py --tune compares settings."""

    entries: int = 128  # of a tile of keys
    queries: int = 32  # that a program goes through
    together: int = 2  # queries in one product
    warps: int = 8
    stages: int = 2  # tiles of queries in flight


SCORES = Setting()


def runs(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take these queries [B, S, h, c] and keys [B, T, c]."""
    sizes = q.shape[2], q.shape[3]
    shaped = all(size >= 16 and size & (size - 1) == 0 for size in sizes) and sizes[1] <= 128
    return runs_kernels(q) and q.dtype == k.dtype == torch.bfloat16 and shaped and 0 < k.shape[1] <= WIDEST


def power_of_two_from(size: int) -> int:
    """The smallest power of two that is not below `size` >= 1."""
    return 1 << (size - 1).bit_length()


def warps_of_row(width: int) -> int:
    """Warps of a program that holds `width` numbers: 32 a thread, as far as a block has threads."""
    return min(32, max(4, width // 1024))


@operator("index_select")
def index_select(
    q: Tensor, k: Tensor, weights: Tensor, first: Tensor, end: Tensor, topk: int, ranked_in: torch.dtype
) -> Tensor:
    """int32 [B, S, min(k, T)]; first, end [B, S] int32: a query sees the slots first <= s < end."""
    q, k, weights, first, end = (x.contiguous() for x in (q, k, weights, first, end))
    indices = _empty_indices(q, k, weights, first, end, topk, ranked_in).fill_(-1)
    (batch, length, *_), slots, best = q.shape, k.shape[1], indices.shape[2]
    count = min(length, max(1, SCORES_AT_ONCE // (batch * slots)))
    scores = q.new_empty(batch, count, slots, dtype=ranked_in)
    for start in range(0, length, count):
        write_scores(scores, q, k, weights, first, end, start=start, more_than=best)
        write_best(indices, start, scores, first, end)
    return indices


@torch.library.register_fake("fourfold::index_select")
def _empty_indices(
    q: Tensor, k: Tensor, weights: Tensor, first: Tensor, end: Tensor, topk: int, ranked_in: torch.dtype
) -> Tensor:
    return q.new_empty(*q.shape[:2], min(topk, k.shape[1]), dtype=torch.int32)


def write_scores(
    scores: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    first: Tensor,
    end: Tensor,
    *,
    start: int = 0,
    more_than: int = 0,
) -> None:
    """Scores [B, C, T] of the queries from `start` on, where they see more than `more_than` slots.

    What no query of a program sees is not written. All inputs are contiguous.
    """
    (batch, length, heads, channels), (count, slots) = q.shape, scores.shape[1:]
    entries, queries, together, warps, stages = SCORES
    grid = (-(-slots // entries), -(-count // queries), batch)
    _scores_kernel[grid](
        q, k, weights, first, end, scores, start, length, count, slots, more_than,
        heads, channels, entries, queries, together, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def write_best(indices: Tensor, start: int, scores: Tensor, first: Tensor, end: Tensor) -> None:
    """Into indices [B, S, k] those of the best scores [B, C, T] of the queries from `start` on."""
    (batch, length, best), (count, slots) = indices.shape, scores.shape[1:]
    width, bits = power_of_two_from(slots), 8 * scores.dtype.itemsize
    _best_kernel[(min(count, length - start), batch)](
        scores, first, end, indices, start, length, count, slots, best,
        bits, width, num_warps=warps_of_row(width),
    )  # fmt: skip


@launched
@jit(varying=("start",))
def _scores_kernel(
    q, k, weights, first, end, scores, start, S, C, T, more_than,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr, QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    slot, query, b = tl.program_id(0) * ENTRIES, tl.program_id(1) * QUERIES, tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.minimum(C, S - start) - query, QUERIES)
    row = b * S + start + query
    low, high = seeing(first + row, end + row, count, slot, ENTRIES, more_than, QUERIES)
    slots = slot + tl.arange(0, ENTRIES)
    keys = load_keys(k + b * T * CHANNELS, slots, slots < T, CHANNELS)
    columns, channels = tl.arange(0, TOGETHER * HEADS), tl.arange(0, CHANNELS)
    beside = tl.arange(0, TOGETHER)
    out = scores + (b * C + query) * T
    for i in range(low, high, TOGETHER):
        inside = columns < (high - i) * HEADS
        head = (row + i) * HEADS + columns
        queries = tl.load(q + head[:, None] * CHANNELS + channels[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(weights + head, mask=inside, other=0.0).to(tl.float32)
        per_head = tl.maximum(tl.dot(keys, tl.trans(queries)), 0.0) * w[None, :]  # [ENTRIES, TOGETHER * h]
        score = tl.sum(tl.reshape(per_head, (ENTRIES, TOGETHER, HEADS)), 2)
        place = out + (i + beside)[None, :].to(tl.int64) * T + slots[:, None]
        mask = (slots < T)[:, None] & (i + beside < high)[None, :]
        tl.store(place, score.to(scores.dtype.element_ty), mask=mask)


@jit
def seeing(first, end, count, slot, ENTRIES: tl.constexpr, more_than, QUERIES: tl.constexpr):
    """Of `count` queries the first one that sees something of a tile, and the one after the last: or 0, 0."""
    queries = tl.arange(0, QUERIES)
    start = tl.load(first + queries, mask=queries < count, other=0)
    stop = tl.load(end + queries, mask=queries < count, other=0)
    sees = (start < slot + ENTRIES) & (stop > slot) & (stop - start > more_than)
    high = tl.max(tl.where(sees, queries + 1, 0), 0)
    return tl.minimum(tl.min(tl.where(sees, queries, QUERIES), 0), high), high


@jit
def load_keys(k, slots, mask, CHANNELS: tl.constexpr):
    """Rows of k [T, c] at `slots`, zeros where masked out."""
    place = slots[:, None].to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tl.load(k + place, mask=mask[:, None], other=0.0)


@launched
@jit(varying=("start",))
def _best_kernel(
    scores, first, end, indices, start, S, C, T, K, BITS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * S + start + t
    slots = tl.arange(0, WIDTH)
    low, high = tl.load(first + row), tl.load(end + row)
    visible = (slots >= low) & (slots < high)
    score = tl.load(scores + (b * C + t) * T + slots, mask=visible, other=0.0)
    rank = tl.where(visible, _ordered(score) >> (32 - BITS), 0)
    threshold, bit = tl.cast(0, tl.uint32), tl.cast(1 << (BITS - 1), tl.uint32)
    if high - low > K:
        for _ in range(BITS):
            reached = tl.sum((rank >= threshold + bit).to(tl.int32), 0) >= K
            threshold += tl.where(reached, bit, 0)
            bit = bit >> 1
    above, level = rank > threshold, visible & (rank == threshold)
    room = K - tl.sum(above.to(tl.int32), 0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices + row * K + place, slots, mask=kept)


@jit
def _ordered(x):
    """Bits of x in fp32 as unsigned integers in the order of the numbers; both zeros are one."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
