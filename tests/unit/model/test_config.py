"""ModelConfig: presets, mistakes, and both forms of config.json, with transformers as the oracle."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from configs.errors import ConfigError
from model.config import CSA, FULL, HCA, SLIDING, ModelConfig
from model.rope import inverse_frequencies

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "model"
PRESET_NAMES = ["laptop", "nano", "ref_1b7", "small", "v4_flash", "v4_pro"]


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def released_flash() -> dict[str, Any]:
    """V4-Flash in the form of the released checkpoint's config.json, written out by hand."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 43,
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"},
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
        "routed_scaling_factor": 1.5,
        "router_aux_loss_coef": 1e-4,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 129280,
    }


def nested_laptop() -> dict[str, Any]:
    """The laptop preset as transformers itself would write it."""
    return DeepseekV4Config(**ModelConfig(**preset("laptop")).to_hf()).to_dict()


def assert_one_line(error: pytest.ExceptionInfo[ConfigError], key: str) -> None:
    message = str(error.value)
    assert message.startswith(f"model.{key}: "), message
    assert "\n" not in message and len(message) < 200, message


# ---- presets ----


def test_every_preset_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == PRESET_NAMES


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_states_every_value_and_merges_strictly(name):
    values = preset(name)
    config = ModelConfig(**values)
    assert asdict(config) == values  # nothing left to a default
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(values)))
    assert merged == config


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_survives_hugging_face(name):
    config = ModelConfig(**preset(name))
    assert ModelConfig.from_hf(config.to_hf()) == config
    oracle = DeepseekV4Config(**config.to_hf())
    assert ModelConfig.from_hf(oracle.to_dict()) == config
    assert ModelConfig.from_hf(oracle.to_diff_dict()) == config


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_oracle_reads_our_values(name):
    config = ModelConfig(**preset(name))
    oracle: Any = DeepseekV4Config(**config.to_hf())
    ours = asdict(config)
    for key in set(ours) - {"rope_parameters", "residual"}:
        assert getattr(oracle, key) == ours[key], key
    for kind, parameters in config.rope_parameters.items():
        assert parameters.items() <= oracle.rope_parameters[kind].items()


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_rotations_equal_the_oracles(name):
    config = ModelConfig(**preset(name))
    rotary = DeepseekV4RotaryEmbedding(DeepseekV4Config(**config.to_hf()))
    for kind, parameters in config.rope_parameters.items():
        ours = inverse_frequencies(parameters, config.qk_rope_head_dim)
        torch.testing.assert_close(ours, getattr(rotary, f"{kind}_inv_freq"), rtol=1e-6, atol=0)
        assert getattr(rotary, f"{kind}_attention_scaling") == 1.0


def test_flash_and_pro_layers():
    flash, pro = (ModelConfig(**preset(name)) for name in ("v4_flash", "v4_pro"))
    assert flash.layer_types == [SLIDING] * 2 + [CSA, HCA] * 20 + [CSA]
    assert pro.layer_types == [HCA] * 2 + [CSA, HCA] * 29 + [CSA]
    for config in (flash, pro):
        assert config.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * (config.num_hidden_layers - 3)


def test_small_presets_use_every_mechanism():
    for name in ("laptop", "nano", "ref_1b7"):
        config = ModelConfig(**preset(name))
        assert set(config.layer_types) == {SLIDING, CSA, HCA}
        assert set(config.mlp_layer_types) == {"hash_moe", "moe"}
        assert config.num_nextn_predict_layers == 1 and config.hc_mult == 4


# ---- the released form ----


def test_released_flash_is_the_preset_and_what_the_oracle_reads():
    config = ModelConfig.from_hf(released_flash())
    assert config == ModelConfig(**preset("v4_flash"))
    assert ModelConfig.from_hf(DeepseekV4Config(**released_flash()).to_dict()) == config


