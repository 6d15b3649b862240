"""The model's configuration, in Hugging Face's field names. No torch.

`ModelConfig` is checked when it is made: an impossible model is one line that names the key and the remedy.
`from_hf` and `to_hf` translate a `config.json` of `transformers` (`DeepseekV4Config`); `from_hf` also reads
the shorter form of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from configs.errors import ConfigError

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
FULL = "full_attention"
LAYER_TYPES = (SLIDING, CSA, HCA, FULL)
MLP_LAYER_TYPES = ("hash_moe", "moe")
RESIDUALS = ("mhc", "plain")

_ROPE = ("rope_type", "rope_theta")
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
ROPE_KEYS = {"default": _ROPE, "yarn": _ROPE + _YARN}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one model (DeepSeek-V4 report, arXiv 2606.19348; recipe of `transformers`).

    layer_types           attention of each layer: `sliding_attention`, `compressed_sparse_attention` (CSA),
                          `heavily_compressed_attention` (HCA), or the baseline `full_attention` (the same
                          attention over the whole document, nothing compressed)
    mlp_layer_types       router of each layer: `hash_moe` (fixed table by token id) or `moe` (learned)
    compress_rates        layer type -> tokens per compressed entry, for the compressed types in use
    qk_rope_head_dim      rotated channels, the last ones, of a head and of an indexer head
    rope_parameters       {"main": sliding-window layers, "compress": all others and the indexer}; each with
                          `rope_type` default or yarn and every key that type has (`ROPE_KEYS`)
    o_groups, o_lora_rank output projection: heads in groups, each projected to o_lora_rank channels
    hc_mult               residual streams of mHC; `residual: plain` is the baseline with one and no mHC
    swiglu_limit          clamp of SwiGLU: gate at most this, linear part within plus and minus this
    router_aux_loss_coef  weight of the sequence-wise balance loss
    num_nextn_predict_layers  depth of multi-token prediction (MTP)
    hash_seed             seed of the hash-routing table

    Raises ConfigError, naming `model.KEY`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int

    layer_types: list[str]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_rates: dict[str, int]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_parameters: dict[str, Any]

    mlp_layer_types: list[str]
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    routed_scaling_factor: float
    router_aux_loss_coef: float = 1e-4
    swiglu_limit: float = 10.0
    hash_seed: int = 0

    residual: str = "mhc"
    hc_mult: int
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    num_nextn_predict_layers: int
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_layers(self)
        _check_shapes(self)
        _check_rope(self)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """The model that `transformers` builds from the dict of a `config.json`.

        Two forms: the one `transformers` writes (`layer_types`, `mlp_layer_types`, `rope_parameters` with
        `main` and `compress`, `partial_rotary_factor`) and the released one (`compress_ratios` with an entry
        for each MTP layer, `num_hash_layers`, `qk_rope_head_dim`, `rope_theta`, `compress_rope_theta` and a
        flat `rope_scaling`). Nothing structural is guessed: a missing key, and a key that is not known to
        leave the arithmetic alone, raise ConfigError.
        """
        return cls(**_read_hf(hf))

    def to_hf(self) -> dict[str, Any]:
        """A dict that `DeepseekV4Config(**d)` and `from_hf` read to this model.

        Raises ConfigError for what `transformers` has no words for: plain residual, full attention, and
        other than one shared expert.
        """
        _require(self.residual == "mhc", "residual: transformers has no plain residual; export an mhc model")
        _require(FULL not in self.layer_types, f"layer_types: transformers has no {FULL}; export without it")
        _require(self.n_shared_experts == 1, "n_shared_experts: transformers has exactly 1; export with 1")
        values = asdict(self)
        del values["residual"]
        factor = self.qk_rope_head_dim / self.head_dim
        rope = {
            kind: {**parameters, "partial_rotary_factor": factor}
            for kind, parameters in values["rope_parameters"].items()
        }
        return {
            **values,
            **_HF_CONSTANTS,
            "architectures": ["DeepseekV4ForCausalLM"],
            "rope_parameters": rope,
            "partial_rotary_factor": factor,
            "rope_theta": rope["main"]["rope_theta"],
            "compress_rope_theta": rope["compress"]["rope_theta"],
        }


def _require(condition: bool, message: str) -> None:
    """`message`: the key, what is wrong with it; the remedy."""
    if not condition:
        raise ConfigError(f"model.{message}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(config: ModelConfig) -> None:
    """Every plain number has its type and sign."""
    zero_allowed = {"num_nextn_predict_layers", "hash_seed", "bos_token_id", "eos_token_id"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            least = 0 if field.name in zero_allowed else 1
            ok = _is_integer(value) and value >= least
            _require(ok, f"{field.name}: must be an integer of at least {least}, got {value!r}")
        elif field.type == "float":
            ok = _is_number(value) and 0 <= value < float("inf")
            ok = ok and (value > 0 or field.name == "router_aux_loss_coef")
            hint = f"; YAML reads it as text, write {float(value)!r}" if _is_numeral(value) else ""
            _require(ok, f"{field.name}: must be a positive number, got {value!r}{hint}")
    for key in ("bos_token_id", "eos_token_id"):
        value = getattr(config, key)
        _require(value < config.vocab_size, f"{key}: {value} must be below vocab_size ({config.vocab_size})")


def _is_numeral(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) > 0
    except ValueError:
        return False


def _check_layers(config: ModelConfig) -> None:
    """One known attention type and one known router per layer; a rate for every compressed type in use."""
    layers = config.num_hidden_layers
    for key, allowed in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
        types = getattr(config, key)
        _require(isinstance(types, list), f"{key}: must be a list of {layers} names, got {types!r}")
        _require(len(types) == layers, f"{key}: has {len(types)} entries; num_hidden_layers is {layers}")
        unknown = [name for name in types if name not in allowed]
        _require(not unknown, f"{key}: {unknown[:1]} is unknown; use {', '.join(allowed)}")
    rates = config.compress_rates
    _require(isinstance(rates, dict), f"compress_rates: must map {CSA} and {HCA} to integers, got {rates!r}")
    for name, rate in rates.items():
        _require(name in (CSA, HCA), f"compress_rates.{name}: is no compressed layer type; use {CSA}, {HCA}")
        ok = _is_integer(rate) and rate >= 1
        _require(ok, f"compress_rates.{name}: must be an integer of at least 1, got {rate!r}")
    for name in (CSA, HCA):
        missing = name in config.layer_types and name not in rates
        _require(not missing, f"compress_rates.{name}: is missing; layer_types uses it, so give its rate")
    _require(config.residual in RESIDUALS, f"residual: {config.residual!r} is unknown; use mhc or plain")
    if config.residual == "plain":
        _require(config.hc_mult == 1, f"hc_mult: is {config.hc_mult}; residual: plain has one stream, set 1")


def _check_shapes(config: ModelConfig) -> None:
    heads, groups = config.num_attention_heads, config.o_groups
    _require(heads % groups == 0, f"o_groups: must divide num_attention_heads ({heads}), got {groups}")
    dims, key = config.qk_rope_head_dim, "qk_rope_head_dim"
    _require(dims % 2 == 0, f"{key}: {dims} is odd; rotation needs channel pairs, use an even number")
    for limit in ("head_dim", "index_head_dim"):
        most = getattr(config, limit)
        _require(dims <= most, f"{key}: {dims} exceeds {limit} ({most}); rotate at most that many channels")
    # transformers keeps only the ratio, and truncates when it computes the dims back from it
    exact = int(config.head_dim * (dims / config.head_dim)) == dims
    _require(exact, f"{key}: its ratio to head_dim ({config.head_dim}) rounds off; take another than {dims}")
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    enough = chosen <= experts  # also for the hash table, whose rows are distinct experts
    _require(enough, f"num_experts_per_tok: {chosen} exceeds n_routed_experts ({experts}); lower it")


def _check_rope(config: ModelConfig) -> None:
    """`main` and `compress`, each complete and with nothing that would be silently unused."""
    rope = config.rope_parameters
    ok = isinstance(rope, dict) and set(rope) == {"main", "compress"}
    _require(ok, "rope_parameters: must have exactly the keys main and compress, each a dict")
    for kind, parameters in rope.items():
        at = f"rope_parameters.{kind}"
        _require(isinstance(parameters, dict), f"{at}: must be a dict, got {parameters!r}")
        rope_type = parameters.get("rope_type")
        known = rope_type in tuple(ROPE_KEYS)
        _require(known, f"{at}.rope_type: {rope_type!r} is unknown; use default or yarn")
        wanted = ROPE_KEYS[rope_type]
        for key in parameters:
            _require(key in wanted, f"{at}.{key}: means nothing to rope_type {rope_type}; remove it")
        for key in wanted:
            _require(key in parameters, f"{at}.{key}: is missing; rope_type {rope_type} needs it")
            number = key == "rope_type" or (_is_number(parameters[key]) and parameters[key] > 0)
            _require(number, f"{at}.{key}: must be a positive number, got {parameters[key]!r}")
        theta = parameters["rope_theta"]
        _require(theta > 1, f"{at}.rope_theta: {theta} must exceed 1, such as 10000")
        if rope_type == "yarn":
            _check_yarn(at, parameters)


def _check_yarn(at: str, yarn: dict[str, Any]) -> None:
    _require(yarn["factor"] >= 1, f"{at}.factor: {yarn['factor']} shortens the context; use at least 1")
    ordered = yarn["beta_fast"] > yarn["beta_slow"]
    _require(ordered, f"{at}.beta_fast: {yarn['beta_fast']} must exceed beta_slow ({yarn['beta_slow']})")
    one = yarn["attention_factor"] == 1.0
    _require(one, f"{at}.attention_factor: is {yarn['attention_factor']}; V4 scales no attention, write 1.0")


# ---- transformers' config.json ----

# Constants of V4's arithmetic: absent or exactly this.
_HF_CONSTANTS: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
}
_HF_RELEASED_CONSTANTS: dict[str, Any] = {"topk_method": "noaux_tc"}

# Of no consequence for the arithmetic of training: bookkeeping, outputs, generation, storage of weights.
_HF_NOTES = {"_name_or_path", "architectures", "auto_map", "id2label", "label2id", "transformers_version"}
_HF_STORAGE = {"dtype", "torch_dtype", "expert_dtype", "quantization_config"}
_HF_RUNTIME = {"attn_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type"}
_HF_OUTPUTS = {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
_HF_IGNORED = _HF_NOTES | _HF_STORAGE | _HF_RUNTIME | _HF_OUTPUTS | {"pad_token_id", "use_cache"}

# Translated below, under other names or in another form.
_HF_LAYERS = {"layer_types", "compress_ratios", "mlp_layer_types", "num_hash_layers"}
_HF_RATES = {"compress_rates", "compress_rate_csa", "compress_rate_hca"}
_HF_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "compress_rope_theta"}
_HF_TRANSLATED = _HF_LAYERS | _HF_RATES | _HF_ROPE | {"qk_rope_head_dim", "partial_rotary_factor"}

_LAYER_TYPE_OF_RATIO = {0: SLIDING, 4: CSA, 128: HCA}


def _read_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ModelConfig from either form of config.json."""
    for key, value in {**_HF_CONSTANTS, **_HF_RELEASED_CONSTANTS}.items():
        found = hf.get(key, value)
        same = found == value and isinstance(found, bool) == isinstance(value, bool)
        _require(same, f"{key}: is {found!r}; DeepSeek-V4 has {value!r} and nothing else is implemented")
    own = {field.name: field for field in fields(ModelConfig) if field.name != "residual"}
    known = _HF_IGNORED | _HF_TRANSLATED | set(own) | set(_HF_CONSTANTS) | set(_HF_RELEASED_CONSTANTS)
    for key in hf:
        _require(key in known, f"{key}: is unknown and might change the arithmetic; remove it")
    for key, field in own.items():
        optional = key in _HF_TRANSLATED or field.default is not MISSING
        _require(optional or key in hf, f"{key}: is missing from config.json; add it")
    _require(_count(hf, "head_dim") > 0, "head_dim: must be positive")
    values = {key: hf[key] for key in own if key in hf and key not in _HF_TRANSLATED}
    values["layer_types"] = _read_layer_types(hf)
    values["mlp_layer_types"] = _read_mlp_layer_types(hf)
    values["compress_rates"] = _read_compress_rates(hf)
    values["qk_rope_head_dim"] = _read_rope_dims(hf)
    values["rope_parameters"] = _read_rope(hf, values["qk_rope_head_dim"])
    return values


