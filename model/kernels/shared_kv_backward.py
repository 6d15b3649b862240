"""Backward of `model.kernels.shared_kv`, from lse and delta_th = sum_c dout_thc out_thc, the sink's part too.

    p = 2^(s - lse),  ds_tj = p_tj (dout_th . k_j - delta_th),  dsink_h = -sum_t p_sink delta_th
    dq_th = scale sum_j ds_tj k_j,    dk_j = sum_th (scale ds_tj q_th + p_tj dout_th)

The query's and the output gradient's rows are loaded as one tile, so that one product with the keys gives s
and dout . k, and another one dk: [scale ds, p] times [q; dout]. Shared memory has no room for dq's and dk's
tiles together, so each has a kernel, and s is computed twice:

    queries   a program for each tile of rows, as in forward, which computes delta as well
    keys      a program for each tile of keys and part of the rows that see it; parts are added up in order
    gathered  a program for each query and 64 heads adds to its entries' gradients: atomically, in no order;
              or, to get the same bits every time, it writes in bf16 what a sum over sorted entries adds up

Legend: as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, tl
from model.kernels.shared_kv import (
    LOG2_E,
    Setting,
    constants_of,
    far_span,
    gathered_span,
    grid_of,
    is_gathered,
    keys_of,
    readable,
    rows_of,
    span_of,
)

DQ = Setting(64, 64, 8, 1)
DKV = Setting(32, 64, 8, 2)
GATHERED = Setting(64, 64, 8, 1)
PROGRAMS = 1024  # that gradients of keys are cut into, at least, where there are so many rows
PARTIAL_BYTES = 1 << 30  # of what gathered gradients are summed from, at once


@operator("shared_kv_backward")
def backward(
    grad: Tensor, q: Tensor, kv: Tensor, near: Tensor, entries: Tensor, far: Tensor, chosen: Tensor | None,
    sinks: Tensor, out: Tensor, lse: Tensor, repeatable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv, entries and sinks."""
    grad, q, kv, near, entries, far = (x.contiguous() for x in (grad, q, kv, near, entries, far))
    (chosen,) = readable(chosen)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    if not q.numel():
        return dq, torch.zeros_like(kv), torch.zeros_like(entries), torch.zeros_like(sinks)
    constants, scale = constants_of(q, chosen, DQ), q.shape[3] ** -0.5
    _dq_kernel[grid_of(q, constants)](
        q, grad, kv, near, entries, far, chosen, out, lse, dq, delta,
        q.shape[1], kv.shape[1], entries.shape[1], scale, **constants,
    )  # fmt: skip
    dkv = _of_keys(q, grad, kv, near, None, lse, delta)
    if chosen is not None and is_gathered(chosen):
        gathered = _of_gathered_repeatably if repeatable else _of_gathered
        dentries = gathered(q, grad, entries, chosen, lse, delta)
    else:
        dentries = _of_keys(q, grad, entries, far, chosen, lse, delta)
    dsinks = -(torch.exp2(sinks.float() * LOG2_E - lse) * delta).sum((0, 1))
    return dq, dkv, dentries, dsinks.to(sinks.dtype)


@torch.library.register_fake("fourfold::shared_kv_backward")
def _(grad, q, kv, near, entries, far, chosen, sinks, out, lse, repeatable):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv, entries, sinks))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.repeatable = torch.are_deterministic_algorithms_enabled()


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dkv, dentries, dsinks = backward(grad, *ctx.saved_tensors, ctx.repeatable)
    return dq, dkv, None, dentries, None, None, dsinks


torch.library.register_autograd("fourfold::shared_kv_forward", _gradients, setup_context=_save)


