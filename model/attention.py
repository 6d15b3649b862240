"""One attention for every layer type: sliding window, CSA and HCA, and a dense baseline.

Legend: B batch, S sequence, D hidden, H heads, C head_dim, T compressed slots, G output groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import ModelConfig
from model.indexer import Compared, Indexer
from model.kernels.attention import Seen, attention_and_mass, shared_kv_attention
from model.layout import COMPRESSED, SELECTIVE, Layout
from model.linear import Linear
from model.norm import RMSNorm, rms_norm
from model.rope import apply_rope

# CSA attends to the selected ("sparse") or to all visible entries; in "warmup" only the indexer learns.
AttentionMode = Literal["sparse", "dense", "warmup"]


def as_it_is(kv: Tensor) -> Tensor:
    """KV entries as they were made."""
    return kv


class Attention(nn.Module):
    """Low-rank queries, one shared key/value head, sinks, grouped output (V4 report, section 2.3).

    Sliding-window layers use the "main" rotation, all others the "compress" one. `full_attention` is the
    dense baseline: the same projections, every earlier token of the document visible, no compression.
    """

    stored: Callable[[Tensor], Tensor] = staticmethod(as_it_is)  # entries as read; a precision replaces it

    def __init__(self, config: ModelConfig, layer_type: str):
        super().__init__()
        dim, heads, channels, eps = (
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        self.layer_type = layer_type
        self.heads, self.channels, self.groups, self.eps = heads, channels, config.o_groups, eps
        self.window = 0 if layer_type == "full_attention" else config.sliding_window
        self.rope_kind = "main" if layer_type == "sliding_attention" else "compress"
        self.q_a_proj = Linear(dim, config.q_lora_rank, "attention")
        self.q_a_norm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * channels, "attention")
        self.kv_proj = Linear(dim, channels, "attention")
        self.kv_norm = RMSNorm(channels, eps)
        self.o_a_proj = GroupedOutput(heads * channels, config.o_groups, config.o_lora_rank)
        self.o_b_proj = Linear(config.o_groups * config.o_lora_rank, dim, "attention")
        self.sinks = nn.Parameter(torch.empty(heads))
        if layer_type in COMPRESSED:
            overlap = layer_type == SELECTIVE
            self.compressor = Compressor(dim, channels, config.compress_rates[layer_type], overlap, eps)
            if overlap:
                self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, layout: Layout, mode: AttentionMode = "sparse", indexer_loss: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D] -> [B, S, D] and, of CSA where it is asked for, the indexer's loss (`Indexer.loss`)."""
        cos, sin = layout.rotations[self.rope_kind]
        per_head = (cos.unsqueeze(2), sin.unsqueeze(2))
        q_latent = self.q_a_norm(self.q_a_proj(x))  # [B, S, q_lora_rank]
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.channels))
        q = apply_rope(rms_norm(q, eps=self.eps), per_head)  # [B, S, H, C]
        kv = self.stored(apply_rope(self.kv_norm(self.kv_proj(x)), (cos, sin)))  # [B, S, C]
        entries, seen, compared = self._far(x, q_latent, kv, layout, mode, indexer_loss)
        (kv,) = layout.context.extended(self.window, kv)
        known, loss = (self.sinks, layout.positions, self.window), None
        if compared is None or entries is None or seen is None:
            out = shared_kv_attention(q, kv, entries, seen, *known)
        else:
            out, mass = attention_and_mass(q, kv, entries, seen, *known)
            attended = seen.mask(entries.shape[1]) if seen.chosen is None else seen.chosen
            loss = self.indexer.loss(compared, mass, attended, layout.real)
        out = apply_rope(out, per_head, inverse=True)
        return self.o_b_proj(self.o_a_proj(out.flatten(2))), loss

    def _far(
        self,
        x: Tensor,
        q_latent: Tensor,
        kv: Tensor,
        layout: Layout,
        mode: AttentionMode,
        indexer_loss: bool = False,
    ) -> tuple[Tensor | None, Seen | None, Compared | None]:
        """What lies beyond the window: entries [B, T, C], who attends to them, and what the indexer compared
        them by, where it is to learn from that."""
        if self.layer_type == "full_attention":
            kv = layout.context.gather(kv)
            return kv, Seen(layout.first, layout.first + layout.positions + 1), None
        if self.layer_type not in COMPRESSED:
            return None, None, None
        slots = layout.slots[self.layer_type]
        entries, seen = self.stored(self.compressor(x, slots)), Seen(slots.first, slots.end)
        if self.layer_type != SELECTIVE or not (mode == "sparse" or indexer_loss):
            return entries, seen, None
        compared = self.indexer.compare(x, q_latent, slots, layout.rotations["compress"])
        if mode == "sparse":
            seen = seen._replace(chosen=self.indexer.select(compared, slots))
        return entries, seen, compared if indexer_loss else None


class GroupedOutput(nn.Module):
    """Heads in G groups, each projected by its own matrix: [..., H * C] -> [..., G * o_lora_rank]."""

    def __init__(self, in_features: int, groups: int, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups * rank, in_features // groups))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))  # [B, S, G, H * C / G]
        weight = self.weight.to(x.dtype).unflatten(0, (self.groups, -1))  # [G, o_lora_rank, H * C / G]
        return torch.einsum("bsgi,gri->bsgr", grouped, weight).flatten(-2)