def _count(hf: dict[str, Any], key: str) -> int:
    _require(_is_integer(hf[key]), f"{key}: must be an integer, got {hf[key]!r}")
    return hf[key]


def _read_layer_types(hf: dict[str, Any]) -> list[str]:
    """`layer_types`, or `compress_ratios`: 0, 4 or 128 per layer, then a 0 for each MTP layer or nothing."""
    types, ratios = hf.get("layer_types"), hf.get("compress_ratios")
    _require(types is not None or ratios is not None, "layer_types: is missing from config.json; add it")
    if ratios is None:
        return hf["layer_types"]
    layers, depth = _count(hf, "num_hidden_layers"), _count(hf, "num_nextn_predict_layers")
    ok = isinstance(ratios, list) and len(ratios) in (layers, layers + depth)
    _require(ok, f"compress_ratios: must list {layers} layers, or {depth} more for MTP, got {ratios!r}")
    unknown = [ratio for ratio in ratios if ratio not in (0, 4, 128)]
    _require(not unknown, f"compress_ratios: {unknown[:1]} is unknown; use 0, 4 or 128")
    _require(not any(ratios[layers:]), "compress_ratios: an MTP layer's entry must be 0, sliding attention")
    from_ratios = [_LAYER_TYPE_OF_RATIO[ratio] for ratio in ratios[:layers]]
    same = types is None or list(types) == from_ratios
    _require(same, "compress_ratios: contradicts layer_types; remove one of them")
    return from_ratios


