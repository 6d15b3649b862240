"""What a model costs: parameters, training FLOPs and cache bytes, from its configuration alone. No torch.

Symbols: D hidden, H heads, C head_dim, N streams, E experts, K experts per token, F expert
width, m tokens per compressed entry. One multiply-add is two FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal

from model.config import CSA, FULL, HCA, SLIDING, ModelConfig

Shapes = dict[str, tuple[int, ...]]


# ---- parameters ----


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Full name -> shape of every parameter of `ForCausalLM`, buffers left out."""
    width = config.hidden_size
    shapes: Shapes = {"embed_tokens.weight": (config.vocab_size, width)}
    for index, layer_type in enumerate(config.layer_types):
        shapes |= _prefixed(f"layers.{index}.", _layer_shapes(config, layer_type))
    shapes |= _head_shapes(config)
    shapes["lm_head.weight"] = (config.vocab_size, width)
    for depth in range(config.num_nextn_predict_layers):
        block = _prefixed("block.", _layer_shapes(config, SLIDING))
        joining: Shapes = {"enorm.weight": (width,), "hnorm.weight": (width,)}
        joining |= {"e_proj.weight": (width, width), "h_proj.weight": (width, width)}
        shapes |= _prefixed(f"mtp.{depth}.", joining | block | _head_shapes(config))
    return shapes


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _head_shapes(config: ModelConfig) -> Shapes:
    """The head that collapses the streams, and the final norm."""
    streams, width = config.hc_mult, config.hidden_size
    shapes: Shapes = {"norm.weight": (width,)}
    if config.residual == "mhc":
        shapes |= {"hc_head.hc_fn": (streams, streams * width), "hc_head.hc_base": (streams,)}
        shapes["hc_head.hc_scale"] = (1,)
    return shapes


def _layer_shapes(config: ModelConfig, layer_type: str) -> Shapes:
    width, streams = config.hidden_size, config.hc_mult
    shapes: Shapes = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    if config.residual == "mhc":
        mixes = (2 + streams) * streams
        for block in ("attn_hc", "ffn_hc"):
            shapes |= {
                f"{block}.fn": (mixes, streams * width),
                f"{block}.base": (mixes,),
                f"{block}.scale": (3,),
            }
    shapes |= _prefixed("self_attn.", _attention_shapes(config, layer_type))
    shapes |= _prefixed("mlp.", _moe_shapes(config))
    return shapes


