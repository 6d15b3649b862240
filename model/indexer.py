"""Lightning indexer: which compressed entries each query of a CSA layer attends to, and how it learns to.

Legend: B batch, S sequence, D hidden, T compressed slots, h index heads, c index channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import ModelConfig
from model.kernels.index_select import runs
from model.kernels.indexer import index_loss, mask_of, select_entries, select_indices
from model.layout import Slots
from model.linear import Linear
from model.quant import rotated_fp4
from model.rope import Rotation, apply_rope


class Compared(NamedTuple):
    """What scores are made of."""

    q: Tensor  # [B, S, h, c]
    k: Tensor  # [B, T, c]
    weights: Tensor  # [B, S, h], all scales included


class Indexer(nn.Module):
    """Scores entries by sum_h w_h ReLU(q_h . k) with keys from a small compressor of its own.

    Queries come from the attention's query latent. The inputs are detached: selection is not
    differentiable, and the loss on the scores may move the indexer only. V4 report, section 2.3.1.
    """

    fp4 = False  # compare in FP4 and rank in bf16; a precision sets it

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.channels = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        rate = config.compress_rates["compressed_sparse_attention"]
        self.compressor = Compressor(
            config.hidden_size, self.channels, rate, overlap=True, eps=config.rms_norm_eps
        )
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * self.channels, "indexer")
        self.weights_proj = Linear(config.hidden_size, self.heads, "indexer_weights")

    def forward(self, x: Tensor, q_latent: Tensor, slots: Slots, rotation: Rotation) -> Tensor:
        """x [B, S, D], q_latent [B, S, q_lora_rank] -> mask [B, S, T] of the selected visible entries."""
        chosen = self.select(self.compare(x, q_latent, slots, rotation), slots)
        if chosen is None:
            return slots.visible()
        return chosen if chosen.dtype == torch.bool else mask_of(chosen, slots.order.shape[1])

    def compare(self, x: Tensor, q_latent: Tensor, slots: Slots, rotation: Rotation) -> Compared:
        """Queries, keys and head weights; rounded where it compares in FP4."""
        x, q_latent = x.detach(), q_latent.detach()
        cos, sin = rotation
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.channels))
        q = apply_rope(q, (cos.unsqueeze(2), sin.unsqueeze(2)))
        k = self.compressor(x, slots)
        weights = self.weights_proj(x) * (self.heads * self.channels) ** -0.5
        if self.fp4:
            q, k = rotated_fp4(q), rotated_fp4(k)
        return Compared(q, k, weights)

    def select(self, compared: Compared, slots: Slots) -> Tensor | None:
        """The top-k visible entries of each query: a mask [B, S, T], or where kernels run indices int32
        [B, S, k], ascending, -1 for none after them. None: there are no more than k slots."""
        if compared.k.shape[1] <= self.topk:
            return None
        if runs(compared.q, compared.k):
            return select_indices(*compared, slots.first, slots.end, self.topk, self.ranked_in)
        return select_entries(*compared, slots.visible(), self.topk, self.ranked_in)

    @property
    def ranked_in(self) -> torch.dtype:
        """What scores are rounded to before they are compared."""
        return torch.bfloat16 if self.fp4 else torch.float32

    def loss(self, compared: Compared, mass: Tensor, attended: Tensor, real: Tensor) -> Tensor:
        """Sum over real queries [B, S] of the divergence from attention's mass [B, S, T or n] on the
        `attended` entries, a mask or indices (`index_loss`). V4 report, on the indexer's training."""
        return index_loss(*compared, mass, attended, real)