def test_released_form_may_leave_out_the_mtp_ratio_and_name_its_rope_otherwise():
    hf = released_flash()
    hf["compress_ratios"].pop()
    hf["rope_parameters"] = hf.pop("rope_scaling")
    hf["rope_parameters"]["rope_type"] = hf["rope_parameters"].pop("type")
    del hf["rope_parameters"]["beta_fast"], hf["rope_parameters"]["beta_slow"]
    hf["partial_rotary_factor"] = 64 / 512
    hf["compress_rate_hca"] = 64
    config = ModelConfig.from_hf(hf)
    assert config.compress_rates == {CSA: 4, HCA: 64}
    assert config.rope_parameters == preset("v4_flash")["rope_parameters"]
    assert config == ModelConfig.from_hf(DeepseekV4Config(**copy.deepcopy(hf)).to_dict())


def test_released_form_without_scaling():
    hf = released_flash()
    del hf["rope_scaling"]
    config = ModelConfig.from_hf(hf)
    assert config.rope_parameters["compress"] == {"rope_type": "default", "rope_theta": 160000}
    assert config == ModelConfig.from_hf(DeepseekV4Config(**hf).to_dict())


def test_defaults_where_transformers_has_none():
    hf = nested_laptop()
    del hf["hash_seed"], hf["router_aux_loss_coef"]
    config = ModelConfig.from_hf(hf)
    assert config.hash_seed == 0 and config.router_aux_loss_coef == 1e-4


def test_reading_changes_nothing_in_the_given_dict():
    for hf in (released_flash(), nested_laptop()):
        before = copy.deepcopy(hf)
        ModelConfig.from_hf(hf)
        assert hf == before


# ---- mistakes in our own values ----

MAIN, COMPRESS = "rope_parameters.main", "rope_parameters.compress"
DELETE = object()