def _attention_shapes(config: ModelConfig, layer_type: str) -> Shapes:
    width, heads, channels = config.hidden_size, config.num_attention_heads, config.head_dim
    latent, mixed = config.q_lora_rank, config.o_groups * config.o_lora_rank
    shapes: Shapes = {
        "q_a_proj.weight": (latent, width),
        "q_a_norm.weight": (latent,),
        "q_b_proj.weight": (heads * channels, latent),
        "kv_proj.weight": (channels, width),
        "kv_norm.weight": (channels,),
        "o_a_proj.weight": (mixed, heads * channels // config.o_groups),
        "o_b_proj.weight": (width, mixed),
        "sinks": (heads,),
    }
    if layer_type in (CSA, HCA):
        overlap = 2 if layer_type == CSA else 1
        pooling = _compressor_shapes(width, channels, config.compress_rates[layer_type], overlap)
        shapes |= _prefixed("compressor.", pooling)
    if layer_type == CSA:
        small = config.index_head_dim
        keys = _compressor_shapes(width, small, config.compress_rates[CSA], overlap=2)
        shapes |= _prefixed("indexer.compressor.", keys)
        shapes["indexer.q_b_proj.weight"] = (config.index_n_heads * small, latent)
        shapes["indexer.weights_proj.weight"] = (config.index_n_heads, width)
    return shapes


def _compressor_shapes(width: int, channels: int, rate: int, overlap: int) -> Shapes:
    return {
        "kv_proj.weight": (overlap * channels, width),
        "gate_proj.weight": (overlap * channels, width),
        "position_bias": (rate, overlap * channels),
        "kv_norm.weight": (channels,),
    }


def _moe_shapes(config: ModelConfig) -> Shapes:
    width, experts, inner = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    shared = config.n_shared_experts * inner
    return {
        "gate.weight": (experts, width),
        "experts.gate_up_proj": (experts, 2 * inner, width),
        "experts.down_proj": (experts, width, inner),
        "shared_experts.gate_proj.weight": (shared, width),
        "shared_experts.up_proj.weight": (shared, width),
        "shared_experts.down_proj.weight": (width, shared),
    }


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; all but `mtp` leave the MTP layers out, as the published totals do."""

    total: int
    routed_experts: int
    embedding: int  # input embedding; the output head is as large
    active: int  # used by one token: K experts of E, without the input embedding
    mtp: int

    @property
    def active_with_embedding(self) -> int:
        return self.active + self.embedding


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of the model, what of them one token uses, and the MTP layers' apart."""
    total = routed = mtp = 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        if name.startswith("mtp."):
            mtp += size
            continue
        total += size
        routed += size if ".experts." in name else 0
    embedding = config.vocab_size * config.hidden_size
    idle = routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return ParameterCounts(total, routed, embedding, total - embedding - idle, mtp)


# ---- floating point operations ----


@dataclass(frozen=True)
class Flops:
    """FLOPs for one token, by part."""

    attention_projections: float
    attention_scores: float  # queries times keys and probabilities times values
    compressor: float
    indexer: float
    router: float
    routed_experts: float
    shared_experts: float
    hyper_connections: float
    mtp: float  # everything of the MTP layers, their output head included
    output_head: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def training_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    attention_mode: Literal["sparse", "dense", "warmup"] = "sparse",
    indexer_trains: bool = True,
) -> Flops:
    """Forward and backward (twice the forward) for one token of a document of `seq_len` tokens.

    `attention_mode` "dense": CSA attends to every visible entry, and an indexer that does not train rests;
    in "sparse" mode it has no backward then. "warmup" is dense with a backward of the indexer's only. Counted
    are matrix products and the mixing of streams; norms, rotations, softmax, Sinkhorn and the optimizer are
    not, nor what is computed twice: these are the model's FLOPs, as in MFU.
    """
    forward = dict.fromkeys((part.name for part in fields(Flops)), 0.0)
    for layer_type in config.layer_types:
        for part, flops in _layer_flops(config, layer_type, seq_len, attention_mode):
            forward[part] += flops
    collapse = _stream_head_flops(config)
    forward["hyper_connections"] += collapse
    forward["output_head"] = _linear(config.hidden_size, config.vocab_size)
    block = sum(flops for _, flops in _layer_flops(config, SLIDING, seq_len, attention_mode))
    square = _linear(config.hidden_size, config.hidden_size)
    # e_proj once, h_proj on every stream, one block, its own stream head, the shared output head
    one_mtp = (1 + config.hc_mult) * square + block + collapse + forward["output_head"]
    forward["mtp"] = config.num_nextn_predict_layers * one_mtp
    passes = dict.fromkeys(forward, 1 if attention_mode == "warmup" else 3)
    passes["indexer"] = 3 if indexer_trains else int(attention_mode == "sparse")
    return Flops(**{part: passes[part] * flops for part, flops in forward.items()})


def _linear(inputs: int, outputs: int) -> float:
    return 2 * inputs * outputs


def _layer_flops(
    config: ModelConfig, layer_type: str, seq_len: int, attention_mode: str
) -> Iterator[tuple[str, float]]:
    """Forward FLOPs of one token through one layer, as (part, FLOPs)."""
    yield from _attention_flops(config, layer_type, seq_len, attention_mode)
    width, inner = config.hidden_size, config.moe_intermediate_size
    expert = 3 * _linear(width, inner)  # gate, up, down
    yield "router", _linear(width, config.n_routed_experts)
    yield "routed_experts", config.num_experts_per_tok * expert
    yield "shared_experts", config.n_shared_experts * expert
    if config.residual == "mhc":  # around attention and around the MoE
        streams = config.hc_mult
        project = _linear(streams * width, (2 + streams) * streams)
        mix = 2 * width * (streams + streams + streams * streams)  # pre, post, comb
        yield "hyper_connections", 2 * (project + mix)


