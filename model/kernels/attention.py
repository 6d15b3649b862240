"""Shared-KV attention over a sliding window, compressed entries and a sink, in one softmax.

    p_tj = exp(scale * q_th . k_j) / (exp(sink_h) + sum_i exp(scale * q_th . k_i)),   out_th = sum_j p_tj k_j

over j in the last `window` tokens of the query's document and its visible compressed entries; keys and
values are the same tensor, one head for all H queries (V4 report, section 2.3).

Legend: B batch, S sequence, W window, n blocks of W queries, T compressed slots, H heads, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels import shared_kv, shared_kv_backward  # noqa: F401  registers the backward
from model.kernels.gpu import runs_kernels
from model.kernels.indexer import mask_of
from model.norm import widen

LOGIT_BUDGET = 1 << 28  # attention logits that a layer holds at once; beyond it backward recomputes them
GATHER_ABOVE = 1  # slots for each selected entry, beyond which kernels gather instead of masking
Output = tuple[Tensor, Tensor | None]  # of blocks of queries: [B, n, W, H, C] and the mass [B, n, W, T]


class Seen(NamedTuple):
    """Which entries each query attends to: `first <= s < end`, and of those only the `chosen`, if given."""

    first: Tensor  # [B, S]; like end it never decreases along a row
    end: Tensor  # [B, S]
    chosen: Tensor | None = None  # bool [B, S, T], or indices in that span: int32 [B, S, k], -1 for none

    def mask(self, slots: int) -> Tensor:
        """[B, S, T] bool."""
        slot = torch.arange(slots, device=self.first.device)
        span = (slot >= self.first.unsqueeze(-1)) & (slot < self.end.unsqueeze(-1))
        if self.chosen is None:
            return span
        return span & (self.chosen if self.chosen.dtype == torch.bool else mask_of(self.chosen, slots))


def shared_kv_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Seen | Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    window: int,
) -> Tensor:
    """Attention output [B, S, H, C].

    q [B, S, H, C]; kv [B, S, C], or [B, window + S, C] that begins `window` tokens before the queries;
    entries [B, T, C] and who attends to them: `Seen`, or a mask [B, S, T] bool; or both None; sinks
    [H] fp32; positions [B, S] within the document (the window never reaches before position 0); `window` 0
    attends to entries only. No [B, S, H, S] exists.

    On Hopper and newer bf16 and fp16 with 64 to 512 channels, a power of two, go through the kernels of
    `shared_kv`. Gradients of selected entries that are gathered (GATHER_ABOVE) then are added up in no fixed
    order, unless `torch.use_deterministic_algorithms` asks for the same bits every time.
    """
    return _attention(q, kv, entries, visible, sinks, positions, window, with_mass=False)[0]


def attention_and_mass(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    visible: Seen | Tensor,
    sinks: Tensor,
    positions: Tensor,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The same, and what each query gives to each entry: sum_h p_tj, in fp32 or wider.

    Of shape [B, S, T], or, where entries are chosen by indices, [B, S, k] at those, 0 for none. It is taken
    before p is rounded to q's dtype, and carries no gradient.
    """
    out, mass = _attention(q, kv, entries, visible, sinks, positions, window, with_mass=True)
    assert mass is not None
    return out, mass


def _attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Seen | Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    window: int,
    with_mass: bool,
) -> Output:
    """Output [B, S, H, C] and, where asked for, mass."""
    if entries is None or visible is None:
        nothing = torch.zeros_like(positions)
        entries, visible = kv.new_zeros(len(kv), 0, kv.shape[2]), Seen(nothing, nothing)
    if isinstance(visible, Tensor):
        everything = torch.zeros_like(positions), torch.full_like(positions, entries.shape[1])
        visible = Seen(*everything, visible)
    seen = visible
    if _runs(q, kv, entries):
        return _with_kernels(q, kv, entries, seen, sinks, positions, window, with_mass)
    mask = seen.mask(entries.shape[1])
    out, mass = _in_blocks(q, kv, entries, mask, sinks, positions, window, with_mass)
    if mass is None or seen.chosen is None or seen.chosen.dtype == torch.bool:
        return out, mass
    at = torch.where(seen.chosen < 0, entries.shape[1], seen.chosen).long()
    return out, F.pad(mass, (0, 1)).gather(2, at)


def _runs(q: Tensor, kv: Tensor, entries: Tensor) -> bool:
    """Whether the kernels take these."""
    channels, dtypes = q.shape[-1], {q.dtype, kv.dtype, entries.dtype}
    narrow = dtypes in ({torch.bfloat16}, {torch.float16})
    return narrow and channels in (64, 128, 256, 512) and runs_kernels(q)