def _read_mlp_layer_types(hf: dict[str, Any]) -> list[str]:
    """`mlp_layer_types`, or the first `num_hash_layers` hash-routed."""
    types, hashed = hf.get("mlp_layer_types"), hf.get("num_hash_layers")
    _require(types is not None or hashed is not None, "mlp_layer_types: is missing from config.json; add it")
    if hashed is None:
        return hf["mlp_layer_types"]
    layers = _count(hf, "num_hidden_layers")
    ok = 0 <= _count(hf, "num_hash_layers") <= layers
    _require(ok, f"num_hash_layers: is {hashed}; it must lie between 0 and num_hidden_layers ({layers})")
    from_count = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    same = types is None or list(types) == from_count
    _require(same, "num_hash_layers: contradicts mlp_layer_types; remove one of them")
    return from_count


def _read_compress_rates(hf: dict[str, Any]) -> dict[str, int]:
    """`compress_rates`, or 4 and 128 as in the released models; the older scalar keys override, as there."""
    rates = hf.get("compress_rates")
    rates = {CSA: 4, HCA: 128} if rates is None else rates
    _require(isinstance(rates, dict), f"compress_rates: must be a dict, got {rates!r}")
    scalars = {CSA: hf.get("compress_rate_csa"), HCA: hf.get("compress_rate_hca")}
    return {**rates, **{name: rate for name, rate in scalars.items() if rate is not None}}


