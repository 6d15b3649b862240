"""Every parameter name of the model, with its shape and the home it must get: written out a second time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch


class Home(NamedTuple):
    shape: tuple[int, ...]
    algorithm: str = "muon"
    set: str = "model"
    blocks: tuple[int, ...] | None = None  # None: whole


V, D, F, E, H, C, R, G, O, N, J, K = 19, 12, 5, 3, 4, 6, 7, 2, 4, 4, 2, 8  # noqa: E741
CONFIG = SimpleNamespace(
    moe_intermediate_size=F, head_dim=C, o_groups=G, o_lora_rank=O, hc_mult=N, index_head_dim=K
)  # fmt: skip


def vector(*shape: int, set: str = "model") -> Home:
    return Home(shape, "adamw", set)


def mixing(prefix: str) -> dict[str, Home]:
    fn = Home((24, N * D), blocks=(4, 4, 16))
    return {f"{prefix}.fn": fn, f"{prefix}.base": vector(24), f"{prefix}.scale": vector(3)}


def head(prefix: str) -> dict[str, Home]:
    return {
        f"{prefix}hc_head.hc_fn": Home((N, N * D)),
        f"{prefix}hc_head.hc_base": vector(N),
        f"{prefix}hc_head.hc_scale": vector(1),
    }


def compressor(prefix: str, width: int, halves: int, rate: int, set: str) -> dict[str, Home]:
    matrix = Home((halves * width, D), set=set, blocks=(width,) * halves)
    return {
        f"{prefix}.kv_proj.weight": matrix,
        f"{prefix}.gate_proj.weight": matrix,
        f"{prefix}.position_bias": vector(rate, halves * width, set=set),
        f"{prefix}.kv_norm.weight": vector(width, set=set),
    }


def layer(prefix: str, kind: str, residual: str = "mhc") -> dict[str, Home]:
    attention = f"{prefix}.self_attn"
    homes = {
        f"{prefix}.input_layernorm.weight": vector(D),
        f"{prefix}.post_attention_layernorm.weight": vector(D),
        f"{attention}.q_a_proj.weight": Home((R, D)),
        f"{attention}.q_a_norm.weight": vector(R),
        f"{attention}.q_b_proj.weight": Home((H * C, R)),
        f"{attention}.kv_proj.weight": Home((C, D)),
        f"{attention}.kv_norm.weight": vector(C),
        f"{attention}.o_a_proj.weight": Home((G * O, H * C // G), blocks=(4, 4)),
        f"{attention}.o_b_proj.weight": Home((D, G * O)),
        f"{attention}.sinks": vector(H),
        f"{prefix}.mlp.gate.weight": Home((E, D)),
        f"{prefix}.mlp.experts.gate_up_proj": Home((E, 2 * F, D), blocks=(5, 5)),
        f"{prefix}.mlp.experts.down_proj": Home((E, D, F)),
        f"{prefix}.mlp.shared_experts.gate_proj.weight": Home((F, D)),
        f"{prefix}.mlp.shared_experts.up_proj.weight": Home((F, D)),
        f"{prefix}.mlp.shared_experts.down_proj.weight": Home((D, F)),
    }
    if residual == "mhc":
        homes |= mixing(f"{prefix}.attn_hc") | mixing(f"{prefix}.ffn_hc")
    if kind == "hca":
        homes |= compressor(f"{attention}.compressor", C, 1, 128, "model")
    if kind == "csa":
        homes |= compressor(f"{attention}.compressor", C, 2, 4, "model")
        homes |= compressor(f"{attention}.indexer.compressor", K, 2, 4, "indexer")
        homes[f"{attention}.indexer.q_b_proj.weight"] = Home((J * K, R), set="indexer")
        homes[f"{attention}.indexer.weights_proj.weight"] = Home((J, D), set="indexer")
    return homes


def all_homes(residual: str = "mhc") -> dict[str, Home]:
    """A model with a sliding, a CSA and an HCA layer (numbers of one and two digits) and one MTP block."""
    homes = {"embed_tokens.weight": vector(V, D), "lm_head.weight": vector(V, D), "norm.weight": vector(D)}
    for index, kind in ((0, "sliding"), (1, "csa"), (42, "hca")):
        homes |= layer(f"layers.{index}", kind, residual)
    homes |= layer("mtp.0.block", "sliding", residual)
    homes |= {
        "mtp.0.enorm.weight": vector(D),
        "mtp.0.hnorm.weight": vector(D),
        "mtp.0.norm.weight": vector(D),
    }
    homes |= {"mtp.0.e_proj.weight": Home((D, D)), "mtp.0.h_proj.weight": Home((D, D))}
    return homes | (head("") | head("mtp.0.") if residual == "mhc" else {})


def parameters(homes: dict[str, Home], seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """Random parameters of these shapes, with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, home in homes.items():
        made[name] = torch.nn.Parameter(torch.randn(home.shape, generator=generator))
        made[name].grad = torch.randn(home.shape, generator=generator)
    return made
