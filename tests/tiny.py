"""Tiny configurations and batches that tests share."""

from __future__ import annotations

from typing import Any

import torch

from model.config import ModelConfig
from model.init import initialize
from model.model import ForCausalLM

KINDS = {"s": "sliding_attention", "c": "compressed_sparse_attention", "h": "heavily_compressed_attention"}
FLASH, PRO = "sschch", "hhchch"


def tiny_config(layers: str = "sch", hash_layers: int = 1, **changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with V4's rates; `layers` such as "ssch" names layer types."""
    compress = {
        "rope_type": "yarn",
        "rope_theta": 160000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 24,
        "o_groups": 2,
        "o_lora_rank": 12,
        "sliding_window": 16,
        "layer_types": [KINDS.get(kind, "full_attention") for kind in layers],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "mlp_layer_types": ["hash_moe"] * hash_layers + ["moe"] * (len(layers) - hash_layers),
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "hc_mult": 4,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 6,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.3,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0},
            "compress": compress,
        },
        "max_position_embeddings": 4096,
    }
    return ModelConfig(**{**values, **changes})


def tiny_model(config: ModelConfig, seed: int = 0) -> ForCausalLM:
    """An initialised model in which every parameter is random: nothing hides behind a zero or a one."""
    model = initialize(ForCausalLM(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for moe in model.moes():
            if not moe.gate.is_hash:
                bias = moe.gate.e_score_correction_bias
                bias += 0.1 * torch.randn(bias.shape, generator=generator)
    return model
