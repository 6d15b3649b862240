"""format=deepseek: the published list of tensors, every stored number, and the way back into a run.

What is expected is quantised, decoded and named by test_import_hf's own code; its list of V4-Flash's tensors
is that of the published index.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.quantizers.quantizer_finegrained_fp8 as quantizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast

import model.hf as hf
from model.config import ModelConfig
from model.deepseek import released_keys, released_settings, released_specs
from model.hf import empty_model
from model.quant import FP8_BLOCK, dequantise, quantise_fp8, round_fp4
from model.tensorfile import nbytes
from tests.tiny import FLASH as FLASH_LAYERS
from tests.tiny import tiny_config, tiny_model
from tests.unit.train.test_export import PeakBytes, call, config_of_run, save
from tests.unit.train.test_import_hf import (
    FLASH,
    IN_FP4,
    IN_FP8,
    IN_FP32,
    decode,
    encode,
    load,
    logits,
    published,
    released,
)
from train import checkpoint, export, import_hf, sample
from train.export import model_specs, released_plan

# Blocks of 128 x 128 and 1 x 32: of the first model's matrices many are no multiple, of the second none.
TAILS = tiny_config(
    FLASH_LAYERS,
    hash_layers=2,
    vocab_size=320,
    hidden_size=160,
    q_lora_rank=136,
    moe_intermediate_size=96,
    num_nextn_predict_layers=1,
)
WHOLE = tiny_config(
    "sch",
    vocab_size=320,
    hidden_size=256,
    head_dim=64,
    q_lora_rank=128,
    o_lora_rank=64,
    index_head_dim=32,
    moe_intermediate_size=128,
    num_nextn_predict_layers=1,
)
# The same layers, as published for DeepSeek-V4-Pro.
PRO = FLASH | {
    "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "q_lora_rank": 1536,
    "o_groups": 16, "index_topk": 1024, "moe_intermediate_size": 3072, "n_routed_experts": 384,
    "routed_scaling_factor": 2.5, "compress_ratios": [128, 128] + 29 * [4, 128] + [4, 0],
}  # fmt: skip


def exported(config: ModelConfig, folder: Path) -> tuple[dict[str, Tensor], Path]:
    """A model's fp32 weights by their released names and the folder that they are exported to."""
    run = replace(config_of_run(folder / "data"), model=config)
    model = tiny_model(config)
    step = save(model, folder / "run", run)
    assert call(export, f"checkpoint={step}", f"out={folder / 'out'}", "format=deepseek") == 0
    return released(model.state_dict()), folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    """WHOLE, only to be read."""
    return exported(WHOLE, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def tails(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    """TAILS, only to be read."""
    return exported(TAILS, tmp_path_factory.mktemp("tails"))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Also the same sign of zero."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


# ---- the layout ----


def stored(settings: dict[str, Any]) -> dict[str, Any]:
    plan = released_plan(model_specs(ModelConfig.from_hf(settings), torch.float32))
    return {key: spec for matrix in plan for key, spec in released_specs(matrix.key, matrix.shape).items()}


def test_the_published_index_of_flash_is_written():
    """Every name, dtype and shape; the number of bytes is that of the published files."""
    specs = stored(FLASH)
    assert specs == dict(published(FLASH))
    assert sum(map(nbytes, specs.values())) == 159_609_485_896
    assert Counter(dtype for dtype, _ in specs.values()) == {
        torch.bfloat16: 433, torch.float32: 417, torch.float8_e4m3fn: 375, torch.float8_e8m0fnu: 34167,
        torch.int64: 3, torch.int8: 33792,
    }  # fmt: skip


def test_the_published_count_of_pro_is_written():
    specs = stored(PRO)
    assert len(specs) == 145_116
    assert sum(math.prod(shape) for _, shape in specs.values()) == 861_608_274_846
    assert specs["mtp.0.attn.wo_a.scale"] == (torch.float8_e8m0fnu, (128, 32))


@pytest.mark.parametrize("settings", [FLASH, PRO], ids=["flash", "pro"])
def test_the_published_settings_are_written(settings):
    written = released_settings(ModelConfig.from_hf(settings))
    notes = {"transformers_version", "use_cache"}
    assert {key: written.get(key) for key in settings.keys() - notes} == {
        key: value for key, value in settings.items() if key not in notes
    }
    assert written["expert_dtype"] == "fp4"  # what transformers needs beside the published keys


def test_other_rates_are_written_in_the_form_that_has_words_for_them():
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32}
    config = replace(WHOLE, compress_rates=rates)
    written = released_settings(config)
    assert "compress_ratios" not in written and ModelConfig.from_hf(written) == config
    assert written["quantization_config"] == FLASH["quantization_config"]


@pytest.mark.parametrize("config", [TAILS, WHOLE], ids=["tails", "whole"])
def test_names_are_read_back(config):
    for name, tensor in empty_model(config).state_dict().items():
        keys = released_keys(name, tensor.shape)
        assert hf.keys_of_names(keys, {name: tensor.shape}) == {name: keys}


# ---- the numbers ----


@pytest.mark.parametrize("case", ["tails", "whole"])
def test_every_stored_number(case, request):
    master, folder = request.getfixturevalue(case)
    files = load_file(folder / "model.safetensors")
    expected, meant = encode(master, ".scale", torch.float8_e8m0fnu)
    assert {key: (t.dtype, t.shape) for key, t in files.items()} == {
        key: (t.dtype, t.shape) for key, t in expected.items()
    }
    for key, numbers in meant.items():
        scales = files.get(f"{key.removesuffix('.weight')}.scale")
        found = files[key] if scales is None else decode(files[key], scales)
        error, least = ((x.to(master[key].dtype) - master[key]).abs() for x in (found, numbers))
        assert torch.equal(error, least), key  # of two numbers as near, encode may have taken the other


@pytest.mark.parametrize("case", ["tails", "whole"])
def test_a_run_reads_exactly_what_the_formats_keep(case, request, tmp_path):
    master, folder = request.getfixturevalue(case)
    assert call(import_hf, f"source={folder}", f"out={tmp_path / 'run'}") == 0
    arrived = load(tmp_path / "run")
    assert arrived.config == (TAILS if case == "tails" else WHOLE)
    found, classes = released(arrived.state_dict()), Counter[str]()
    for key, tensor in master.items():
        if IN_FP4.fullmatch(key):
            kind, expected = "fp4", round_fp4(tensor)
        elif IN_FP8.fullmatch(key):
            kind, expected = "fp8", dequantise(quantise_fp8(tensor, FP8_BLOCK))
        elif IN_FP32.fullmatch(key) or not tensor.is_floating_point():
            kind, expected = "exact", tensor
        else:
            kind, expected = "bf16", tensor.bfloat16().float()
        classes[kind] += 1
        assert same_bits(found[key].contiguous(), expected.contiguous()), key
        assert (kind == "exact") == torch.equal(expected, tensor), key
    assert len(classes) == 4 and found.keys() == master.keys()


def test_transformers_computes_the_same(whole, tmp_path, monkeypatch):
    """On a CPU it decodes FP8 and FP4 as it loads. It asks for accelerate first, yet uses none of it here.

    It takes partial blocks to be smaller whole ones, so this is only for the model without.
    """
    _, folder = whole
    assert call(import_hf, f"source={folder}", f"out={tmp_path / 'run'}") == 0
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    oracle, info = loaded
    assert not any(info.values()), info
    ours = load(tmp_path / "run")
    theirs = hf.from_hf_state_dict(oracle.state_dict(), replace(WHOLE, num_nextn_predict_layers=0))
    for name, tensor in theirs.items():
        assert torch.equal(tensor.to(ours.state_dict()[name].dtype), ours.state_dict()[name]), name
    mine, other = logits(ours), logits(oracle.float().eval())
    assert other.std() > 0.1 and (mine - other).norm() / other.norm() < 1e-5
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("import os")) == "import os"


