"""The layout of the released DeepSeek-V4 files: names, how each tensor is stored, `config.json`.

    FP4    routed experts, one matrix a tensor, two numbers in a byte (int8), the first in its low half, with
           a scale for 1 x 32 along the input
    FP8    the other large products, E4M3 with a scale for 128 x 128: attention's projections and the
           indexer's queries, shared experts, MTP's e_proj and h_proj
    bf16   tables, norms, routers, the projections of compressors and the indexer's weights_proj
    fp32   hyper-connections, sinks, position biases, routing biases
    int64  hash-routing tables

Scales are powers of two (E8M0) beside `X.weight` as `X.scale`. What precision a product trains in is another
list: o_a_proj is stored in FP8. Source: the published indices of DeepSeek-V4-Flash and DeepSeek-V4-Pro (the
Base models hold their experts in FP8 instead). Legend: M output, N input channels of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from model.config import CSA, HCA, SLIDING, ModelConfig
from model.quant import FP4_BLOCK, FP8_BLOCK, quantise_fp4, quantise_fp8
from model.tensorfile import Spec

FP4, FP8, E8M0 = torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu

# By released name; what matches none is bf16.
_STORED = tuple(
    (re.compile(pattern), dtype)
    for pattern, dtype in (
        (r".*\.ffn\.experts\.\d+\.w[123]\.weight", FP4),
        (r".*\.attn\.(w(q_a|q_b|kv|o_a|o_b)|indexer\.wq_b)\.weight", FP8),
        (r".*\.ffn\.shared_experts\.w[123]\.weight", FP8),
        (r"mtp\.\d+\.[eh]_proj\.weight", FP8),
        (r"(.*\.)?hc_(attn|ffn|head)_(fn|base|scale)", torch.float32),
        (r".*\.(ape|attn_sink|gate\.bias)", torch.float32),
        (r".*\.tid2eid", torch.int64),
    )
)

# What the released names and ours differ in, ^ being the beginning: applied in this order from left to right
# to read them, in the reverse order from right to left to write them.
_NAMES = (
    ("^embed.", "^embed_tokens."),
    ("^head.", "^lm_head."),
    ("hc_head_fn", "hc_head.hc_fn"),
    ("hc_head_base", "hc_head.hc_base"),
    ("hc_head_scale", "hc_head.hc_scale"),
    (".hc_attn_fn", ".attn_hc.fn"),
    (".hc_attn_base", ".attn_hc.base"),
    (".hc_attn_scale", ".attn_hc.scale"),
    (".hc_ffn_fn", ".ffn_hc.fn"),
    (".hc_ffn_base", ".ffn_hc.base"),
    (".hc_ffn_scale", ".ffn_hc.scale"),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
    (".attn_sink", ".sinks"),
    (".ape", ".position_bias"),
    (".compressor.norm.", ".compressor.kv_norm."),
    (".q_norm.", ".q_a_norm."),
    (".wq_a.", ".q_a_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".wq_b.", ".q_b_proj."),
    (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    (".shared_experts.w1.", ".shared_experts.gate_proj."),
    (".shared_experts.w2.", ".shared_experts.down_proj."),
    (".shared_experts.w3.", ".shared_experts.up_proj."),
)


def _substitutions(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(re.escape(old).replace(r"\^", "^")), new.lstrip("^")) for old, new in pairs]


TO_OURS = _substitutions(_NAMES)
_TO_RELEASED = _substitutions((ours, released) for released, ours in reversed(_NAMES))
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.w([123])\.weight$")

_RATIOS = {SLIDING: 0, CSA: 4, HCA: 128}
_LONG_FORM = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
_STORAGE = {
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": list(FP8_BLOCK),
    },
}


def released_keys(name: str, shape: Sequence[int]) -> list[str]:
    """The keys of what we name so, in order: one, or those of every expert, gate before up."""
    name = re.sub(r"^(mtp\.\d+)\.block\.", r"\1.", name)
    for pattern, replacement in _TO_RELEASED:
        name = pattern.sub(replacement, name)
    prefix, _, stack = name.rpartition(".")
    return expert_keys(prefix, stack, shape[0]) if prefix.endswith(".experts") else [name]


def expert_keys(prefix: str, stack: str, experts: int) -> list[str]:
    """The keys of single experts in the order of their stack, gate_up_proj or down_proj."""
    parts = (2,) if stack == "down_proj" else (1, 3)
    return [f"{prefix}.{number}.w{part}.weight" for number in range(experts) for part in parts]


def scale_key(key: str) -> str:
    """Of the scales of the matrix `key`."""
    return f"{key.removesuffix('.weight')}.scale"


def released_dtype(key: str) -> torch.dtype:
    """Of the tensor with this released name: int8 for FP4, E4M3 for FP8, both with scales."""
    return next((dtype for pattern, dtype in _STORED if pattern.fullmatch(key)), torch.bfloat16)


def released_specs(key: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Dtypes and shapes of what is stored for a tensor: itself and, where it is quantised, its scales."""
    dtype = released_dtype(key)
    if dtype not in (FP4, FP8):
        return {key: (dtype, shape)}
    (rows, columns), block = shape, FP4_BLOCK if dtype == FP4 else FP8_BLOCK
    scales = (E8M0, (-(-rows // block[0]), -(-columns // block[1])))
    return {key: (dtype, (rows, columns // 2 if dtype == FP4 else columns)), scale_key(key): scales}


def quantised(key: str, matrix: Tensor) -> dict[str, Tensor]:
    """matrix [M, N] fp32 -> what `released_specs` lists for it."""
    if released_dtype(key) == FP4:
        codes, scales = quantise_fp4(matrix)
        return {key: codes.view(FP4), scale_key(key): scales}
    values, exact, _ = quantise_fp8(matrix, FP8_BLOCK)
    return {key: values, scale_key(key): exact.to(E8M0)}


def released_settings(config: ModelConfig) -> dict[str, Any]:
    """`config.json`: in the released form where that has words for this model, else in `transformers'`.

    Raises ConfigError for a baseline that neither can express and for experts that FP4 blocks do not fill:
    a released scale stands for 32 inputs.
    """
    for key in ("hidden_size", "moe_intermediate_size"):
        size, width = getattr(config, key), FP4_BLOCK[1]
        if size % width:
            raise ConfigError(f"model.{key}: is {size}; FP4 blocks are {width} wide, export as bf16 or fp32")
    long = config.to_hf()
    scaling = dict(config.rope_parameters["compress"])
    scaling["type"] = scaling.pop("rope_type")
    short = {
        **{key: value for key, value in long.items() if key not in _LONG_FORM},
        "compress_ratios": [_RATIOS[kind] for kind in config.layer_types]
        + [0] * config.num_nextn_predict_layers,
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_scaling": {
            key: value for key, value in scaling.items() if key not in ("rope_theta", "attention_factor")
        },
    }
    return {**(short if ModelConfig.from_hf(short) == config else long), **_STORAGE}
