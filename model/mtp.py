"""Multi-token prediction: one more block predicts one token further (DeepSeek-V3 report, section 2.2).

Legend: B batch, S sequence, N streams, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.block import DecoderLayer, stream_head
from model.config import ModelConfig
from model.layout import Layout
from model.linear import Linear
from model.moe import Routing
from model.norm import RMSNorm


class MultiTokenPredictor(nn.Module):
    """Streams at t joined with the embedding of token t + depth, through a sliding-window, top-k block.

    h_proj acts on every stream alike; embedding and output head are the model's own.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.e_proj, self.h_proj = Linear(dim, dim, "mtp"), Linear(dim, dim, "mtp")
        self.block = DecoderLayer(config, "sliding_attention", "moe")
        self.hc_head = stream_head(config)
        self.norm = RMSNorm(dim, eps)

    def forward(
        self, streams: Tensor, embedded: Tensor, layout: Layout, ids: Tensor, replay: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Routing]:
        """streams [B, S, N, D], embedded next tokens [B, S, D], their ids [B, S] ->
        new streams, normed hidden states [B, S, D] for the output head, routing."""
        joined = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embedded)).unsqueeze(2)
        streams, routing, _ = self.block(joined, layout, ids, replay=replay)
        return streams, self.norm(self.hc_head(streams)), routing
