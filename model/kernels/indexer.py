"""Lightning indexer: score compressed entries cheaply and keep the best (V4 report, eqs. 13-17).

    score(t, s) = sum_h w_th * ReLU(q_th . k_s)

Legend: B batch, S sequence, T compressed slots, h index heads, c index channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.norm import widen

SCORE_BUDGET = 1 << 26  # elements of per-head scores alive at once


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
