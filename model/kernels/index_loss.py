"""Kernels of the indexer's divergence from attention and of its gradients (`model.kernels.indexer`).

    d loss_t / d score_ts = softmax_s(score_ts) - m_ts / sum_s m_ts    over the entries s that t attends to

Forward keeps this slope, in the dtype of q, and nothing of a head. Backward computes products of heads anew,
a tile at a time, and with g_hs = slope_s where q_h . k_s > 0, else 0,

    u_h = sum_s g_hs k_s,    dq_h = w_h u_h,    dw_h = q_h . u_h,    dk_s = sum_th g_ths w_th q_th

Products are of bf16 numbers, summed up in fp32. Those of q and k are exact; that g and w q are rounded puts
about as much into gradients as rounding these to bf16 does: 2.3e-3 to 2.9e-3 of their norm from fp64, where
exact products rounded once are 1.7e-3 from it.

Each query's dq and dw come from one program. So do dk's parts of a tile of keys in dense attention, each of a
span of queries, which are added up in order. Where entries are selected the programs of queries add to dk's
rows as they come (fp32 atomics: the last bits differ from run to run); under
`torch.use_deterministic_algorithms(True)` rows are kept in bf16, sorted by entry and added up in order.

Legend: B batch, S queries, C of them at a time, T compressed slots, N = T or entries attended to, h index
heads, c index channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, tl
from model.kernels.index_select import (
    SCORES_AT_ONCE,
    load_keys,
    power_of_two_from,
    seeing,
    warps_of_row,
    write_scores,
)

SPANS, LONGEST = 32, 512  # parts of dk in memory, but none of more queries: then there are more parts
ROWS_AT_ONCE = 1 << 20  # rows of dk in memory to be sorted
NONE, ATOMIC, KEPT = 0, 1, 2  # what programs of queries do with their rows of dk


class Setting(NamedTuple):
    """How work is cut up; tests/bench/indexer.py --tune compares settings."""

    entries: int  # of a tile of keys
    warps: int
    stages: int  # tiles in flight


SELECTED = Setting(128, 8, 3)  # scores of selected entries
OF_QUERIES = Setting(64, 4, 3)  # dq and dw in dense attention
OF_SELECTED = Setting(64, 8, 3)  # dq, dw and rows of dk where entries are selected
OF_KEYS = Setting(128, 4, 3)  # dk in dense attention; ptxas serialises its products with some others


def hull(attended: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, S, N] bool the first that is set and the one after the last, int32 [B, S]; end 0 if none is."""
    flags = attended.view(torch.uint8)
    end = (flags.shape[-1] - flags.flip(-1).argmax(-1)) * flags.amax(-1)
    return flags.argmax(-1).int(), end.int()


