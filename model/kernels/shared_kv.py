"""Attention of all heads to one key/value head on Hopper's tensor cores: forward, and what entries get.

A row is one head of one query; a program computes ROWS of them: HEADS heads of ROWS / HEADS queries, so that
all rows share every key, which is read once for both products. A query sees a span of the tokens and a span
of the entries, `first <= s < end`, neither of which decreases along a sequence. Of its span of entries it
attends to

    all,  those of a mask [B, S, T],  or k that are gathered by their indices [B, S, k]    (CHOSEN 0, 1, 2)

Tokens and entries are one loop and one softmax, which begins with the sink: no partial outputs in memory
(128 KB a query in fp32 with 64 heads of 512), and a query that sees nothing is no special case. Logits are in
units of log 2; lse [B, S, H] is log2 of what a row's exponentials are divided by, the sink's included.

A tile of 64 rows is what fits: with 512 channels the queries and two tiles of keys take 192 of 227 KB, and
the output a half of all registers. Where a product feeds another one, Triton has every warpgroup compute all
of its columns; `if i >= 0`, which always holds, hides this from it, and each computes a half.

Legend: B batch, S sequence, N keys of a source (tokens or entries), T compressed slots, H heads, C channels,
k chosen entries, spans [B, S, 2] int32: first and end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, tl

LOG2_E = 1.4426950408889634


class Setting(NamedTuple):
    """How a kernel is cut up; tests/bench/attention.py --tune compares settings."""

    rows: int
    keys: int
    warps: int
    stages: int  # tiles of what is loaded in a loop, in flight


FORWARD, GATHERED_FORWARD = Setting(64, 64, 8, 2), Setting(64, 64, 8, 2)
MASS, GATHERED_MASS = Setting(128, 64, 8, 1), Setting(64, 64, 8, 2)


def constants_of(q: Tensor, chosen: Tensor | None, setting: Setting) -> dict[str, int]:
    """What a kernel is compiled for. A tile has only one query where its keys are its own."""
    gathered, heads = is_gathered(chosen), q.shape[2]
    count = chosen.shape[2] if chosen is not None and gathered else 0
    return {
        "H": heads,
        "C": q.shape[3],
        "K": count,
        "BLOCK": _power(count),
        "CHOSEN": 2 if gathered else int(chosen is not None),
        "ROWS": setting.rows,
        "KEYS": setting.keys,
        "HEADS": setting.rows if gathered else min(setting.rows, _power(heads)),
        "num_warps": setting.warps,
        "num_stages": setting.stages,
    }


def grid_of(q: Tensor, constants: dict[str, int]) -> tuple[int, int]:
    """Tiles of rows, as `rows_of` numbers them, and batch."""
    batch, length, heads, _ = q.shape
    queries = constants["ROWS"] // constants["HEADS"]
    return -(-length // queries) * -(-heads // constants["HEADS"]), batch


def is_gathered(chosen: Tensor | None) -> bool:
    return chosen is not None and chosen.dtype == torch.int32


def readable(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and masks as bytes: as kernels take them."""
    whole = [None if x is None else x.contiguous() for x in tensors]
    return [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in whole]


def _power(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, size - 1).bit_length()


