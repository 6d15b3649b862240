"""Checkpoints to transformers: equal logits, streamed, whole or not at all; and the commands' arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV4ForCausalLM,
    PreTrainedTokenizerFast,
)

import model.hf as hf
from configs.compose import compose, from_yaml, to_yaml
from configs.errors import ConfigError
from data.tokenizer import train_bpe
from model.hf import load_pretrained
from model.model import ForCausalLM, stays_fp32
from optim.partition import pieces
from tests.tiny import tiny_config, tiny_model
from train import cli, export, import_hf, sample, saving
from train.config import RunConfig

CONFIG = tiny_config("sch", hash_layers=1, vocab_size=320, num_nextn_predict_layers=1)
TEXTS = ["def add(left, right):\n    return left + right\n", "import os\nimport sys\n\nprint(sys.argv)\n"]


def tokenizer_json() -> str:
    return train_bpe(iter(TEXTS), 320)


def config_of_run(folder: Path, *overrides: str) -> RunConfig:
    """A run's configuration with the tiny model and a tokenizer in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    tokenizer = ["data.tokenizer.kind=file", f"data.tokenizer.path={folder / 'tokenizer.json'}"]
    return compose([*tokenizer, *overrides], CONFIG)


def save(model: ForCausalLM, run: Path, config: RunConfig, step: int = 3, extra: int = 0) -> Path:
    """A checkpoint of the model as an engine saves it, optimizer state included."""
    state: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        for piece in pieces(name, parameter.shape):
            flat = parameter.detach().flatten()[piece.start : piece.start + piece.numel]
            state[f"weight.{piece.key}"] = flat.view(piece.shape)
            state[f"momentum.{piece.key}"] = torch.full(piece.shape, 7.0)
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    manifest = {"config": to_yaml(config), "data": {}, "tracking": {}, "tokenizer": "", "world": 1}
    texts = {"tokenizer.json": tokenizer_json()}
    return saving.write(run / "checkpoints", step, specs, iter(state.items()), manifest, texts)


def call(command: Any, *arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments], command.HELP, command.main)


@dataclass
class Saved:
    model: ForCausalLM
    run: Path
    step: Path


@pytest.fixture
def saved(tmp_path) -> Saved:
    model = tiny_model(CONFIG)
    run = tmp_path / "run"
    return Saved(model, run, save(model, run, config_of_run(tmp_path / "data")))


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device.type == "cpu":
                storage = made.untyped_storage()
                if storage.data_ptr() not in given:
                    self._alive[storage.data_ptr()] = (
                        torch.multiprocessing.reductions.StorageWeakRef(storage),
                        storage.nbytes(),
                    )
        self._alive = {at: entry for at, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


# ---- what arrives in transformers ----


def test_fp32_gives_the_same_weights_and_logits(saved, tmp_path):
    assert call(export, f"checkpoint={saved.step}", f"out={tmp_path / 'out'}", "format=fp32") == 0
    ours = load_pretrained(tmp_path / "out")
    state = saved.model.state_dict()
    assert ours.config == CONFIG and all(torch.equal(t, state[n]) for n, t in ours.state_dict().items())
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    oracle, info = loaded
    assert not any(info.values()), info
    ids = torch.randint(CONFIG.vocab_size, (2, 264), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mine, theirs = saved.model(ids).logits, oracle.eval()(ids, use_cache=False).logits
    assert theirs.std() > 0.1
    assert (mine - theirs).norm() / theirs.norm() < 1e-5
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("import os")) == "import os"


def test_the_folder_alone_says_which_model_and_tokenizer(saved, tmp_path):
    """What `lm_eval --model hf` loads, with the marks that it begins and ends texts with."""
    assert call(export, f"checkpoint={saved.step}", f"out={tmp_path / 'out'}", "format=fp32") == 0
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), DeepseekV4ForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = sample.Tokenizer(saved.step / "tokenizer.json")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.bos_id, own.eos_id) == (0, 1)
    assert tokenizer.model_max_length == CONFIG.max_position_embeddings
    for text in ("import os", "left , right .\n", " 'quoted' "):
        ids = own.encode_batch([text])[0].tolist()
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text


def test_bf16_keeps_what_is_computed_in_fp32(saved, tmp_path):
    assert (
        call(export, f"checkpoint={saved.run}", f"out={tmp_path / 'out'}") == 0
    )  # the default, a run's folder
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    state, written = saved.model.state_dict(), load_pretrained(tmp_path / "out").state_dict()
    for name, tensor in state.items():
        narrow = not stays_fp32(name) and not name.endswith(hf.BUFFERS)
        expected = tensor.to(torch.bfloat16) if narrow else tensor
        assert written[name].dtype == expected.dtype and torch.equal(written[name], expected), name
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in hf.to_hf_state_dict(written, CONFIG).items():
        if not name.startswith("mtp."):  # transformers holds routers in bf16, the rest as we do
            assert torch.equal(oracle[name], tensor.to(oracle[name].dtype)), name
            assert oracle[name].dtype == tensor.dtype or name.endswith("mlp.gate.weight"), name


