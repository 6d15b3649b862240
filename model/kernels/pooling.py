"""Gated pooling of token windows into compressed entries (V4 report, eqs. 9-12 and 20-23).

    entry_s = sum_j softmax_j(gate_j + bias_j) * kv_j      per channel, over the slots j of window s

Without overlap the slots are the m tokens of window s. With overlap kv and gate carry two halves a, b:
entry s pools the b-half of its own window with the a-half of the window before, 2m slots; the first
window of a document has no window before.

Legend: B batch, S sequence, T compressed slots, m rate, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gated_pool import pool, runs
from model.norm import widen


def gated_pool(kv: Tensor, gate: Tensor, bias: Tensor, tokens: Tensor, chained: Tensor | None) -> Tensor:
    """Pool windows of tokens -> [B, T, C] in kv's dtype; softmax and sum in fp32.

    kv, gate [B, S, C] (with overlap [B, S, 2C]: a then b); bias [m, C or 2C] fp32; `tokens` [B, T, m] are
    the windows' token indices; `chained` [B, T] (None: no overlap) says that slot s - 1 holds the window
    before. Slots without an entry pool some tokens of the row and are to be masked by the caller.
    """
    if runs(kv, tokens):
        return pool(kv, gate, bias, tokens, chained)
    window_kv = widen(_take(kv, tokens))  # [B, T, m, C or 2C]
    window_gate = widen(_take(gate, tokens)) + bias
    if chained is not None:
        before_kv, window_kv = window_kv.chunk(2, dim=-1)
        before_gate, window_gate = window_gate.chunk(2, dim=-1)
        before_gate = _next_slot(before_gate).masked_fill(~chained[:, :, None, None], -torch.inf)
        window_kv = torch.cat((_next_slot(before_kv), window_kv), dim=2)  # [B, T, 2m, C]
        window_gate = torch.cat((before_gate, window_gate), dim=2)
    return (window_gate.softmax(dim=2) * window_kv).sum(dim=2).to(kv.dtype)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of x [B, S, C] at tokens [B, T, m] -> [B, T, m, C]."""
    batch, length, channels = x.shape
    row = torch.arange(batch, device=x.device).view(-1, 1, 1) * length
    return x.reshape(-1, channels).index_select(0, (tokens + row).flatten()).view(*tokens.shape, channels)


def _next_slot(x: Tensor) -> Tensor:
    """x [B, T, ...] moved one slot later; slot 0 becomes zero."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