def _attention_flops(
    config: ModelConfig, layer_type: str, seq_len: int, attention_mode: str
) -> Iterator[tuple[str, float]]:
    """Projections, scores over window and compressed entries, compressor, indexer."""
    width, latent = config.hidden_size, config.q_lora_rank
    heads = config.num_attention_heads * config.head_dim
    mixed = config.o_groups * config.o_lora_rank
    queries = _linear(width, latent) + _linear(latent, heads)
    grouped = _linear(heads // config.o_groups, config.o_lora_rank) * config.o_groups
    yield "attention_projections", queries + _linear(width, config.head_dim) + grouped + _linear(mixed, width)

    entries = mean_window_entries(seq_len, seq_len if layer_type == FULL else config.sliding_window)
    if layer_type in (CSA, HCA):
        rate = config.compress_rates[layer_type]
        selects = layer_type == CSA and attention_mode == "sparse"
        visible = mean_compressed_entries(seq_len, rate)
        entries += mean_compressed_entries(seq_len, rate, config.index_topk) if selects else visible
        # kv_proj and gate_proj; CSA has an a half and a b half of each
        outputs = 2 * (2 if layer_type == CSA else 1)
        yield "compressor", _linear(width, outputs * config.head_dim)
        if layer_type == CSA:
            index = config.index_n_heads * config.index_head_dim
            keys = _linear(width, outputs * config.index_head_dim)
            scores = 2 * visible * (index + config.index_n_heads)  # q . k of every head, then w . ReLU
            yield "indexer", keys + _linear(latent, index) + _linear(width, config.index_n_heads) + scores
    yield "attention_scores", 2 * 2 * heads * entries  # q . k, then probabilities times the same tensor


def _stream_head_flops(config: ModelConfig) -> float:
    if config.residual == "plain":
        return 0
    flat = config.hc_mult * config.hidden_size
    return _linear(flat, config.hc_mult) + 2 * flat


def mean_window_entries(seq_len: int, window: int) -> float:
    """Keys in the window, itself included, averaged over the positions 0 .. seq_len - 1 of a document."""
    full = min(window, seq_len)
    return (full * (full + 1) / 2 + (seq_len - full) * window) / seq_len


def mean_compressed_entries(seq_len: int, rate: int, most: int | None = None) -> float:
    """Visible entries, (t + 1) // rate of them at position t and never above `most`, averaged likewise."""
    complete, rest = divmod(seq_len, rate)  # the count is i at `rate` positions for 1 <= i < complete
    capped = complete if most is None else min(most, complete)
    rising = capped * (capped - 1) // 2 * rate  # counts 1 .. capped - 1
    level = capped * (rate * (complete - capped) + rest + 1)  # from position capped * rate - 1 on
    return (rising + level) / seq_len if complete else 0.0


# ---- cache ----


def kv_bytes_per_token(config: ModelConfig, context: int) -> float:
    """Bytes of key/value cache per token of a context of that many tokens.

    One attention entry: FP8 for the still channels, with one scale byte per 64, and bf16 for the rotated
    ones. One indexer key: FP4 with one scale byte per 32. CSA stores both per m tokens, HCA an entry per m'
    tokens, every layer the last `sliding_window` entries. Tokens still waiting to be compressed, fewer than
    m' per layer, are left out, and so is MTP.
    """
    rotated = config.qk_rope_head_dim
    still = config.head_dim - rotated
    entry = still + math.ceil(still / 64) + 2 * rotated
    index_key = config.index_head_dim / 2 + math.ceil(config.index_head_dim / 32)
    total = 0.0
    for layer_type in config.layer_types:
        total += entry * (context if layer_type == FULL else min(config.sliding_window, context))
        if layer_type in (CSA, HCA):
            stored = entry + (index_key if layer_type == CSA else 0)
            total += stored * (context // config.compress_rates[layer_type])
    return total / context
