"""Counts against the published figures, the model's own tensors, transformers, and sums written out."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model.config import ModelConfig
from model.flops import (
    count_parameters,
    kv_bytes_per_token,
    mean_compressed_entries,
    mean_window_entries,
    parameter_shapes,
    training_flops_per_token,
)
from model.model import ForCausalLM
from tests.tiny import tiny_config

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "model"
MILLION = 2**20


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


# ---- parameters ----


def test_flash_has_the_published_counts():
    counts = count_parameters(preset("v4_flash"))
    assert counts.total == 284_332_230_231
    assert counts.routed_experts == 277_025_390_592
    assert counts.active == 13_270_091_351


def test_pro_has_the_published_counts():
    counts = count_parameters(preset("v4_pro"))
    assert counts.total == 1_572_997_179_491
    assert counts.routed_experts == 1_547_396_186_112
    assert counts.active == 48_852_379_747


def test_reference_model_is_the_measured_one():
    counts = count_parameters(preset("ref_1b7"))
    assert round(counts.total / 1e9, 3) == 1.685
    assert round(counts.active_with_embedding / 1e9, 3) == 0.704


def test_small_presets_have_their_announced_size():
    assert round(count_parameters(preset("nano")).total / 1e6) == 100
    assert round(count_parameters(preset("laptop")).total / 1e6, 1) == 2.6


VARIANTS = [
    tiny_config("sschch", num_nextn_predict_layers=2, n_shared_experts=2),
    tiny_config("hhc", num_nextn_predict_layers=1, residual="plain", hc_mult=1),
    tiny_config("ff", hc_mult=2),
    preset("laptop"),
    preset("v4_flash"),
]


@pytest.mark.parametrize("config", VARIANTS, ids=["mtp", "plain", "full", "laptop", "flash"])
def test_shapes_are_the_models(config):
    with torch.device("meta"):
        model = ForCausalLM(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["laptop", "ref_1b7", "v4_flash", "v4_pro"])
def test_totals_are_the_oracles(name):
    config = preset(name)
    with torch.device("meta"):
        oracle = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_hf()))
    assert count_parameters(config).total == sum(parameter.numel() for parameter in oracle.parameters())


def test_mtp_is_counted_apart():
    with_mtp, without = (count_parameters(tiny_config(num_nextn_predict_layers=n)) for n in (3, 0))
    one = count_parameters(tiny_config(num_nextn_predict_layers=1))
    assert without.mtp == 0 and with_mtp.mtp == 3 * one.mtp > 0
    assert replace(with_mtp, mtp=0) == without


# ---- FLOPs ----


def test_flash_costs_what_others_derive():
    """Published derivations for S = 4096 and one MTP layer: 92.8, 90.8 and 90.4 GFLOP."""
    total = training_flops_per_token(preset("v4_flash"), 4096).total
    assert abs(total / 92_762_352_876 - 1) < 0.03
    assert total > 90.4e9


def test_an_indexer_that_does_not_train_has_no_backward():
    trained = training_flops_per_token(preset("laptop"), 512)
    idle = training_flops_per_token(preset("laptop"), 512, indexer_trains=False)
    assert idle.indexer == pytest.approx(trained.indexer / 3)
    assert trained.total - idle.total == pytest.approx(trained.indexer * 2 / 3)


@pytest.mark.parametrize("name", ["laptop", "ref_1b7", "v4_flash", "v4_pro"])
def test_products_with_weights_cost_six_flops_a_weight(name):
    """Forward and backward multiply every matrix three times; only K of E experts see a token."""
    config = replace(preset(name), num_nextn_predict_layers=0)
    share = config.num_experts_per_tok / config.n_routed_experts
    weights = 0.0
    for tensor, shape in parameter_shapes(config).items():
        if len(shape) > 1 and "position_bias" not in tensor and tensor != "embed_tokens.weight":
            weights += math.prod(shape) * (share if ".experts." in tensor else 1)
    flops = training_flops_per_token(config, 1)  # one token: nothing compressed, one key
    streams, heads = config.hc_mult, config.num_attention_heads * config.head_dim
    mixing = config.num_hidden_layers * 2 * (2 * streams + streams**2) + streams
    other = config.num_hidden_layers * 2 * heads + mixing * config.hidden_size
    assert flops.total == pytest.approx(6 * (weights + other), rel=1e-12)


def test_one_layer_by_hand():
    """Eight tokens, window 2, one CSA layer that keeps 1 of the entries made of 4 tokens."""
    config = tiny_config("c", hash_layers=0, sliding_window=2, index_topk=1)
    empty = training_flops_per_token(config, 1)
    flops = training_flops_per_token(config, 8)
    keys = (1 + 2 * 7) / 8  # in the window
    chosen = (0 * 3 + 1 * 5) / 8  # of (0, 0, 0, 1, 1, 1, 1, 2) visible entries
    visible = (0 * 3 + 1 * 4 + 2) / 8
    heads, index = 4 * 32, 16 * 16
    assert flops.attention_scores == pytest.approx(3 * 4 * heads * (keys + chosen))
    assert flops.indexer - empty.indexer == pytest.approx(3 * 2 * (index + 16) * visible)
    dense = training_flops_per_token(config, 8, "dense", indexer_trains=False)
    assert dense.attention_scores == pytest.approx(3 * 4 * heads * (keys + visible))
    assert dense.indexer == 0
    same = {"attention_scores", "indexer"}
    assert all(v == asdict(dense)[part] for part, v in asdict(flops).items() if part not in same)
    learning = training_flops_per_token(config, 8, "dense")
    assert asdict(learning) == asdict(dense) | {"indexer": flops.indexer}
    warmup = training_flops_per_token(config, 8, "warmup")
    third = {part: v / 3 for part, v in asdict(dense).items()}
    assert asdict(warmup) == pytest.approx(third | {"indexer": flops.indexer})


def test_mtp_adds_a_sliding_layer_a_head_and_its_projections():
    config = tiny_config("s", hash_layers=0)
    one = training_flops_per_token(config, 64)
    two = training_flops_per_token(replace(config, num_nextn_predict_layers=1), 64)
    joining = 6 * (1 + config.hc_mult) * config.hidden_size**2
    assert two.mtp == pytest.approx(one.total + joining)
    assert replace(two, mtp=0.0) == one


def test_full_attention_grows_with_the_square_and_sparse_does_not():
    full, sparse = tiny_config("f"), tiny_config("s")
    assert training_flops_per_token(full, 2**14).attention_scores == pytest.approx(
        3 * 4 * 4 * 32 * (2**14 + 1) / 2
    )
    assert training_flops_per_token(sparse, 2**14).attention_scores < 3 * 4 * 4 * 32 * 16


@given(st.integers(1, 300), st.integers(1, 64), st.none() | st.integers(1, 20))
def test_means_are_the_sums_over_positions(seq_len, size, most):
    window = sum(min(t + 1, size) for t in range(seq_len)) / seq_len
    assert mean_window_entries(seq_len, size) == pytest.approx(window)
    limit = seq_len if most is None else most
    compressed = sum(min((t + 1) // size, limit) for t in range(seq_len)) / seq_len
    assert mean_compressed_entries(seq_len, size, most) == pytest.approx(compressed)


# ---- cache ----

ENTRY = 448 + 448 // 64 + 64 * 2  # FP8, one scale byte per 64, bf16: 583 bytes
INDEX_KEY = 128 // 2 + 128 // 32  # FP4, one scale byte per 32: 68 bytes


def test_flash_cache_by_hand():
    layers = 21 * (ENTRY + INDEX_KEY) / 4 + 20 * ENTRY / 128
    windows = 43 * 128 * ENTRY
    for context in (2**16, MILLION):
        assert kv_bytes_per_token(preset("v4_flash"), context) == pytest.approx(layers + windows / context)


def test_a_short_context_has_no_more_than_itself_in_the_window():
    assert kv_bytes_per_token(preset("v4_flash"), 1) == 43 * ENTRY


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
def test_cache_is_two_percent_of_grouped_query_attention(name):
    config = preset(name)
    grouped = config.num_hidden_layers * 2 * 8 * 128 * 2  # K and V, 8 heads of 128, bf16
    assert kv_bytes_per_token(config, MILLION) / grouped == pytest.approx(0.02, abs=0.001)


def test_cache_against_v3_2():
    """The report's 10% and 7%. V3.2 has 61 layers of 512 FP8, 4 fp32 scales, 64 bf16, 128 FP8 index keys."""
    v3_2 = 61 * (512 + 4 * 4 + 64 * 2 + 128 + 4)
    assert round(kv_bytes_per_token(preset("v4_pro"), MILLION) / v3_2, 2) == 0.10
    assert round(kv_bytes_per_token(preset("v4_flash"), MILLION) / v3_2, 2) == 0.07
