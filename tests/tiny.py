"""Tiny configurations and batches that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        "max_position_embeddings": 1024,
    }
    return ModelConfig(**{**values, **changes})


def tiny_model(config: ModelConfig, seed: int = 0) -> ForCausalLM:
    """An initialised model in which every parameter is random: nothing hides behind a zero or a one."""
    model = initialize(ForCausalLM(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for moe in model.moes():
            if not moe.gate.is_hash:
                bias = moe.gate.get_buffer("e_score_correction_bias")
                bias += 0.1 * torch.randn(bias.shape, generator=generator)
    return model


def packed_batch(rows: list[list[int]], length: int, vocab: int = 96, depth: int = 0) -> dict[str, Tensor]:
    """A batch [B, length] of random documents of these lengths, one list a row, then padding (eos, id 1).

    Written token by token, so that it can be an oracle for what derives positions or targets.
    """
    generator = torch.Generator().manual_seed(len(rows) * 1000 + length)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, 1),
        "labels": torch.full(shape, -100),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "document_ids": torch.full(shape, -1),
        "next_ids": torch.full((*shape, depth), -100),
    }
    for b, start, size, document in documents(rows):
        text = torch.randint(2, vocab, (size,), generator=generator)
        for t in range(size):
            batch["input_ids"][b, start + t] = text[t]
            batch["position_ids"][b, start + t] = t
            batch["document_ids"][b, start + t] = document
            following = [int(text[j]) if j < size else -100 for j in range(t + 1, t + 2 + depth)]
            batch["labels"][b, start + t] = following[0]
            batch["next_ids"][b, start + t] = torch.tensor(following[1:], dtype=torch.int64)
    for b, lengths in enumerate(rows):
        batch["position_ids"][b, sum(lengths) :] = torch.arange(length - sum(lengths))
    return batch


def documents(rows: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """(row, first token, length, number in the row) of every document."""
    return [
        (b, sum(lengths[:i]), size, i) for b, lengths in enumerate(rows) for i, size in enumerate(lengths)
    ]


def relative(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the reference's norm."""
    norm = reference.double().norm().item()
    difference = (ours.double() - reference.double()).norm().item()
    return difference / norm if norm else difference