def _with_kernels(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    seen: Seen,
    sinks: Tensor,
    positions: Tensor,
    window: int,
    with_mass: bool,
) -> Output:
    end = torch.arange(1, q.shape[1] + 1, device=q.device) + (kv.shape[1] - q.shape[1])
    end = end.expand_as(positions) if window else torch.zeros_like(positions)
    near = torch.stack((end - (positions + 1).clamp(max=window), end), dim=-1).int()  # [B, S, 2]
    far, chosen = torch.stack((seen.first, seen.end), dim=-1).int(), seen.chosen
    attended = chosen
    if (
        chosen is not None
        and chosen.dtype == torch.int32
        and entries.shape[1] <= GATHER_ABOVE * chosen.shape[2]
    ):
        attended = mask_of(chosen, entries.shape[1])
    out, lse = shared_kv.forward(q, kv, near, entries, far, attended, sinks)
    with torch.no_grad():
        return out, shared_kv.entry_mass(q, entries, far, chosen, lse) if with_mass else None


def _in_blocks(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    visible: Tensor,
    sinks: Tensor,
    positions: Tensor,
    window: int,
    with_mass: bool,
) -> Output:
    """Output [B, S, H, C] and, where asked for, mass [B, S, T]; beyond LOGIT_BUDGET blocks go in turn."""
    batch, length, heads, _ = q.shape
    block = min(window, length) or min(128, length)
    blocks = -(-length // block)
    pad = blocks * block - length
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, block))  # [B, n, W, H, C]
    visible = F.pad(visible, (0, 0, 0, pad)).unflatten(1, (blocks, block))  # [B, n, W, T]
    positions = F.pad(positions, (0, pad)).unflatten(1, (blocks, block))  # [B, n, W]
    before = block - (kv.shape[1] - length)
    kv = F.pad(kv, (0, 0, before, pad)).unflatten(1, (blocks + 1, block))  # [B, n + 1, W, C]
    near = torch.cat((kv[:, :-1], kv[:, 1:]), dim=2) if window else kv[:, :-1, :0]  # [B, n, 2W, C]

    per_block = batch * block * heads * (near.shape[2] + entries.shape[1] + 1)
    at_once = max(1, LOGIT_BUDGET // per_block)
    if at_once >= blocks:
        out, mass = _attend(q, near, entries, visible, sinks, positions, with_mass)
    else:
        chunks = zip(*(x.split(at_once, 1) for x in (q, near, visible, positions)), strict=True)
        again = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
        parts = [again(qc, nc, entries, vc, sinks, pc, with_mass) for qc, nc, vc, pc in chunks]
        out = torch.cat([out for out, _ in parts], dim=1)
        mass = torch.cat([mass for _, mass in parts], dim=1) if with_mass else None
    return out.flatten(1, 2)[:, :length], None if mass is None else mass.flatten(1, 2)[:, :length]


def _attend(
    q: Tensor,
    near: Tensor,
    entries: Tensor,
    visible: Tensor,
    sinks: Tensor,
    positions: Tensor,
    with_mass: bool,
) -> Output:
    """Blocks of queries [B, n, W, H, C] against their 2W near tokens and all T entries."""
    batch, blocks, block, heads, channels = q.shape
    far = visible.shape[-1]
    near_logits = _scaled_product(q.reshape(batch * blocks, block * heads, channels), near.flatten(0, 1))
    near_logits = near_logits.view(batch, blocks, block, heads, near.shape[2])
    far_logits = _scaled_product(q.flatten(1, 3), entries).view(batch, blocks, block, heads, far)
    near_mask = _window_mask(positions) if near.shape[2] else positions.new_zeros(*positions.shape, 0).bool()
    allowed = torch.cat((near_mask, visible), dim=-1).unsqueeze(3)
    logits = widen(torch.cat((near_logits, far_logits), dim=-1)).masked_fill(~allowed, -torch.inf)
    sink = widen(sinks).view(1, 1, 1, heads, 1).expand(batch, blocks, block, heads, 1)
    exact = torch.cat((logits, sink), dim=-1).softmax(dim=-1)  # the sink only takes mass
    mass = exact.detach()[..., near.shape[2] : -1].sum(dim=3) if with_mass else None
    near_p, far_p, _ = exact.to(q.dtype).split([near.shape[2], far, 1], dim=-1)
    out = (near_p.flatten(2, 3) @ near).flatten(1, 2) + (far_p.flatten(1, 3) @ entries).unflatten(
        1, (blocks, -1)
    ).flatten(1, 2)
    return out.view(batch, blocks, block, heads, channels), mass


def _scaled_product(q: Tensor, k: Tensor) -> Tensor:
    """q [b, M, C] times k [b, N, C] transposed over sqrt(C); the scale enters before any rounding."""
    return torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def _window_mask(positions: Tensor) -> Tensor:
    """[B, n, W] -> [B, n, W, 2W]: keys of (previous block, own block) 0 <= d < W back in the document."""
    block = positions.shape[-1]
    key = torch.arange(2 * block, device=positions.device)
    query = torch.arange(block, device=positions.device).unsqueeze(-1)
    distance = query + block - key  # [W, 2W]
    return (distance >= 0) & (distance < block) & (distance <= positions.unsqueeze(-1))