def test_shards_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 600_000)
    config = replace(config_of_run(tmp_path / "data"), model=replace(CONFIG, n_routed_experts=128))
    model = tiny_model(config.model)
    step = save(model, tmp_path / "run", config)
    with PeakBytes() as memory:
        assert call(export, f"checkpoint={step}", f"out={tmp_path / 'out'}") == 0
    sizes = [piece.numel for name, p in model.named_parameters() for piece in pieces(name, p.shape)]
    assert 0 < memory.peak <= 2 * 4 * max(sizes), (memory.peak, max(sizes))  # a piece and its bf16 copy
    assert 2 * 4 * max(sizes) < 2 * model.layers[0].mlp.experts.down_proj.numel()  # less than a stack
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert load_pretrained(tmp_path / "out").config == config.model


# ---- which checkpoint ----


def test_a_damaged_newer_checkpoint_is_passed_over_with_a_warning(saved, tmp_path, capsys):
    newer = save(tiny_model(CONFIG, seed=1), saved.run, config_of_run(tmp_path / "data"), step=5)
    file = next(newer.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert call(export, f"checkpoint={saved.run}", f"out={tmp_path / 'out'}", "format=fp32") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: step-00000005 is skipped: ") and captured.err.count("\n") == 1
    assert torch.equal(load_pretrained(tmp_path / "out").lm_head.weight, saved.model.lm_head.weight)
    assert call(export, f"checkpoint={newer}", f"out={tmp_path / 'other'}") == 2
    assert "does not match its checksum" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path, capsys):
    config = config_of_run(tmp_path / "data")
    other = save(saved.model, tmp_path / "b", replace(config, model=replace(CONFIG, n_routed_experts=9)))
    assert call(export, f"checkpoint={other}", f"out={tmp_path / 'out'}") == 2
    assert "lacks weight.layers.0.mlp.experts.8.gate_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_configuration_in_the_manifest_is_checked():
    with pytest.raises(
        ConfigError, match=r"^train\.stepz: there is no such key; did you mean train\.steps\?"
    ):
        from_yaml(to_yaml(compose([], CONFIG)).replace("  steps:", "  stepz:"))


# ---- what goes wrong ----


def mistakes() -> Iterator[tuple[list[str], str]]:
    good = ["checkpoint={run}", "out={out}"]
    yield [], "checkpoint: has no value; set it as checkpoint=VALUE"
    yield good[:1], "out: has no value"
    yield [*good, "fromat=fp32"], "fromat: there is no such key; did you mean format?"
    yield [*good, "xyzzy=1"], "xyzzy: there is no such key; the keys are checkpoint, out, format"
    yield [*good, "format=fp8"], "format is 'fp8'; it must be one of bf16, fp32, deepseek"
    yield [*good, "verbose"], "verbose: write KEY=VALUE"
    yield ["checkpoint={run}", "out={run}"], "is not empty"
    yield ["checkpoint={run}/nowhere", "out={out}"], "nowhere does not exist"
    yield ["checkpoint={run}/checkpoints", "out={out}"], "holds no whole checkpoint"


@pytest.mark.parametrize(("arguments", "words"), list(mistakes()))
def test_a_mistake_is_one_line_and_writes_nothing(arguments, words, saved, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    places = {"run": saved.run, "out": tmp_path / "out"}
    assert call(export, *(text.format(**places) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.TensorFile, "_put", full)
    assert call(export, f"checkpoint={saved.run}", f"out={tmp_path / 'new' / 'out'}") == 2
    assert "No space left" in capsys.readouterr().err and not any((tmp_path / "new").iterdir())


def test_a_baseline_is_refused_before_anything_is_written(tmp_path, capsys):
    config = replace(config_of_run(tmp_path / "data"), model=tiny_config("sf", vocab_size=320))
    step = save(tiny_model(config.model), tmp_path / "run", config)
    assert call(export, f"checkpoint={step}", f"out={tmp_path / 'out'}") == 2
    assert "model.layer_types" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_has_examples():
    done = subprocess.run([sys.executable, "-m", "train.export", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == export.HELP + "\n"
    for name, text in [("export", export.HELP), ("import_hf", import_hf.HELP), ("sample", sample.HELP)]:
        assert f"Examples:\n  python -m train.{name} " in text