def _of_keys(
    q: Tensor, grad: Tensor, keys: Tensor, spans: Tensor, mask: Tensor | None, lse: Tensor, delta: Tensor
) -> Tensor:
    """Gradient of keys [B, N, C] that queries see by spans and, if there is one, by a mask."""
    batch, count, _ = keys.shape
    if not count:
        return torch.zeros_like(keys)
    constants = constants_of(q, mask, DKV)
    del constants["K"], constants["BLOCK"]
    tiles = -(-count // DKV.keys)
    parts = min(256, 1 << max(0, (PROGRAMS // (tiles * batch)).bit_length() - 1))
    partial = keys.new_empty(parts, *keys.shape, dtype=torch.float32)
    _dkv_kernel[(tiles, parts, batch)](
        q, grad, keys, spans, mask, _readers(spans, tiles, DKV.keys), lse, delta, partial,
        q.shape[1], count, q.shape[3] ** -0.5, **constants,
    )  # fmt: skip
    return partial.sum(0).to(keys.dtype)


def _readers(spans: Tensor, tiles: int, width: int) -> Tensor:
    """[B, tiles, 2] int32: the first query that sees any key of a tile, and the one after the last."""
    start = torch.arange(0, tiles * width, width, device=spans.device, dtype=spans.dtype)
    start = start.expand(len(spans), tiles).contiguous()
    first, end = (x.contiguous() for x in spans.unbind(-1))
    ranges = (
        torch.searchsorted(end, start, right=True, out_int32=True),
        torch.searchsorted(first, start + width, out_int32=True),
    )
    return torch.stack(ranges, dim=-1)


def _of_gathered(
    q: Tensor, grad: Tensor, entries: Tensor, chosen: Tensor, lse: Tensor, delta: Tensor
) -> Tensor:
    """Gradient of entries by atomic additions."""
    total = torch.zeros_like(entries, dtype=torch.float32)
    _gathered_kernel_of(q, grad, entries, chosen, lse, delta, total, 0, q.shape[1], False)
    return total.to(entries.dtype)


def _of_gathered_repeatably(
    q: Tensor, grad: Tensor, entries: Tensor, chosen: Tensor, lse: Tensor, delta: Tensor
) -> Tensor:
    """The same bits every time: chunks of queries in turn, whose parts are sorted by entry."""
    batch, slots, channels = entries.shape
    count = chosen.shape[2]
    blocks = -(-q.shape[2] // GATHERED.rows)
    total = torch.zeros_like(entries, dtype=torch.float32)
    row = torch.arange(batch, device=q.device, dtype=torch.int32).view(-1, 1, 1, 1) * slots
    edges = torch.arange(batch * slots + 1, device=q.device, dtype=torch.int32)
    chunk = max(1, PARTIAL_BYTES // max(1, batch * blocks * count * channels * 2))
    for start in range(0, q.shape[1], chunk):
        own = chosen[:, start : start + chunk].unsqueeze(2)  # [B, s, 1, k]
        length = own.shape[1]
        target = torch.where(own < 0, batch * slots, own + row).expand(-1, -1, blocks, -1)
        entry, order = target.flatten().sort(stable=True)
        partial = q.new_empty(batch, length, blocks, count, channels)
        _gathered_kernel_of(q, grad, entries, chosen, lse, delta, partial, start, length, True)
        borders = torch.searchsorted(entry, edges, out_int32=True)
        _segment_kernel[(batch * slots,)](partial, order, borders, total, channels, num_warps=4)
    return total.to(entries.dtype)


def _gathered_kernel_of(
    q: Tensor, grad: Tensor, entries: Tensor, chosen: Tensor, lse: Tensor, delta: Tensor, target: Tensor,
    start: int, length: int, repeatable: bool,
) -> None:  # fmt: skip
    constants = constants_of(q, chosen, GATHERED)
    del constants["CHOSEN"], constants["HEADS"]
    grid = (length, -(-q.shape[2] // GATHERED.rows), len(q))
    _gathered_kernel[grid](
        q, grad, entries, chosen, lse, delta, target, q.shape[1], entries.shape[1], start,
        q.shape[3] ** -0.5, **constants, REPEATABLE=repeatable,
    )  # fmt: skip


@launched
@jit(varying=("S", "N", "T"))
def _dq_kernel(
    q, grad, kv, near, entries, far, chosen, out, lse, dq, delta, S, N, T, scale,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """8 rows of q, then their 8 of dout, and so on: a thread has s and dout . k of the same pairs."""
    b, channels = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    query, head, exists = rows_of(tl.program_id(0), tl.arange(0, ROWS), S, H, ROWS, HEADS)
    row = (b * S + query) * H + head
    own = row[:, None] * C + channels[None, :]
    along = tl.sum(tl.load(out + own).to(tl.float32) * tl.load(grad + own).to(tl.float32), 1)
    tl.store(delta + row, along, mask=exists)
    minus = tl.load(lse + row)

    pair = tl.arange(0, 2 * ROWS)
    pair_query, pair_head, _ = rows_of(tl.program_id(0), pair // 16 * 8 + pair % 8, S, H, ROWS, HEADS)
    pair_row = (b * S + pair_query) * H + pair_head
    x = tl.load(tl.where(pair // 8 % 2 == 0, q, grad)[:, None] + pair_row[:, None] * C + channels[None, :])

    near_first, near_end, near_start, near_tiles = span_of(near, b * S + query, KEYS)
    far_first, far_end, far_start, far_tiles = far_span(far, chosen, b * S + query, K, BLOCK, CHOSEN, KEYS)
    acc = tl.zeros((ROWS, C), tl.float32)
    for i in range(near_tiles + far_tiles):
        is_near = i < near_tiles
        start = tl.where(is_near, near_start + i * KEYS, far_start + (i - near_tiles) * KEYS)
        first, end = tl.where(is_near, near_first, far_first), tl.where(is_near, near_end, far_end)
        place, seen = keys_of(chosen, b * S + query, start, first, end, ~is_near, T, K, CHOSEN, KEYS)
        place = tl.minimum(tl.maximum(place, 0), tl.where(is_near, N, T) - 1)
        source = tl.where(is_near, kv + b * N * C, entries + b * T * C)
        k = tl.load(source + place[:, None].to(tl.int64) * C + channels[None, :])
        both = tl.reshape(tl.dot(x, tl.trans(k)), (ROWS // 8, 2, 8, KEYS))
        s, along_k = tl.split(tl.permute(both, (0, 2, 3, 1)))
        s, along_k = tl.reshape(s, (ROWS, KEYS)), tl.reshape(along_k, (ROWS, KEYS))
        s = s * (scale * 1.4426950408889634) - minus[:, None]
        p = tl.exp2(tl.where(seen, s, -float("inf")))
        acc = tl.dot((p * (along_k - along[:, None])).to(k.dtype), k, acc)
    acc *= scale
    tl.store(dq + row[:, None] * C + channels[None, :], acc.to(dq.dtype.element_ty), mask=exists[:, None])


@launched
@jit(varying=("S", "N"))
def _dkv_kernel(
    q, grad, keys, spans, mask, readers, lse, delta, partial, S, N, scale,
    H: tl.constexpr, C: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    b, channels = tl.program_id(2).to(tl.int64), tl.arange(0, C)
    place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    k = tl.load(keys + (b * N + tl.minimum(place, N - 1)[:, None]) * C + channels[None, :])
    reader = readers + (b * tl.num_programs(0) + tl.program_id(0)) * 2
    lowest, highest = tl.load(reader), tl.load(reader + 1)
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    queries: tl.constexpr = ROWS // HEADS
    tiles = tl.cdiv(tl.maximum(highest - lowest, 0), queries) * blocks
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * each
    row, pair = tl.arange(0, ROWS), tl.arange(0, 2 * ROWS)
    acc = tl.zeros((KEYS, C), tl.float32)
    for i in range(begin, tl.minimum(begin + each, tiles)):
        base, heads = lowest + i // blocks * queries, i % blocks * HEADS
        query, head = base + row // HEADS, heads + row % HEADS
        exists = (query < highest) & (head < H)
        query, head = tl.minimum(query, S - 1), tl.minimum(head, H - 1)
        pair_query = tl.minimum(base + pair // 2 // HEADS, S - 1)
        pair_head = tl.minimum(heads + pair // 2 % HEADS, H - 1)
        pair_row = (b * S + pair_query) * H + pair_head
        x = tl.load(tl.where(pair % 2 == 0, q, grad)[:, None] + pair_row[:, None] * C + channels[None, :])
        first, end = tl.load(spans + 2 * (b * S + query)), tl.load(spans + 2 * (b * S + query) + 1)
        seen = exists[None, :] & (place[:, None] >= first[None, :]) & (place[:, None] < end[None, :])
        if CHOSEN == 1:
            own = mask + (b * S + query[None, :]) * N + place[:, None]
            seen = seen & (tl.load(own, mask=seen, other=0) != 0)
        at = (b * S + query) * H + head
        minus, along = tl.load(lse + at), tl.load(delta + at)
        y = tl.dot(k, tl.trans(x))
        if i >= 0:  # see `model.kernels.shared_kv`
            y = weights_of(y, seen, minus, along, scale, KEYS, ROWS)
        acc = tl.dot(y.to(k.dtype), x, acc)
    target = partial + (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + b) * N * C
    tl.store(target + place[:, None].to(tl.int64) * C + channels[None, :], acc, mask=(place < N)[:, None])


@jit
def weights_of(both, seen, lse, delta, scale, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Products of keys with (q, dout) of each row, side by side [KEYS, 2 ROWS] -> (scale ds, p), likewise."""
    s, along = tl.split(tl.reshape(both, (KEYS, ROWS, 2)))
    p = tl.exp2(tl.where(seen, s * (scale * 1.4426950408889634) - lse[None, :], -float("inf")))
    ds = p * (along - delta[None, :]) * scale
    return tl.reshape(tl.join(ds, p), (KEYS, 2 * ROWS))


@launched
@jit(varying=("S", "T", "start"))
def _gathered_kernel(
    q, grad, entries, chosen, lse, delta, target, S, T, start, scale,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, REPEATABLE: tl.constexpr,
):  # fmt: skip
    b, channels = tl.program_id(2).to(tl.int64), tl.arange(0, C)
    query = b * S + start + tl.program_id(0)
    head, pair = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 2 * ROWS)
    pair_head = tl.minimum(tl.program_id(1) * ROWS + pair // 2, H - 1)
    pair_row = query * H + pair_head
    x = tl.load(tl.where(pair % 2 == 0, q, grad)[:, None] + pair_row[:, None] * C + channels[None, :])
    row = query * H + tl.minimum(head, H - 1)
    minus, along = tl.load(lse + row), tl.load(delta + row)
    if REPEATABLE:
        first = ((b * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)) * K
    begin, last = gathered_span(chosen + query * K, K, BLOCK)
    for i in range(0, tl.cdiv(tl.maximum(last - begin, 0), KEYS)):
        place = begin + i * KEYS + tl.arange(0, KEYS)
        index = tl.load(chosen + query * K + place, mask=place < K, other=-1)
        own = b * T + tl.maximum(index, 0)
        k = tl.load(entries + own[:, None] * C + channels[None, :])
        seen = (index >= 0)[:, None] & (head < H)[None, :]
        y = weights_of(tl.dot(k, tl.trans(x)), seen, minus, along, scale, KEYS, ROWS)
        part = tl.dot(y.to(k.dtype), x)
        if REPEATABLE:
            spot = target + (first + place[:, None]) * C + channels[None, :]
            tl.store(spot, part.to(target.dtype.element_ty), mask=(place < K)[:, None])
        else:
            halves = tl.split(tl.permute(tl.reshape(part, (KEYS, 2, 2, C // 4)), (0, 1, 3, 2)))
            for half in tl.static_range(2):  # of which a thread has whole rows; shared memory holds one
                column = tl.arange(0, C // 2)
                column = column // (C // 4) * (C // 2) + half * (C // 4) + column % (C // 4)
                spot = target + own[:, None] * C + column[None, :]
                tl.atomic_add(
                    spot, tl.reshape(halves[half], (KEYS, C // 2)), mask=(index >= 0)[:, None], sem="relaxed"
                )


@launched
@jit
def _segment_kernel(partial, order, borders, total, C: tl.constexpr):
    """Add to an entry's gradient [C] the parts that belong to it, always in the same order."""
    entry, channels, block = tl.program_id(0), tl.arange(0, C), tl.arange(0, 16)
    begin, end = tl.load(borders + entry), tl.load(borders + entry + 1)
    acc = tl.zeros((C,), tl.float32)
    for i in range(begin, end, 16):
        inside = i + block < end
        part = tl.load(order + i + block, mask=inside, other=0)
        rows = tl.load(partial + part[:, None] * C + channels[None, :], mask=inside[:, None], other=0.0)
        acc += tl.sum(rows.to(tl.float32), 0)
    target = total + entry.to(tl.int64) * C + channels
    tl.store(target, tl.load(target) + acc)
