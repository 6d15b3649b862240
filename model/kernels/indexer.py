"""Lightning indexer: score compressed entries cheaply and keep the best (V4 report, eqs. 13-17).

    score(t, s) = sum_h w_th * ReLU(q_th . k_s)

It learns to score as attention does, which gives an entry the mass m_ts, summed over its heads:

    loss = sum_t KL(m_t / sum_s m_ts || softmax_s score(t, s))    over the entries s that query t attends to

Legend: B batch, S sequence, T compressed slots, h index heads, c index channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels.index_loss import index_divergence
from model.kernels.index_select import index_select, runs
from model.norm import widen

SCORE_BUDGET = 1 << 26  # elements of per-head scores alive at once; beyond it backward recomputes them


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """q [B, S, h, c], k [B, T, c], weights [B, S, h] (all scales included) -> [B, S, T] fp32."""
    heads = q.shape[2]
    per_head = q.flatten(1, 2) @ k.transpose(1, 2)  # [B, S * h, T]
    per_head = per_head.relu().unflatten(1, (-1, heads))  # [B, S, h, T]
    return (widen(weights.unsqueeze(2)) @ widen(per_head)).squeeze(2)


def keep_best(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k highest-scored visible entries of each query, as a mask [..., T]; ties go to the lower index.

    All visible entries are kept where there are at most k.
    """
    if scores.shape[-1] <= k:
        return visible
    scores = scores.masked_fill(~visible, -torch.inf)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above, level = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    return visible & (above | (level & (level.cumsum(-1) <= room)))


@torch.no_grad()
def select_entries(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    visible: Tensor,
    topk: int,
    ranked_in: torch.dtype = torch.float32,
) -> Tensor:
    """Mask [B, S, T] of the entries that each query attends to, computed over chunks of queries.

    `ranked_in`: what the sums over heads are rounded to before they are compared.
    """
    if k.shape[1] <= topk:
        return visible
    chunk = max(1, SCORE_BUDGET // (q.shape[0] * q.shape[2] * k.shape[1]))
    parts = zip(q.split(chunk, 1), weights.split(chunk, 1), visible.split(chunk, 1), strict=True)
    return torch.cat(
        [keep_best(index_scores(qc, k, wc).to(ranked_in), vc, topk) for qc, wc, vc in parts], dim=1
    )


@torch.no_grad()
def select_indices(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    first: Tensor,
    end: Tensor,
    topk: int,
    ranked_in: torch.dtype = torch.float32,
) -> Tensor:
    """The same as int32 [B, S, min(topk, T)], ascending, -1 for none after them.

    first, end [B, S]: each query sees the slots first <= s < end.
    """
    slots = k.shape[1]
    if slots <= topk:
        slot = first.unsqueeze(-1) + torch.arange(slots, device=k.device)
        return torch.where(slot < end.unsqueeze(-1), slot, -1).int()
    if runs(q, k):
        return index_select(q, k, weights, first.int(), end.int(), topk, ranked_in)
    slot = torch.arange(slots, device=k.device)
    visible = (slot >= first.unsqueeze(-1)) & (slot < end.unsqueeze(-1))
    kept = select_entries(q, k, weights, visible, topk, ranked_in)
    slot = torch.where(kept, slot, slots).sort(-1).values[..., :topk]
    return torch.where(slot < slots, slot, -1).int()


def mask_of(indices: Tensor, slots: int) -> Tensor:
    """Mask [B, S, T] of the entries at `indices` [B, S, n], -1 for none; T is `slots`."""
    mask = torch.zeros(*indices.shape[:2], slots + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter(2, torch.where(indices < 0, slots, indices).long(), True)[..., :slots]


def index_loss(q: Tensor, k: Tensor, weights: Tensor, mass: Tensor, attended: Tensor, real: Tensor) -> Tensor:
    """Sum in nats over real queries [B, S] of KL(attention || softmax of scores), a 0-d tensor.

    q, k and weights as for `index_scores`, here multiplied in fp32 or wider. `attended` says which entries
    each query attends to: a mask [B, S, T], or indices int32 [B, S, n], -1 for none after them. Attention
    gives them mass [B, S, T or n], 0 to others. Queries without an entry add nothing. Beyond SCORE_BUDGET
    chunks of queries go in turn.
    """
    if runs(q, k):
        return index_divergence(q, k, weights, mass, attended, real)[0].sum()
    q, k, weights = widen(q), widen(k), widen(weights)
    chunk = max(1, SCORE_BUDGET // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    if chunk >= q.shape[1]:
        return _divergence(q, k, weights, mass, attended, real)
    parts = zip(*(x.split(chunk, 1) for x in (q, weights, mass, attended, real)), strict=True)
    again = partial(checkpoint, _divergence, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(qc, k, wc, mc, ac, rc) for qc, wc, mc, ac, rc in parts]).sum()


def _divergence(
    q: Tensor, k: Tensor, weights: Tensor, mass: Tensor, attended: Tensor, real: Tensor
) -> Tensor:
    """`index_loss` of all its queries at once. Without any mass a query has no teacher, and no loss."""
    mass = mass.masked_fill(~real.unsqueeze(-1), 0)
    teacher = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)  # [B, S, T or n]
    scores = index_scores(q, k, weights)
    if attended.dtype != torch.bool:
        scores, attended = scores.gather(-1, attended.clamp(min=0).long()), attended >= 0
    # A finite number in place of -inf: where nothing is attended 0 times it is 0.
    log_student = scores.masked_fill(~attended, torch.finfo(scores.dtype).min).log_softmax(-1)
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum()