def _read_rope_dims(hf: dict[str, Any]) -> int:
    """`partial_rotary_factor` times head_dim, or `qk_rope_head_dim`; both only if they agree."""
    dims, factor = hf.get("qk_rope_head_dim"), hf.get("partial_rotary_factor")
    _require(dims is not None or factor is not None, "qk_rope_head_dim: is missing from config.json; add it")
    if factor is None:
        return _count(hf, "qk_rope_head_dim")
    _require(_is_number(factor), f"partial_rotary_factor: must be a number, got {factor!r}")
    from_factor = int(_count(hf, "head_dim") * factor)
    same = dims is None or dims == from_factor
    _require(same, f"partial_rotary_factor: {from_factor} channels, qk_rope_head_dim: {dims}; remove one")
    return from_factor


def _read_rope(hf: dict[str, Any], dims: int) -> dict[str, Any]:
    """Nested `rope_parameters`, or one flat dict that scales only the compressed layers."""
    given = [key for key in ("rope_parameters", "rope_scaling") if hf.get(key)]
    _require(len(given) < 2, "rope_scaling: is given beside rope_parameters; remove one of them")
    key = given[0] if given else "rope_scaling"
    rope = hf.get(key) or {}
    _require(isinstance(rope, dict), f"{key}: must be a dict, got {rope!r}")
    if "main" in rope or "compress" in rope:
        # Here the top-level thetas play no part, so a stale one does no harm.
        for kind, parameters in rope.items():
            _require(isinstance(parameters, dict), f"{key}.{kind}: must be a dict, got {parameters!r}")
        return {kind: _read_rope_kind(f"{key}.{kind}", rope[kind], hf, dims) for kind in rope}
    for theta in ("rope_theta", "compress_rope_theta"):
        _require(theta in hf, f"{theta}: is missing from config.json; add it")
    scaling = {
        **rope,
        "rope_theta": hf["compress_rope_theta"],
        "partial_rotary_factor": dims / hf["head_dim"],
    }
    if "yarn" in (scaling.get("rope_type"), scaling.get("type")):
        scaling.setdefault("attention_factor", 1.0)
    main = {"rope_type": "default", "rope_theta": hf["rope_theta"]}
    return {"main": main, "compress": _read_rope_kind(key, scaling, hf, dims)}


def _read_rope_kind(at: str, parameters: dict[str, Any], hf: dict[str, Any], dims: int) -> dict[str, Any]:
    """One rope dict without the keys that only repeat: the old `type`, the rotated fraction, `truncate`."""
    values = {"partial_rotary_factor": hf.get("partial_rotary_factor"), **parameters}
    values.setdefault("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    fraction = values.pop("partial_rotary_factor")
    same = _is_number(fraction) and int(hf["head_dim"] * fraction) == dims
    _require(same, f"{at}.partial_rotary_factor: {fraction!r} is not {dims} channels of head_dim; correct it")
    if values["rope_type"] == "yarn":
        truncate = values.pop("truncate", True)
        _require(truncate is True, f"{at}.truncate: is {truncate!r}; only true is implemented")
        values.setdefault("beta_fast", 32)
        values.setdefault("beta_slow", 1)
    return values
