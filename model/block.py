"""One decoder layer: attention and MoE, each between a hyper-connection's enter and leave.

Legend: B batch, S sequence, N streams, D hidden, K experts per token.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import Attention, AttentionMode
from model.config import ModelConfig
from model.hyper_connection import HyperConnection, HyperHead, PlainResidual
from model.layout import Layout
from model.moe import MoE, Routing
from model.norm import RMSNorm


def _residual(config: ModelConfig) -> HyperConnection | PlainResidual:
    if config.residual == "plain":
        return PlainResidual()
    return HyperConnection(
        config.hc_mult, config.hidden_size, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
    )


def stream_head(config: ModelConfig) -> nn.Module:
    """What collapses [B, S, N, D] to [B, S, D] before a final norm."""
    if config.residual == "plain":
        return nn.Flatten(2)  # one stream
    return HyperHead(config.hc_mult, config.hidden_size, config.hc_eps, config.rms_norm_eps)


class DecoderLayer(nn.Module):
    """streams [B, S, N, D] -> streams [B, S, N, D], the routing of its MoE, its indexer's loss if any."""

    def __init__(self, config: ModelConfig, layer_type: str, mlp_type: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_type)
        self.mlp = MoE(config, mlp_type)
        self.attn_hc, self.ffn_hc = _residual(config), _residual(config)

    def forward(
        self,
        streams: Tensor,
        layout: Layout,
        input_ids: Tensor,
        mode: AttentionMode = "sparse",
        replay: Tensor | None = None,
        indexer_loss: bool = False,
    ) -> tuple[Tensor, Routing, Tensor | None]:
        x, mix = self.attn_hc.enter(streams)
        output, loss = self.self_attn(self.input_layernorm(x), layout, mode, indexer_loss)
        streams = self.attn_hc.leave(output, streams, mix)
        x, mix = self.ffn_hc.enter(streams)
        output, routing = self.mlp(self.post_attention_layernorm(x), input_ids, replay)
        return self.ffn_hc.leave(output, streams, mix), routing, loss