@operator("index_divergence")
def index_divergence(
    q: Tensor, k: Tensor, weights: Tensor, mass: Tensor, attended: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergences [B, S] fp32 and slopes [B, S, N] of all real queries, and the hull of `attended`.

    `attended` is a mask [B, S, T], or indices int32 [B, S, N], -1 at the end; mass [B, S, N] fp32.
    """
    q, k, weights, mass, attended, real = (x.contiguous() for x in (q, k, weights, mass, attended, real))
    (batch, length, *_), width = q.shape, mass.shape[2]
    losses, slopes, first, end = _empty_divergence(q, k, weights, mass, attended, real)
    if not width:
        return losses.zero_(), slopes, first.zero_(), end.zero_()
    flags = attended if attended.dtype == torch.bool else attended >= 0
    for mine, found in zip((first, end), hull(flags), strict=True):
        mine.copy_(found)
    count = min(length, max(1, SCORES_AT_ONCE // (batch * width)))
    scores = q.new_empty(batch, count, width, dtype=torch.float32)
    padded = power_of_two_from(width)
    for start in range(0, length, count):
        if attended.dtype == torch.bool:
            write_scores(scores, q, k, weights, first, end, start=start)
        else:
            _write_selected(scores, start, q, k, weights, attended, end)
        grid, sizes = (min(count, length - start), batch), (start, length, count, width, padded)
        inputs = scores, mass, flags, real
        _divergence_kernel[grid](*inputs, losses, slopes, *sizes, num_warps=warps_of_row(padded))
    return losses, slopes, first, end


@torch.library.register_fake("fourfold::index_divergence")
def _empty_divergence(
    q: Tensor, k: Tensor, weights: Tensor, mass: Tensor, attended: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, end = (real.new_empty(real.shape, dtype=torch.int32) for _ in range(2))
    losses = mass.new_empty(real.shape, dtype=torch.float32)
    return losses, q.new_empty(mass.shape), first, end


def _write_selected(
    scores: Tensor, start: int, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor, end: Tensor
) -> None:
    """Scores [B, C, N] of the queries from `start` on at their `end` selected entries."""
    (batch, length, heads, channels), (count, width) = q.shape, scores.shape[1:]
    entries, warps, stages = SELECTED
    _selected_kernel[(min(count, length - start), batch)](
        q, k, weights, indices, end, scores, start, length, count, k.shape[1], width,
        heads, channels, entries, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@operator("index_divergence_backward")
def index_divergence_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    slopes: Tensor,
    first: Tensor,
    end: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and weights from that of the divergences [B, S] fp32."""
    grad, q, k, weights = (x.contiguous() for x in (grad, q, k, weights))
    found = torch.empty_like(q), torch.empty_like(weights)
    known = grad, q, k, weights, slopes, first, end
    (batch, length), width = q.shape[:2], slopes.shape[2]
    if indices is None:
        _grad_of_queries(*known, indices, *found, k, NONE, 0, length)
        return found[0], _grad_of_keys(*known), found[1]
    indices, dk = indices.contiguous(), torch.zeros_like(k, dtype=torch.float32)
    if not deterministic:
        _grad_of_queries(*known, indices, *found, dk, ATOMIC, 0, length)
        return found[0], dk.to(k.dtype), found[1]
    count = min(length, max(1, ROWS_AT_ONCE // max(1, batch * width)))
    rows = k.new_empty(batch, count, width, k.shape[2])
    for start in range(0, length, count):
        _grad_of_queries(*known, indices, *found, rows, KEPT, start, count)
        _add_sorted(rows, indices[:, start : start + count], dk)
    return found[0], dk.to(k.dtype), found[1]


@torch.library.register_fake("fourfold::index_divergence_backward")
def _(grad, q, k, weights, indices, slopes, first, end, deterministic):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(weights)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, weights, _, attended, _ = inputs
    indices = None if attended.dtype == torch.bool else attended
    ctx.save_for_backward(q, k, weights, indices, *output[1:])
    ctx.set_materialize_grads(False)  # zeros of what has none: as large as slopes


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return *index_divergence_backward(grad, *ctx.saved_tensors, deterministic), None, None, None


torch.library.register_autograd("fourfold::index_divergence", _backward, setup_context=_save)


def _grad_of_queries(
    grad: Tensor, q: Tensor, k: Tensor, weights: Tensor, slopes: Tensor, first: Tensor, end: Tensor,
    indices: Tensor | None, dq: Tensor, dw: Tensor, dk: Tensor, rows: int, start: int, count: int,
) -> None:  # fmt: skip
    """dq and dw of `count` queries from `start` on; as `rows` says their rows of dk, [B, T or C * N, c]."""
    batch, length, heads, channels = q.shape
    entries, warps, stages = OF_QUERIES if indices is None else OF_SELECTED
    _queries_kernel[(min(count, length - start), batch)](
        grad, q, k, weights, slopes, first, end, first if indices is None else indices, dq, dw, dk,
        start, length, count, k.shape[1], slopes.shape[2], heads, channels, entries,
        indices is not None, rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _grad_of_keys(
    grad: Tensor, q: Tensor, k: Tensor, weights: Tensor, slopes: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    """dk [B, T, c] of dense attention."""
    (batch, length, heads, channels), slots = q.shape, k.shape[1]
    entries, warps, stages = OF_KEYS
    span = min(LONGEST, max(64, -(-length // SPANS)))
    parts = k.new_empty(-(-length // span), *k.shape, dtype=torch.float32)
    _keys_kernel[(-(-slots // entries), len(parts), batch)](
        grad, q, k, weights, slopes, first, end, parts, length, slots, span,
        heads, channels, entries, LONGEST, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return parts.sum(0).to(k.dtype)


def _add_sorted(rows: Tensor, indices: Tensor, dk: Tensor) -> None:
    """Add rows [B, C, N, c] of indices [B, C', N], C' <= C, to dk [B, T, c], in the order of queries."""
    (batch, slots, channels), (count, width) = dk.shape, rows.shape[1:3]
    row = torch.arange(batch, device=dk.device, dtype=torch.int32).view(-1, 1, 1)
    entry = torch.where(indices < 0, batch * slots, indices + row * slots).flatten(1)
    entry, order = entry.flatten().sort(stable=True)
    bounds = torch.searchsorted(entry, torch.arange(batch * slots + 1, device=dk.device, dtype=torch.int32))
    mine = indices[0].numel()  # rows of a batch row begin at multiples of C * N
    order = order + order // max(1, mine) * (count * width - mine)
    _add_kernel[(batch * slots,)](rows, order, bounds, dk, channels, 32)


@launched
@jit(varying=("start",))
def _selected_kernel(
    q, k, weights, indices, end, scores, start, S, C, T, N,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * S + start + t
    query, w = load_query(q, weights, row, HEADS, CHANNELS)
    for n in range(0, tl.load(end + row), ENTRIES):
        column = n + tl.arange(0, ENTRIES)
        slots = tl.load(indices + row * N + column, mask=column < N, other=-1)
        keys = load_keys(k + b * T * CHANNELS, slots, slots >= 0, CHANNELS)
        score = tl.sum(tl.maximum(tl.dot(keys, tl.trans(query)), 0.0) * w[None, :], 1)
        tl.store(scores + (b * C + t) * N + column, score, mask=column < N)


@jit
def load_query(q, weights, row, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """The heads [h, c] of a query, and their weights [h] in fp32."""
    head = row * HEADS + tl.arange(0, HEADS)
    query = tl.load(q + head[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :])
    return query, tl.load(weights + head).to(tl.float32)


@launched
@jit(varying=("start",))
def _divergence_kernel(
    scores, mass, attended, real, losses, slopes, start, S, C, N, WIDTH: tl.constexpr
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * S + start + t
    column = tl.arange(0, WIDTH)
    seen = tl.load(attended + row * N + column, mask=column < N, other=0) != 0
    score = tl.load(scores + (b * C + t) * N + column, mask=seen, other=float("-inf"))
    counts = seen & (tl.load(real + row) != 0)
    teacher = tl.load(mass + row * N + column, mask=counts, other=0.0)
    teacher = teacher / tl.maximum(tl.sum(teacher, 0), 1.1754943508222875e-38)  # fp32's tiny
    score -= tl.maximum(tl.max(score, 0), -3.4028234663852886e38)  # -inf of none stays -inf
    log_student = score - tl.log(tl.sum(tl.exp(score), 0))
    taught = teacher > 0
    loss = tl.where(taught, teacher * (tl.log(tl.where(taught, teacher, 1.0)) - log_student), 0.0)
    tl.store(losses + row, tl.sum(loss, 0))
    slope = tl.where(seen, tl.sum(teacher, 0) * tl.exp(log_student) - teacher, 0.0)
    tl.store(slopes + row * N + column, slope.to(slopes.dtype.element_ty), mask=column < N)


@launched
@jit(varying=("start",))
def _queries_kernel(
    grad, q, k, weights, slopes, first, end, indices, dq, dw, dk, start, S, C, T, N,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
    SELECTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * S + start + t
    query, w = load_query(q, weights, row, HEADS, CHANNELS)
    scale = tl.load(grad + row)
    weighted = (query.to(tl.float32) * (scale * w)[:, None]).to(query.dtype)
    channels = tl.arange(0, CHANNELS)
    u = tl.zeros((CHANNELS, HEADS), tl.float32)
    for n in range(tl.load(first + row) // ENTRIES * ENTRIES, tl.load(end + row), ENTRIES):
        column = n + tl.arange(0, ENTRIES)
        slots = column
        if SELECTED:
            slots = tl.load(indices + row * N + column, mask=column < N, other=-1)
        inside = (column < N) & (slots >= 0)
        slope = tl.load(slopes + row * N + column, mask=inside, other=0.0)
        keys = load_keys(k + b * T * CHANNELS, slots, inside, CHANNELS)
        g = tl.where(tl.dot(keys, tl.trans(query)) > 0, slope[:, None], 0.0)  # [ENTRIES, h]
        u = tl.dot(tl.trans(keys), g, u)
        if ROWS != 0:
            rows = tl.dot(g, weighted)  # [ENTRIES, c]
            if ROWS == 1:
                place = (b * T + slots)[:, None] * CHANNELS + channels[None, :]
                tl.atomic_add(dk + place, rows, mask=inside[:, None], sem="relaxed")
            else:
                place = ((b * C + t) * N + column)[:, None] * CHANNELS + channels[None, :]
                tl.store(dk + place, rows.to(dk.dtype.element_ty), mask=inside[:, None])
    head = row * HEADS + tl.arange(0, HEADS)
    u *= scale
    tl.store(dw + head, tl.sum(u * tl.trans(query), 0).to(dw.dtype.element_ty))
    tl.store(dq + head[None, :] * CHANNELS + channels[:, None], (u * w[None, :]).to(dq.dtype.element_ty))


@launched
@jit
def _keys_kernel(
    grad, q, k, weights, slopes, first, end, parts, S, T, SPAN,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    slot, span, b = tl.program_id(0) * ENTRIES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, count = b * S + span * SPAN, tl.minimum(SPAN, S - span * SPAN)
    low, high = seeing(first + row, end + row, count, slot, ENTRIES, 0, LONGEST)
    slots = slot + tl.arange(0, ENTRIES)
    keys = load_keys(k + b * T * CHANNELS, slots, slots < T, CHANNELS)
    dk = tl.zeros((ENTRIES, CHANNELS), tl.float32)
    for i in range(low, high):
        query, w = load_query(q, weights, row + i, HEADS, CHANNELS)
        slope = tl.load(slopes + (row + i) * T + slots, mask=slots < T, other=0.0).to(tl.float32)
        w *= tl.load(grad + row + i)
        g = tl.where(tl.dot(keys, tl.trans(query)) > 0, slope[:, None] * w[None, :], 0.0)  # [ENTRIES, h]
        dk = tl.dot(g.to(query.dtype), query, dk)
    part = (span.to(tl.int64) * tl.num_programs(2) + b) * T
    place = (part + slots)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tl.store(parts + place, dk, mask=(slots < T)[:, None])


@launched
@jit
def _add_kernel(rows, order, bounds, dk, CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    start, stop = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(start, stop, AT_ONCE):
        n = i + tl.arange(0, AT_ONCE)
        row = tl.load(order + n, mask=n < stop, other=0)
        part = tl.load(
            rows + row[:, None] * CHANNELS + channels[None, :], mask=(n < stop)[:, None], other=0.0
        )
        total += tl.sum(part.to(tl.float32), 0)
    place = dk + entry * CHANNELS + channels
    tl.store(place, tl.load(place) + total)
