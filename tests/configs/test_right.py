"""Right configurations: every option composes, later wins, sweeps reach every run, nothing imports torch."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from configs.compose import (
    CONFIG_DIR,
    _compose_yaml,
    _mappings,
    _paths,
    compose,
    groups,
    help_text,
    multirun,
    to_run_config,
    to_yaml,
)
from train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
V4_VOCABULARY = ["model.vocab_size=129280"]
NEEDS = {
    f"phases=v4_{name}": ["experiment=nano"] for name in ("lengths", "scaled")
}  # options that need another key to be possible
NEEDS |= {
    f"data={path.stem}": V4_VOCABULARY
    for path in (CONFIG_DIR / "data").glob("*.yaml")
    if "kind: deepseek_v4" in path.read_text()
}
OPTIONS = [f"{group}={option}" for group, options in groups().items() for option in options]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_group_option_composes(option: str) -> None:
    assert isinstance(compose([option, *NEEDS.get(option, [])]), RunConfig)


def test_every_group_has_options() -> None:
    expected = {"model", "data", "optim", "precision", "parallel", "phases", "tracking", "experiment"}
    assert set(groups()) == expected


@pytest.mark.parametrize("option", groups()["experiment"])
def test_defaults_of_an_experiment_are_the_files_it_names(option: str) -> None:
    wanted = yaml.safe_load((CONFIG_DIR / "experiment" / f"{option}.yaml").read_text())
    config = dataclasses.asdict(compose([f"experiment={option}"]))
    for section in ("train", "optim"):
        for key, value in wanted.get(section, {}).items():
            assert config[section][key] == value


def test_the_command_line_beats_the_experiment_beats_the_root() -> None:
    root = yaml.safe_load((CONFIG_DIR / "train.yaml").read_text())
    nano = compose(["experiment=nano"])
    assert nano.train.seq_len == 4096 != root["train"]["seq_len"]
    assert (nano.precision.name, nano.train.micro_batch) == ("bf16", 4)
    changed = compose(["train.micro_batch=2", "precision=fp32", "experiment=nano", "model=laptop"])
    assert (changed.precision.name, changed.train.micro_batch) == ("fp32", 2)
    assert changed.model == compose([]).model != nano.model
    assert changed.train.seq_len == 4096


def test_values_reach_every_section_with_their_types() -> None:
    run = ["train.steps=77", "train.compile=yes", "run.name=first", "resume=auto"]
    optim = ["optim.lr=1e-3", "optim.betas=[0.8,0.9]"]
    rest = ["data.fim_rate=1", "data.tokenizer.vocab_size=1000", "model.rms_norm_eps=1e-5"]
    config = compose([*run, *optim, *rest])
    assert (config.train.steps, config.train.compile, config.run.name) == (77, True, "first")
    assert (config.optim.lr, config.optim.betas) == (1e-3, [0.8, 0.9])
    assert isinstance(config.data.fim_rate, float) and config.data.tokenizer.vocab_size == 1000
    assert (config.model.rms_norm_eps, config.resume) == (1e-5, "auto")


def test_a_key_that_no_yaml_file_holds_can_be_set() -> None:
    assert "update_rms" not in yaml.safe_load((CONFIG_DIR / "optim" / "adamw.yaml").read_text())
    assert compose(["optim=adamw", "optim.update_rms=0.5"]).optim.update_rms == 0.5


def test_the_tokenizer_follows_the_model() -> None:
    config = compose(["model.vocab_size=2048"])
    assert config.data.tokenizer.vocab_size == 2048


def test_a_run_cannot_change_its_configuration() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose([]).train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize("option", ["experiment=laptop", "experiment=ref_1b7", "model=v4_flash"])
def test_saved_yaml_reads_back_to_the_same_configuration(option: str) -> None:
    config = compose([option, "run.name=null", "optim.clip_norm=inf"])
    assert to_run_config(DictConfig(yaml.safe_load(to_yaml(config)))) == config


def test_train_yaml_explains_every_key_of_train_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text()
    config = compose([])
    for section in ("train", "run"):
        for field in dataclasses.fields(getattr(config, section)):
            assert f"{section}.{field.name}=" in text
    for group, options in groups().items():
        assert f"{group}=" in text and all(option in text for option in options)
    assert max(map(len, text.splitlines())) <= 120


def test_examples_of_the_help_are_right(tmp_path: Path) -> None:
    examples = [line.strip() for line in help_text().splitlines() if line.startswith("  python -m train ")]
    assert len(examples) == 7
    for example in examples:
        overrides = example.split("  ")[0].split()[3:]
        if overrides[0] != "-m":
            compose(overrides)


def test_a_sweep_runs_every_combination_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    seen: list[RunConfig] = []
    argv = ["-m", "optim=muon,adamw", "train.seed=range(3,5)", "train.steps=40", f"run.dir={tmp_path}"]
    multirun(argv, seen.append)
    assert [(config.optim.name, config.train.seed) for config in seen] == [
        ("muon", 3), ("muon", 4), ("adamw", 3), ("adamw", 4),
    ]  # fmt: skip
    assert all(config.train.steps == 40 for config in seen)
    folders = {Path(config.run.dir, str(config.run.name)) for config in seen}
    assert len(folders) == 4 and all(folder.parent.parent == tmp_path for folder in folders)
    assert [config.run.name for config in seen] == ["0", "1", "2", "3"]


def test_a_single_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["train.steps=50"])
    assert not list(tmp_path.iterdir())


def test_composing_imports_no_torch() -> None:
    code = "import sys; from configs.compose import compose; compose([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", [option for option in groups()["phases"] if option != "none"])
def test_a_ramp_of_a_preset_begins_below_its_end(option: str) -> None:
    """A batch grows by whole micro-batches: with large ones it would not grow at all."""
    timeline = compose([f"phases={option}", *NEEDS.get(f"phases={option}", [])]).timeline
    ramps = [phase for phase in timeline if phase.ramp_from < phase.batch_tokens]
    assert ramps
    for phase in ramps:
        assert phase.sequences(phase.first) * phase.seq_len == phase.ramp_from


@functools.cache
def keys(*overrides: str) -> set[str]:
    """But for those of named elements, such as sources."""
    named = tuple(f"{mapping}." for mapping in _mappings(RunConfig))
    return {key for key in _paths(_compose_yaml(overrides)) if not key.startswith(named)}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_groups_have_the_same_keys(option: str) -> None:
    """So that keys can be checked without composing what was chosen."""
    assert keys(option) == keys()
