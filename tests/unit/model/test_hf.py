"""Weights through Hugging Face folders, with transformers reading ours and writing its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import model.hf as hf
from configs.errors import ConfigError
from model.config import ModelConfig
from model.hf import (
    from_hf_state_dict,
    load_pretrained,
    save_pretrained,
    to_hf_state_dict,
    write_pretrained,
)
from model.model import stays_fp32
from model.tensorfile import TensorFile
from tests.tiny import tiny_config, tiny_model

CONFIG = tiny_config("sch", hash_layers=1)
WITH_MTP = replace(CONFIG, num_nextn_predict_layers=1)


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def oracle_of(config: ModelConfig) -> DeepseekV4ForCausalLM:
    """transformers' model with every tensor random, the hash table included."""
    oracle = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_hf()))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in oracle.state_dict().items():
        if name.endswith("tid2eid"):
            tensor.copy_(
                torch.rand(len(tensor), config.n_routed_experts, generator=generator).argsort()[:, :3]
            )
        else:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return oracle.eval()


def load_in_transformers(folder: Path) -> DeepseekV4ForCausalLM:
    """Loaded there without a missing, unexpected or mismatched weight."""
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    oracle, info = loaded
    assert info and not any(info.values()), info
    return oracle


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply `change` to the dict of the folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pretrained(tiny_model(WITH_MTP), tmp_path / "model")
    return tmp_path / "model"


# ---- names ----


def test_names_and_shapes_are_the_oracles():
    ours = to_hf_state_dict(tiny_model(CONFIG).state_dict(), CONFIG)
    theirs = oracle_of(CONFIG).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_mapping_there_and_back_keeps_the_tensors_themselves():
    state = tiny_model(WITH_MTP).state_dict()
    back = from_hf_state_dict(to_hf_state_dict(state, WITH_MTP), WITH_MTP)
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_gradients_map_by_name_without_buffers():
    model = tiny_model(WITH_MTP)
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    mapped = to_hf_state_dict(gradients, WITH_MTP)
    assert (
        mapped["model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight"]
        is (gradients["layers.1.self_attn.indexer.weights_proj.weight"])
    )
    assert from_hf_state_dict(mapped, WITH_MTP).keys() == gradients.keys()


def test_unknown_and_missing_names_are_listed_in_one_line():
    state = tiny_model(CONFIG).state_dict()
    del state["norm.weight"]
    state["layers.9.bias"] = torch.zeros(1)
    for mapping in (to_hf_state_dict, from_hf_state_dict):
        with pytest.raises(
            ValueError, match=r"^missing weights norm\.weight, unknown weights layers\.9\.bias; [^\n]*$"
        ):
            mapping(state, CONFIG)


# ---- our folders ----


def test_a_saved_model_reads_back_bit_for_bit(saved):
    model = tiny_model(WITH_MTP)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_pretrained(saved)
    assert loaded.config == WITH_MTP
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_every_weight_arrives_in_transformers(saved):
    oracle = load_in_transformers(saved)
    expected = to_hf_state_dict(tiny_model(WITH_MTP).state_dict(), WITH_MTP)
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith("mtp.")}
    assert same_bits(oracle.state_dict(), expected)


def test_both_sides_compute_the_same_logits(saved):
    oracle = DeepseekV4ForCausalLM.from_pretrained(saved).eval()
    input_ids = torch.randint(CONFIG.vocab_size, (2, 264), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = load_pretrained(saved)(input_ids).logits
        theirs = oracle(input_ids, use_cache=False).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.std().item())


