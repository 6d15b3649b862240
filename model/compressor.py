"""Compression of the token sequence into entries, one per m tokens, for CSA, HCA and the indexer.

Legend: B batch, S sequence, D hidden, T compressed slots of the row, m rate, C channels of an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.kernels.pooling import gated_pool
from model.layout import Slots
from model.linear import Linear
from model.norm import RMSNorm
from model.rope import apply_rope


class Compressor(nn.Module):
    """Gated pooling of token windows, then RMS norm and RoPE at each window's first position.

    `overlap` (CSA, rate 4): every entry also pools the window before (see `gated_pool`). HCA (rate 128)
    pools windows alone. V4 report, sections 2.3.1 and 2.3.2.
    """

    def __init__(self, hidden_size: int, channels: int, rate: int, overlap: bool, eps: float):
        super().__init__()
        width = channels * (1 + overlap)
        self.kv_proj = Linear(hidden_size, width, "compressor")
        self.gate_proj = Linear(hidden_size, width, "compressor")
        self.position_bias = nn.Parameter(torch.empty(rate, width))
        self.kv_norm = RMSNorm(channels, eps)
        self.overlap = overlap

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        """x [B, S, D] -> entries [B, T, C]; slots that hold no entry carry garbage, to be masked."""
        kv, gate = slots.context.extended(slots.halo, self.kv_proj(x), self.gate_proj(x))
        chained = slots.chained if self.overlap else None
        pooled = gated_pool(kv, gate, self.position_bias, slots.tokens, chained)[:, slots.lead :]
        return slots.context.gather(apply_rope(self.kv_norm(pooled), slots.rotation), slots.order)