@operator("shared_kv_forward")
def forward(
    q: Tensor, kv: Tensor, near: Tensor, entries: Tensor, far: Tensor, chosen: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, C] and lse [B, S, H].

    Queries see spans `near` of kv [B, N, C] and `far` of entries [B, T, C], of these all or the `chosen`:
    bool [B, S, T], or indices int32 [B, S, k], -1 for none.
    """
    out, lse = _empty_forward(q, kv, near, entries, far, chosen, sinks)
    if q.numel():
        constants = constants_of(q, chosen, GATHERED_FORWARD if is_gathered(chosen) else FORWARD)
        _forward_kernel[grid_of(q, constants)](
            *readable(q, kv, near, entries, far, chosen, sinks), out, lse,
            q.shape[1], kv.shape[1], entries.shape[1], q.shape[3] ** -0.5 * LOG2_E, **constants,
        )  # fmt: skip
    return out, lse


@torch.library.register_fake("fourfold::shared_kv_forward")
def _empty_forward(
    q: Tensor, kv: Tensor, near: Tensor, entries: Tensor, far: Tensor, chosen: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("entry_mass")
def entry_mass(q: Tensor, entries: Tensor, far: Tensor, chosen: Tensor | None, lse: Tensor) -> Tensor:
    """Probabilities summed over heads, fp32: [B, S, T], or [B, S, k] at chosen indices."""
    constants = constants_of(q, chosen, GATHERED_MASS if is_gathered(chosen) else MASS)
    blocks = -(-q.shape[2] // constants["HEADS"])  # of heads; each adds up its own
    mass = _empty_mass(q, entries, far, chosen, lse)
    parts = mass.new_zeros(blocks, *mass.shape)
    if parts.numel():
        _mass_kernel[grid_of(q, constants)](
            *readable(q, entries, far, chosen, lse), parts,
            q.shape[1], entries.shape[1], q.shape[3] ** -0.5 * LOG2_E, parts.stride(0), **constants,
        )  # fmt: skip
    return parts.sum(0) if blocks > 1 else parts.squeeze(0)


@torch.library.register_fake("fourfold::entry_mass")
def _empty_mass(q: Tensor, entries: Tensor, far: Tensor, chosen: Tensor | None, lse: Tensor) -> Tensor:
    slots = entries.shape[1] if chosen is None else chosen.shape[2]
    return q.new_empty(*q.shape[:2], slots, dtype=torch.float32)


@launched
@jit(varying=("S", "N", "T"))
def _forward_kernel(
    q, kv, near, entries, far, chosen, sinks, out, lse, S, N, T, scale,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    b, channels = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    query, head, exists = rows_of(tl.program_id(0), tl.arange(0, ROWS), S, H, ROWS, HEADS)
    row = (b * S + query) * H + head
    x = tl.load(q + row[:, None] * C + channels[None, :])
    near_first, near_end, near_start, near_tiles = span_of(near, b * S + query, KEYS)
    far_first, far_end, far_start, far_tiles = far_span(far, chosen, b * S + query, K, BLOCK, CHOSEN, KEYS)
    m = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # LOG2_E
    total, acc = tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS, C), tl.float32)
    for i in range(near_tiles + far_tiles):
        is_near = i < near_tiles
        start = tl.where(is_near, near_start + i * KEYS, far_start + (i - near_tiles) * KEYS)
        first, end = tl.where(is_near, near_first, far_first), tl.where(is_near, near_end, far_end)
        place, seen = keys_of(chosen, b * S + query, start, first, end, ~is_near, T, K, CHOSEN, KEYS)
        place = tl.minimum(tl.maximum(place, 0), tl.where(is_near, N, T) - 1)
        source = tl.where(is_near, kv + b * N * C, entries + b * T * C)
        k = tl.load(source + place[:, None].to(tl.int64) * C + channels[None, :])
        s = tl.where(seen, tl.dot(x, tl.trans(k)) * scale, -float("inf"))
        p, fade = s, m
        if i >= 0:
            highest = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - highest[:, None])
            fade = tl.exp2(m - highest)
            total = total * fade + tl.sum(p, 1)
            m = highest
        acc = tl.dot(p.to(k.dtype), k, acc * fade[:, None])
    acc /= total[:, None]
    tl.store(out + row[:, None] * C + channels[None, :], acc.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + row, m + tl.log2(total), mask=exists)


@launched
@jit(varying=("S", "T", "stride"))
def _mass_kernel(
    q, entries, far, chosen, lse, mass, S, T, scale, stride,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    b, channels = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    query, head, exists = rows_of(tl.program_id(0), tl.arange(0, ROWS), S, H, ROWS, HEADS)
    row = (b * S + query) * H + head
    x = tl.load(q + row[:, None] * C + channels[None, :])
    minus = tl.load(lse + row)
    first, end, far_start, tiles = far_span(far, chosen, b * S + query, K, BLOCK, CHOSEN, KEYS)
    QUERIES: tl.constexpr = ROWS // HEADS
    one, _, one_exists = rows_of(tl.program_id(0), tl.arange(0, QUERIES) * HEADS, S, H, ROWS, HEADS)
    width = K if CHOSEN == 2 else T
    target = (
        mass + (tl.program_id(0) % tl.cdiv(H, HEADS)).to(tl.int64) * stride + (b * S + one[:, None]) * width
    )
    for i in range(tiles):
        column = far_start + i * KEYS + tl.arange(0, KEYS)
        start = far_start + i * KEYS
        place, seen = keys_of(chosen, b * S + query, start, first, end, True, T, K, CHOSEN, KEYS)
        place = tl.minimum(tl.maximum(place, 0), T - 1)
        k = tl.load(entries + (b * T + place[:, None]) * C + channels[None, :])
        s = tl.dot(x, tl.trans(k)) * scale - minus[:, None]
        p = tl.exp2(tl.where(seen & exists[:, None], s, -float("inf")))
        p = tl.sum(tl.reshape(p, (QUERIES, HEADS, KEYS)), 1)
        tl.store(target + column[None, :], p, mask=one_exists[:, None] & (column < width)[None, :])


@jit
def rows_of(tile, row, S, H: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Query and head of rows of a tile, and which exist; others repeat some that do.

    Tiles of one query lie side by side, and the last queries, which see most, come first.
    """
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    queries: tl.constexpr = ROWS // HEADS
    query = (tl.cdiv(S, queries) - 1 - tile // blocks) * queries + row // HEADS
    head = tile % blocks * HEADS + row % HEADS
    return tl.minimum(query, S - 1), tl.minimum(head, H - 1), (query < S) & (head < H)


@jit
def span_of(spans, query, KEYS: tl.constexpr):
    """first and end of each row's query; where tiles of keys begin, and how many cover all spans."""
    first, end = tl.load(spans + 2 * query), tl.load(spans + 2 * query + 1)
    start = tl.min(first, 0)
    return first, end, start, tl.cdiv(tl.maximum(tl.max(end, 0) - start, 0), KEYS)


@jit
def far_span(
    far, chosen, query, K: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr, KEYS: tl.constexpr
):
    """`span_of` entries; if they are gathered, of indices of the only query."""
    first, end, start, tiles = span_of(far, query, KEYS)
    if CHOSEN == 2:
        start, last = gathered_span(chosen + tl.min(query, 0) * K, K, BLOCK)
        first, end = first * 0 + start, end * 0 + last
        tiles = tl.cdiv(tl.maximum(last - start, 0), KEYS)
    return first, end, start, tiles


@jit
def gathered_span(own, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where among its K indices the first is that a query has, and the place after the last."""
    place = tl.arange(0, BLOCK)
    has = tl.load(own + place, mask=place < K, other=-1) >= 0
    return tl.min(tl.where(has, place, K), 0), tl.max(tl.where(has, place + 1, 0), 0)


@jit
def keys_of(
    chosen, query, start, first, end, is_far, T, K: tl.constexpr, CHOSEN: tl.constexpr, KEYS: tl.constexpr
):
    """Where in their source the keys of a tile lie [KEYS], and which of them each row sees [ROWS, KEYS]."""
    place = start + tl.arange(0, KEYS)
    seen = (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
    if CHOSEN == 1:
        own = chosen + query[:, None] * T + place[None, :]
        seen = seen & (tl.load(own, mask=seen & is_far, other=1) != 0)
    if CHOSEN == 2:
        index = tl.load(chosen + tl.min(query, 0) * K + place, mask=is_far & (place < K), other=-1)
        place = tl.where(is_far, index, place)
        seen = seen & (place >= 0)[None, :]
    return place, seen