def test_shards_have_an_index_that_both_sides_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    model = tiny_model(WITH_MTP)
    save_pretrained(model, tmp_path)  # an empty folder will do
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as handle:
            sizes = [handle.get_tensor(key).nbytes for key in handle.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 60_000
    assert same_bits(load_pretrained(tmp_path).state_dict(), model.state_dict())
    load_in_transformers(tmp_path)


def test_dtypes_are_kept_and_what_is_computed_in_fp32_stays(tmp_path):
    model = tiny_model(WITH_MTP).cast(torch.bfloat16)
    save_pretrained(model, tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same_bits(load_pretrained(tmp_path / "bf16").state_dict(), model.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        for name, parameter in load_pretrained(tmp_path / "bf16", dtype).named_parameters():
            assert parameter.dtype == (torch.float32 if stays_fp32(name) else dtype), name
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "bf16")
    assert oracle.lm_head.weight.dtype == torch.bfloat16


# ---- transformers' folders ----


def test_a_folder_that_transformers_wrote(tmp_path):
    config = replace(WITH_MTP, n_routed_experts=12)  # two digits: expert 10 does not follow expert 1
    oracle = oracle_of(config)
    oracle.save_pretrained(tmp_path)
    assert "model.layers.0.attn.wq_a.weight" in load_file(tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert loaded.config == replace(config, num_nextn_predict_layers=0)  # transformers has dropped MTP
    assert same_bits(to_hf_state_dict(loaded.state_dict(), loaded.config), oracle.state_dict())


def test_names_of_the_released_checkpoints(tmp_path):
    """As transformers writes them, less its remaining own names, and with MTP; config.json likewise."""
    config = tiny_config("scs", hash_layers=1)
    oracle = oracle_of(config)
    oracle.save_pretrained(tmp_path)
    own = {
        r"^model\.": "",
        r"^embed_tokens\.": "embed.",
        r"^hc_head\.hc_": "hc_head_",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    }

    def release(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            name = key
            for pattern, replacement in own.items():
                name = re.sub(pattern, replacement, name)
            tensors[name] = tensors.pop(key)
        width = config.hidden_size
        for name in [name for name in tensors if name.startswith("layers.2.")]:  # sliding window, top-k
            tensors[name.replace("layers.2.", "mtp.0.")] = tensors[name].clone()
        for part in ("fn", "base", "scale"):
            tensors[f"mtp.0.hc_head_{part}"] = tensors[f"hc_head_{part}"].clone()
        for part in ("norm", "enorm", "hnorm"):
            tensors[f"mtp.0.{part}.weight"] = torch.full((width,), 2.0)
        for part in ("e_proj", "h_proj"):
            tensors[f"mtp.0.{part}.weight"] = torch.full((width, width), 3.0)

    rewrite(tmp_path, release)
    assert {
        "embed.weight",
        "hc_head_fn",
        "mtp.0.ffn.experts.7.w3.weight",
        "mtp.0.attn.kv_norm.weight",
    } <= set(load_file(tmp_path / "model.safetensors"))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    state = load_pretrained(tmp_path).state_dict()
    main = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    assert same_bits(to_hf_state_dict(main, config), oracle.state_dict())
    for name in [name for name in main if name.startswith("layers.2.")]:
        assert torch.equal(state[name.replace("layers.2.", "mtp.0.block.")], main[name])
    assert torch.equal(state["mtp.0.hc_head.hc_fn"], main["hc_head.hc_fn"])
    assert state["mtp.0.norm.weight"].eq(2).all() and state["mtp.0.h_proj.weight"].eq(3).all()


# ---- what goes wrong ----


def assert_refused(folder: Path, words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=words) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_unknown_and_misshapen_tensors(saved):
    rewrite(saved, lambda tensors: tensors.pop("model.layers.0.mlp.gate.tid2eid"))
    assert_refused(saved, r"missing weights layers\.0\.mlp\.gate\.tid2eid")
    rewrite(saved, lambda tensors: tensors.pop("mtp.0.norm.weight"))
    assert_refused(saved, r"missing weights layers\.0\.mlp\.gate\.tid2eid, mtp\.0\.norm\.weight;")
    rewrite(saved, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(1)}))
    assert_refused(saved, r", unknown weights model\.layers\.0\.extra;")


def test_a_wrong_shape_is_named(saved):
    rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    assert_refused(saved, r"norm\.weight has shape \[7\], config\.json asks for \[32\]")


def test_long_lists_are_cut(saved):
    rewrite(saved, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".sinks" not in key])
    assert_refused(saved, r"missing weights embed_tokens\.weight(, \S+){9} and \d+ more")


def test_gaps_between_single_experts(tmp_path):
    oracle_of(CONFIG).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.ffn.experts.3.w3.weight"))
    assert_refused(tmp_path, r"missing weights model\.layers\.1\.ffn\.experts\.3\.w3\.weight;")


def test_fewer_and_more_single_experts_than_configured(tmp_path):
    oracle_of(CONFIG).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for count, kind in ((CONFIG.n_routed_experts + 1, "missing"), (CONFIG.n_routed_experts - 1, "unknown")):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"n_routed_experts": count}))
        assert_refused(tmp_path, rf"{kind} weights model\.layers\.0\.ffn\.experts\.{max(count, 8) - 1}\.w1")


def test_the_same_tensor_under_two_names(saved):
    rewrite(saved, lambda tensors: tensors.update({"head.weight": tensors["lm_head.weight"].clone()}))
    assert_refused(saved, r"lm_head\.weight is given more than once")


def test_quantised_weights_are_refused(saved):
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}})
    )
    assert_refused(saved, "quantization_config")


def test_missing_files(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    assert_refused(saved, "holds neither", FileNotFoundError)
    (saved / hf.INDEX).write_text(
        json.dumps({"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}})
    )
    assert_refused(saved, "model-00001-of-00002.safetensors is missing", FileNotFoundError)
    assert_refused(tmp_path / "nowhere", r"config\.json is missing", FileNotFoundError)


def test_damaged_files(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-8])
    assert_refused(saved, r"model\.safetensors is damaged")
    (saved / "config.json").write_text("{")
    assert_refused(saved, r"config\.json is not JSON")


def test_a_baseline_cannot_be_exported(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.layer_types"):
        save_pretrained(tiny_model(tiny_config("sf")), tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(saved):
    with pytest.raises(FileExistsError, match="not empty"):
        save_pretrained(tiny_model(CONFIG), saved)
    assert load_pretrained(saved).config == WITH_MTP


def test_a_crash_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    files: list[Path] = []

    def fails_at_the_second(path, *arguments):
        if files:
            raise OSError("no space left on device")
        files.append(path)
        return TensorFile(path, *arguments)

    monkeypatch.setattr(hf, "TensorFile", fails_at_the_second)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(tiny_model(CONFIG), tmp_path / "model")
    assert files and not any(tmp_path.iterdir())


# ---- in parts ----


def test_a_folder_written_in_parts_is_the_same(tmp_path):
    state = tiny_model(WITH_MTP).state_dict()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    files = {"tokenizer.json": "{}", "LICENSE": "free"}
    write_pretrained(tmp_path / "parts", WITH_MTP, specs, lambda name: iter(state[name]), files)
    save_pretrained(tiny_model(WITH_MTP), tmp_path / "whole")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {file: (tmp_path / "parts" / file).read_text() for file in files} == files


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([torch.zeros(2, 3)], "lacks 3 numbers"),
        ([torch.zeros(3, 3), torch.zeros(1)], "is no part of"),
        ([torch.zeros(9, dtype=torch.bfloat16)], "is no part of"),
    ],
)
def test_parts_must_make_up_the_tensor(parts, words, tmp_path):
    with (
        pytest.raises(ValueError, match=words),
        TensorFile(tmp_path / "x.safetensors", {"x": (torch.float32, (3, 3))}) as file,
    ):
        file.write_parts("x", parts)
