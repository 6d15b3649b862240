"""Wrong configurations: one line each, with the key and the remedy, and nothing started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import compose, multirun
from configs.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# Command line -> what the line must hold: the key and the remedy.
WRONG: dict[str, list[str]] = {
    # keys that do not exist
    "train.stesp=5": ["train.stesp", "train.steps"],
    "steps=5": ["steps", "did you mean train.steps"],
    "model.hidden_sise=64": ["model.hidden_sise", "model.hidden_size"],
    "optimizer=muon": ["optimizer", "optim"],
    "precision.nmae=x": ["precision.nmae", "did you mean precision.name"],
    "+train.foo=1": ["train.foo", "--help"],
    "model.rope_parameters.main.theta=5": ["rope_theta"],
    # groups
    "model=nan": ["model=nan", "laptop, nano", "model=laptop"],
    "model=null": ["model=null", "laptop, nano"],
    "experiment=foo": ["experiment=foo", "experiment=laptop"],
    "precision=int8": ["precision=int8", "bf16, fp32, fp4_qat, fp8"],
    "~model": ["~model", "laptop"],
    "model@train=laptop": ["model@train", "KEY=VALUE"],
    # types
    "train.steps=abc": ["train.steps", "abc", "whole number"],
    "train.steps=1.5": ["train.steps", "1.5", "whole number"],
    "train.steps=true": ["train.steps", "true", "whole number"],
    "train.steps=null": ["train.steps", "null", "whole number"],
    "train.steps=": ["train.steps", "empty", "whole number"],
    "train.steps=[1]": ["train.steps", "whole number"],
    "train.compile=maybe": ["train.compile", "maybe", "true or false"],
    "optim.lr=fast": ["optim.lr", "fast", "a number"],
    "optim.betas=[a,0.9]": ["optim.betas[0]", "a number"],
    "optim.betas=5": ["optim.betas", "list", "number"],
    "data.max_bytes=many": ["data.max_bytes", "many", "whole number or null"],
    "data.tokenizer.vocab_size=big": ["data.tokenizer.vocab_size", "big", "whole number"],
    "model.layer_types=sliding_attention": ["model.layer_types", "list"],
    "train=5": ["train", "steps", "train.steps=VALUE"],
    # syntax
    "train.steps": ["train.steps", "KEY=VALUE"],
    "--steps": ["--steps", "KEY=VALUE"],
    "train.steps==": ["train.steps", "quote"],
    "=5": ["=5", "KEY=VALUE"],
    "data.path=~/texts": ["data.path", "'data.path=\"~/texts\"'"],
    "train.steps=100,200": ["train.steps", "-m"],
    "hydra.run.dir=here": ["hydra.run.dir", "-m"],
    "train.seed=${nope}": ["train.seed", "nope"],
    # parallelism that cannot be, whatever the number of ranks
    "parallel.cp=64": ["train.seq_len is 512", "parallel.cp · model.sliding_window", "4096 or more"],
    "parallel.cp=3": ["train.seq_len is 512", "parallel.cp = 3"],
    "parallel.ep=0": ["parallel.ep", "1 or more"],
    "parallel.expert_gradients=float16": ["parallel.expert_gradients", "float32 or bfloat16"],
    # values out of range
    "train.steps=0": ["train.steps", "1 or more"],
    "train.device=tpu": ["train.device", "auto, cpu or cuda"],
    "train.attention_mode=full": ["train.attention_mode", "sparse, dense or warmup"],
    "train.indexer_loss_weight=-1": ["train.indexer_loss_weight", "0 or more"],
    "train.mtp_loss_weight=inf": ["train.mtp_loss_weight", "finite"],
    "precision.compute_dtype=float16": ["precision.compute_dtype", "float32 or bfloat16"],
    "run.name=a/b": ["run.name", "run.dir"],
    "run.dir=''": ["run.dir", "folder"],
    "optim.lr=-1": ["optim.lr", "above 0"],
    "data.validation_fraction=2": ["data.validation_fraction"],
    "model.num_hidden_layers=3": ["model.layer_types", "num_hidden_layers"],
    # contradictions between parts
    "train.batch_tokens=1000": ["train.batch_tokens", "multiple", "4096"],
    "train.eval_tokens=100": ["train.eval_tokens", "512 or more"],
    "optim.warmup_steps=300": ["optim.warmup_steps", "decay starts at step"],
    "model.max_position_embeddings=256": ["train.seq_len", "model.max_position_embeddings = 256"],
    "model.compress_rates.heavily_compressed_attention=1024": ["train.seq_len", "1024", "compress"],
    "model.num_nextn_predict_layers=511": ["model.num_nextn_predict_layers", "511"],
    "data=python_v4": ["model.vocab_size", "129280"],
    "data.tokenizer.vocab_size=5000": ["data.tokenizer.vocab_size", "model.vocab_size = 2048"],
    # sources and phases, which have names of their own
    "data.sources.python.weigt=2": ["data.sources.python.weigt", "data.sources.python.weight"],
    "data.sources.python.weight=-1": ["data.sources.python.weight", "0 or more"],
    "data.sources.python.weight=0": ["data.sources", "weight"],
    "data.sources.python.dataset=a/b": ["data.sources.python", "files, dataset and of"],
    "data.sources.web=5": ["data.sources.web", "files", "data.sources.web.files=VALUE"],
    "data.sources.web.weight=2": ["data.sources.web", "files, dataset and of"],
    "data.sources.long.of=web": ["data.sources.long.of", "web", "python"],
    "data.sources.python.max_tokens=0": ["data.sources.python", "max_tokens=0"],
    "data.sources.python.subset=x": ["data.sources.python", "dataset"],
    "data.sources.python.fim_rate=2": ["data.sources.python.fim_rate", "[0, 1]"],
    "~data.sources": ["data", "data.path"],
    "data.shuffle_shards=0": ["data.shuffle_shards", "1 or more"],
    "data.workers=0": ["data.workers", "1 or more"],
    "data.on_change=ignore": ["data.on_change", "refuse or restart"],
    "phases.a.steps=10": ["phases", "10 steps", "train.steps is 150"],
    "phases.a.steps=400": ["phases", "400"],
    "phases.a.seq_len=1": ["phases.a.seq_len", "2 or more"],
    "phases.a.seq_len=16": ["phases.a.seq_len", "compress"],
    "phases.a.batch_tokens=100": ["phases.a.batch_tokens", "multiple of 4096"],
    "phases.a.ramp_from=9000": ["phases.a.ramp_from", "4096"],
    "phases.a.weights={web: 1}": ["phases.a.weights", "web", "python"],
    "phases.a.weights={python: 0}": ["phases.a.weights", "not all 0"],
    "phases.a=3": ["phases.a", "steps"],
    "phases.a.stesp=3": ["phases.a.stesp", "phases.a.steps"],
    "phases=none2": ["phases=none2", "lengths"],
    "resume=/no/such/folder": ["resume", "/no/such/folder", "auto"],
}


def explain(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


@pytest.mark.parametrize("override", WRONG)
def test_wrong_configuration_is_one_line_with_key_and_remedy(override: str) -> None:
    line = explain([override])
    assert "\n" not in line and 0 < len(line) < 400
    for word in WRONG[override]:
        assert word in line


@pytest.mark.parametrize(
    "override", ["train.stesp=5", "model=nan", "train.steps=1.5", "optim.warmup_steps=300"]
)
def test_the_program_prints_that_line_and_fails(override: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", override, f"run.dir={tmp_path}/runs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and explain([override]) in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-m", "train.seed=0,x"], ["train.seed is x", "whole number"]),
        (["-m", "model=laptop,nan"], ["model=nan", "laptop, nano"]),
        (["-m", "train.sed=0,1"], ["train.sed", "train.seed"]),
        (["-m", "model=laptop,nano", "train.seq_len=64"], ["train.seq_len", "128"]),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        multirun(argv, lambda config: pytest.fail("a run was started"))
    for word in words:
        assert word in str(caught.value)
