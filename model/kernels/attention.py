"""Shared-KV attention over a sliding window, compressed entries and a sink, in one softmax.

    p_tj = exp(scale * q_th . k_j) / (exp(sink_h) + sum_i exp(scale * q_th . k_i)),   out_th = sum_j p_tj k_j

over j in the last `window` tokens of the query's document and its visible compressed entries; keys and
values are the same tensor, one head for all H queries (V4 report, section 2.3).

Legend: B batch, S sequence, W window, n blocks of W queries, T compressed slots, H heads, C channels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.norm import widen

LOGIT_BUDGET = 1 << 28  # attention logits that a layer holds at once; beyond it backward recomputes them
Output = tuple[Tensor, Tensor | None]  # of blocks of queries: [B, n, W, H, C] and the mass [B, n, W, T]


def shared_kv_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    window: int,
) -> Tensor:
    """Attention output [B, S, H, C].

    q [B, S, H, C]; kv [B, S, C], or [B, window + S, C] that begins `window` tokens before the queries;
    entries [B, T, C] with `visible` [B, S, T] bool, or both None; sinks [H] fp32; positions [B, S] within the
    document (the window never reaches before position 0); `window` 0 attends to entries only. No
    [B, S, H, S] exists: beyond LOGIT_BUDGET blocks of queries go in turn.
    """
    return _in_blocks(q, kv, entries, visible, sinks, positions, window, with_mass=False)[0]


def attention_and_mass(
    q: Tensor, kv: Tensor, entries: Tensor, visible: Tensor, sinks: Tensor, positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """The same, and what each query gives to each entry: sum_h p_tj, [B, S, T] in fp32 or wider.

    The mass is taken before p is rounded to q's dtype, and carries no gradient.
    """
    out, mass = _in_blocks(q, kv, entries, visible, sinks, positions, window, with_mass=True)
    assert mass is not None
    return out, mass


def _in_blocks(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    window: int,
    with_mass: bool,
) -> Output:
    """Output [B, S, H, C] and, where asked for, mass [B, S, T]."""
    batch, length, heads, channels = q.shape
    if entries is None or visible is None:
        entries, visible = (
            kv.new_zeros(batch, 0, channels),
            positions.new_zeros(batch, length, 0, dtype=torch.bool),
        )
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