# ---- files ----


def test_shards_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 300_000)
    master, folder = exported(replace(WHOLE, n_routed_experts=16), tmp_path)
    with PeakBytes() as memory:
        run, again = tmp_path / "run", tmp_path / "again"
        assert call(export, f"checkpoint={run}", f"out={again}", "format=deepseek") == 0
    sizes = [4 * t.numel() for key, t in master.items() if IN_FP4.fullmatch(key) or IN_FP8.fullmatch(key)]
    assert max(sizes) < memory.peak <= 6 * max(sizes), (memory.peak, max(sizes))  # numbers, codes and scales
    assert 6 * max(sizes) < sum(sizes) / 10
    index = json.loads((folder / hf.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    tensors = {key: (file, t) for file in files for key, t in load_file(folder / file).items()}
    assert {key: file for key, (file, _) in tensors.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in tensors.values())
    assert call(import_hf, f"source={folder}", f"out={tmp_path / 'back'}") == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 48}, "model.hidden_size: is 48; FP4 blocks are 32 wide, export as bf16 or fp32"),
        ({"moe_intermediate_size": 24}, "model.moe_intermediate_size: is 24; FP4 blocks are 32 wide"),
        ({"layer_types": 3 * ["full_attention"]}, "transformers has no full_attention"),
    ],
)
def test_what_the_layout_cannot_hold_is_one_line_and_writes_nothing(changes, words, tmp_path, capsys):
    config = replace(WHOLE, **changes)
    run = replace(config_of_run(tmp_path / "data"), model=config)
    step = save(tiny_model(config), tmp_path / "run", run)
    before = sorted(tmp_path.rglob("*"))
    assert call(export, f"checkpoint={step}", f"out={tmp_path / 'out'}", "format=deepseek") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(whole, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.TensorFile, "_put", full)
    run = whole[1].parent / "run"
    assert call(export, f"checkpoint={run}", f"out={tmp_path / 'new' / 'out'}", "format=deepseek") == 2
    assert "No space left" in capsys.readouterr().err and not any((tmp_path / "new").iterdir())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path, capsys):
    run = replace(config_of_run(tmp_path / "data"), model=replace(WHOLE, n_routed_experts=9))
    step = save(tiny_model(WHOLE), tmp_path / "run", run)
    assert call(export, f"checkpoint={step}", f"out={tmp_path / 'out'}", "format=deepseek") == 2
    assert "lacks weight.layers.0.mlp.experts.8.gate_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sample_names_the_command_that_reads_the_folder(whole, tmp_path, capsys):
    _, folder = whole
    assert call(sample, f"checkpoint={folder}", "prompt=import ") == 2
    assert "use train.import_hf on this folder" in capsys.readouterr().err
    assert call(import_hf, f"source={folder}", f"out={tmp_path / 'run'}") == 0
    capsys.readouterr()
    assert call(sample, f"checkpoint={tmp_path / 'run'}", "prompt=import ", "tokens=3") == 0
    assert capsys.readouterr().out.startswith("import ")
    assert checkpoint.newest_good(tmp_path / "run" / "checkpoints", pytest.fail)