OWN_MISTAKES: list[tuple[str, Any, str]] = [
    ("vocab_size", 0, "vocab_size"),
    ("vocab_size", True, "vocab_size"),
    ("hidden_size", 192.0, "hidden_size"),
    ("hidden_size", None, "hidden_size"),
    ("num_nextn_predict_layers", -1, "num_nextn_predict_layers"),
    ("n_shared_experts", 0, "n_shared_experts"),
    ("hc_eps", "1e-6", "hc_eps"),
    ("rms_norm_eps", 0.0, "rms_norm_eps"),
    ("swiglu_limit", float("inf"), "swiglu_limit"),
    ("swiglu_limit", float("nan"), "swiglu_limit"),
    ("router_aux_loss_coef", -1.0, "router_aux_loss_coef"),
    ("eos_token_id", 4096, "eos_token_id"),
    ("bos_token_id", -1, "bos_token_id"),
    ("layer_types", SLIDING, "layer_types"),
    ("layer_types", [SLIDING] * 5, "layer_types"),
    ("layer_types", [SLIDING] * 5 + ["window"], "layer_types"),
    ("layer_types", [SLIDING] * 5 + [None], "layer_types"),
    ("mlp_layer_types", ["moe"] * 7, "mlp_layer_types"),
    ("mlp_layer_types", ["dense"] * 6, "mlp_layer_types"),
    ("compress_rates", {CSA: 4}, f"compress_rates.{HCA}"),
    ("compress_rates", {CSA: 0, HCA: 32}, f"compress_rates.{CSA}"),
    ("compress_rates", {CSA: 4, HCA: 32, SLIDING: 1}, f"compress_rates.{SLIDING}"),
    ("compress_rates", 4, "compress_rates"),
    ("residual", "add", "residual"),
    ("residual", "plain", "hc_mult"),
    ("o_groups", 3, "o_groups"),
    ("qk_rope_head_dim", 15, "qk_rope_head_dim"),
    ("qk_rope_head_dim", 66, "qk_rope_head_dim"),
    ("qk_rope_head_dim", 34, "qk_rope_head_dim"),
    ("num_experts_per_tok", 9, "num_experts_per_tok"),
    ("rope_parameters", {"main": {}}, "rope_parameters"),
    (MAIN, "default", MAIN),
    (f"{MAIN}.rope_type", "llama3", f"{MAIN}.rope_type"),
    (f"{MAIN}.rope_type", ["default"], f"{MAIN}.rope_type"),
    (f"{MAIN}.rope_theta", DELETE, f"{MAIN}.rope_theta"),
    (f"{MAIN}.rope_theta", 1, f"{MAIN}.rope_theta"),
    (f"{MAIN}.factor", 16, f"{MAIN}.factor"),
    (f"{COMPRESS}.factor", 0.5, f"{COMPRESS}.factor"),
    (f"{COMPRESS}.factor", "16", f"{COMPRESS}.factor"),
    (f"{COMPRESS}.beta_fast", DELETE, f"{COMPRESS}.beta_fast"),
    (f"{COMPRESS}.beta_fast", 1, f"{COMPRESS}.beta_fast"),
    (f"{COMPRESS}.original_max_position_embeddings", DELETE, f"{COMPRESS}.original_max_position_embeddings"),
    (f"{COMPRESS}.attention_factor", DELETE, f"{COMPRESS}.attention_factor"),
    (f"{COMPRESS}.attention_factor", 1.277, f"{COMPRESS}.attention_factor"),
    (f"{COMPRESS}.mscale", 1.0, f"{COMPRESS}.mscale"),
]


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`values` with the entry at a dotted path replaced or deleted."""
    values = copy.deepcopy(values)
    *parents, key = path.split(".")
    at = values
    for parent in parents:
        at = at[parent]
    if value is DELETE:
        del at[key]
    else:
        at[key] = value
    return values


@pytest.mark.parametrize(("path", "value", "key"), OWN_MISTAKES)
def test_a_mistake_is_one_line_that_names_its_key(path, value, key):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**changed(preset("laptop"), path, value))
    assert_one_line(error, key)


def test_rotated_channels_survive_transformers_arithmetic():
    """transformers keeps dims / head_dim and truncates; 30 of 44 channels come back as 29."""
    assert int(44 * (30 / 44)) == 29
    with pytest.raises(ConfigError) as error:
        ModelConfig(**preset("laptop") | {"head_dim": 44, "qk_rope_head_dim": 30})
    assert_one_line(error, "qk_rope_head_dim")


def test_text_that_looks_like_a_number_gets_its_remedy():
    with pytest.raises(ConfigError, match=r"write 1e-06|write 0.000001"):
        ModelConfig(**preset("laptop") | {"hc_eps": "1e-6"})


def test_baselines_are_valid_but_not_exportable():
    plain = ModelConfig(**preset("laptop") | {"residual": "plain", "hc_mult": 1})
    full = ModelConfig(**preset("laptop") | {"layer_types": [FULL] * 6, "compress_rates": {}})
    shared = ModelConfig(**preset("laptop") | {"n_shared_experts": 2})
    for config, key in ((plain, "residual"), (full, "layer_types"), (shared, "n_shared_experts")):
        with pytest.raises(ConfigError) as error:
            config.to_hf()
        assert_one_line(error, key)


# ---- mistakes in config.json ----

NESTED_MISTAKES: list[tuple[str, Any, str]] = [
    ("scoring_func", "softmax", "scoring_func"),
    ("norm_topk_prob", False, "norm_topk_prob"),
    ("hidden_act", "gelu", "hidden_act"),
    ("tie_word_embeddings", True, "tie_word_embeddings"),
    ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"),
    ("attention_dropout", 0.1, "attention_dropout"),
    ("num_key_value_heads", 8, "num_key_value_heads"),
    ("router_jitter_noise", 0.01, "router_jitter_noise"),
    ("model_type", "deepseek_v3", "model_type"),
    ("topk_method", "greedy", "topk_method"),
    ("kv_lora_rank", 512, "kv_lora_rank"),
    ("residual", "plain", "residual"),
    ("hidden_size", DELETE, "hidden_size"),
    ("hc_mult", DELETE, "hc_mult"),
    ("head_dim", 0, "head_dim"),
    ("head_dim", "64", "head_dim"),
    ("layer_types", DELETE, "layer_types"),
    ("layer_types", [FULL] * 5, "layer_types"),
    ("mlp_layer_types", DELETE, "mlp_layer_types"),
    ("num_hash_layers", 3, "num_hash_layers"),
    ("compress_ratios", [0] * 6, "compress_ratios"),
    ("eos_token_id", [1, 2], "eos_token_id"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("partial_rotary_factor", "a quarter", "partial_rotary_factor"),
    ("rope_scaling", {"type": "yarn"}, "rope_scaling"),
    (MAIN, DELETE, "rope_parameters"),
    (MAIN, None, MAIN),
    (f"{MAIN}.partial_rotary_factor", 0.5, f"{MAIN}.partial_rotary_factor"),
    (f"{COMPRESS}.attention_factor", DELETE, f"{COMPRESS}.attention_factor"),
    (f"{COMPRESS}.truncate", False, f"{COMPRESS}.truncate"),
    (f"{COMPRESS}.rope_type", "longrope", f"{COMPRESS}.rope_type"),
]

RELEASED_MISTAKES: list[tuple[str, Any, str]] = [
    ("compress_ratios", [0, 0, 4, 128], "compress_ratios"),
    ("compress_ratios", 4, "compress_ratios"),
    ("compress_ratios", [0, 0] + [4, 8] * 20 + [4, 0], "compress_ratios"),
    ("compress_ratios", [0, 0] + [4, 128] * 20 + [4, 4], "compress_ratios"),
    ("compress_ratios", [[0]] * 43, "compress_ratios"),
    ("compress_ratios", DELETE, "layer_types"),
    ("num_hash_layers", 44, "num_hash_layers"),
    ("num_hash_layers", "3", "num_hash_layers"),
    ("num_hash_layers", DELETE, "mlp_layer_types"),
    ("qk_rope_head_dim", DELETE, "qk_rope_head_dim"),
    ("qk_rope_head_dim", "64", "qk_rope_head_dim"),
    ("rope_theta", DELETE, "rope_theta"),
    ("compress_rope_theta", DELETE, "compress_rope_theta"),
    ("rope_scaling", "yarn", "rope_scaling"),
    ("rope_scaling.type", "linear", f"{COMPRESS}.rope_type"),
    ("rope_scaling.factor", DELETE, f"{COMPRESS}.factor"),
    ("rope_scaling.original_max_position_embeddings", DELETE, f"{COMPRESS}.original_max_position_embeddings"),
    ("compress_rates", [4, 128], "compress_rates"),
    ("compress_rate_csa", "4", f"compress_rates.{CSA}"),
    ("engram_layer_ids", [3], "engram_layer_ids"),
]


@pytest.mark.parametrize(("path", "value", "key"), NESTED_MISTAKES)
def test_a_mistake_in_transformers_form_is_one_line(path, value, key):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(changed(nested_laptop(), path, value))
    assert_one_line(error, key)


@pytest.mark.parametrize(("path", "value", "key"), RELEASED_MISTAKES)
def test_a_mistake_in_the_released_form_is_one_line(path, value, key):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(changed(released_flash(), path, value))
    assert_one_line(error, key)


def test_why_a_missing_attention_factor_is_refused():
    """In the nested form the oracle would then scale cos and sin by YaRN's own factor."""
    hf = changed(nested_laptop(), f"{COMPRESS}.attention_factor", DELETE)
    rotary = DeepseekV4RotaryEmbedding(DeepseekV4Config(**hf))
    assert rotary.compress_attention_scaling == pytest.approx(1.277, abs=1e-3)


def test_a_rotated_fraction_given_once_is_enough_where_it_is_for_the_oracle():
    hf = changed(nested_laptop(), f"{MAIN}.partial_rotary_factor", DELETE)
    config = ModelConfig.from_hf(hf)
    rotary: Any = DeepseekV4RotaryEmbedding(DeepseekV4Config(**copy.deepcopy(hf)))
    assert 2 * len(rotary.main_inv_freq) == config.qk_rope_head_dim

    del hf["partial_rotary_factor"]  # now only qk_rope_head_dim is left, which the oracle does not look up
    rotary = DeepseekV4RotaryEmbedding(DeepseekV4Config(**copy.deepcopy(hf)))
    assert 2 * len(rotary.main_inv_freq) == config.head_dim
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hf)
    assert_one_line(error, f"{MAIN}.partial_rotary_factor")
