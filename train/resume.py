"""Where a run goes on: which checkpoint, in which folder, with what state, and what is dropped before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import Store

from configs.compose import differences, from_yaml, to_yaml
from configs.errors import ConfigError
from data.opening import Data
from model.config import ModelConfig
from train import checkpoint
from train.config import RunConfig
from train.engine import Engine
from train.metrics import keep_until
from train.sections import RunDirConfig
from train.spikes import keep_spikes, read_spikes, rollbacks
from train.watch import connect

BEGUN = "fourfold/run"  # the run that a job has begun, in torchrun's store, which outlives its processes
LOGS = ("metrics.jsonl", "timing.jsonl")
LOSS_WEIGHTS = ("model.router_aux_loss_coef",)  # of the model's keys, what a resumed run may change


def find_run(config: RunConfig, warn: Callable[[str], None]) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint that it goes on from."""
    store = connect()
    config = restarted(config, store)
    resumed = find_checkpoint(config, warn)
    resumed = resumed and unless_rolled_back(resumed, warn)
    folder = run_of(resumed) if resumed else new_folder(config)
    remember(folder, store)
    if resumed and checkpoint.step_of(resumed) > config.train.steps:
        raise ConfigError(f"train.steps is {config.train.steps}, but {resumed} is beyond it; train longer")
    return folder, resumed


def find_checkpoint(
    config: RunConfig, warn: Callable[[str], None], check: Callable[[Path], None] = checkpoint.verify
) -> Path | None:
    """The checkpoint that `resume` names: a checkpoint, the newest of a run, or "auto".

    "auto" is the newest of run.name, or without a name of all runs; None when there is none yet. `check`
    reads a checkpoint and raises ConfigError when it is damaged; older ones of the run are tried then, with a
    warning, unless a checkpoint is named. Raises ConfigError when no good one is left, when a named place
    holds none, and when it is another run's than run.name.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        return _newest(config, warn, check)
    found = Path(config.resume).resolve()
    run = run_of(found) if _is_checkpoint(found) else found
    if config.run.name not in (None, run.name):
        raise ConfigError(
            f"run.name is {config.run.name!r}, but resume goes on with {run.name!r}; leave run.name out"
        )
    if run != found:
        check(found)
        return found
    newest = checkpoint.newest_good(run / "checkpoints", warn, check)
    if newest is None:
        raise ConfigError(
            f"resume: {run} holds no good checkpoint; name a run's folder or a checkpoint in it"
        )
    return newest


def model_of_resumed(overrides: list[str]) -> ModelConfig | None:
    """The model of the checkpoint that a command line goes on from, where it does not name another.

    An imported model is in no file of `configs/`. None without `resume` and where nothing is found.
    """
    given = dict(text.partition("=")[::2] for text in overrides)
    if "resume" not in given or any(re.match(r"model[.=]|experiment=", text) for text in overrides):
        return None
    place = Path(given["resume"])
    if given["resume"] == "auto":
        place = Path(given.get("run.dir", RunDirConfig().dir)) / given.get("run.name", "*")
    found = [place] if _is_checkpoint(place) else place.parent.glob(f"{place.name}/checkpoints/step-*")
    for step in sorted(found, key=lambda step: step.stat().st_mtime, reverse=True):
        with suppress(ConfigError):  # the next good one will do
            return from_yaml(checkpoint.read_manifest(step)["config"]).model
    return None


def _is_checkpoint(folder: Path) -> bool:
    """By its name too: what is left when its manifest is lost is a damaged checkpoint, not a run."""
    return (folder / checkpoint.MANIFEST).exists() or folder.parent.name == "checkpoints"


def _newest(config: RunConfig, warn: Callable[[str], None], check: Callable[[Path], None]) -> Path | None:
    """Of the run with the newest checkpoint; of the next one when all of its are damaged."""
    folder = Path(config.run.dir)
    runs = [folder / config.run.name] if config.run.name else folder.glob("*")
    newest = [steps[-1] for run in runs if (steps := checkpoint.step_folders(run / "checkpoints"))]
    newest.sort(key=lambda step: step.stat().st_mtime, reverse=True)
    for step in newest:
        if good := checkpoint.newest_good(step.parent, warn, check):
            return good
    if newest:  # a run from the beginning would remove them
        raise ConfigError(
            f"resume: all checkpoints in {newest[0].parent} are damaged; choose another run.name"
        )
    return None


def unless_rolled_back(found: Path, warn: Callable[[str], None]) -> Path:
    """`found`, or what the run had gone back to after it was saved: killed before it could remove it.

    Raises ConfigError where that is damaged, and so is all before it.
    """
    known = checkpoint.read_manifest(found).get("rollbacks", 0)
    places = [spike.back_to for spike in rollbacks(read_spikes(run_of(found)))[known:] if spike.back_to]
    if not places or min(places) >= checkpoint.step_of(found):
        return found
    place = checkpoint.newest_good(found.parent, warn, before=min(places) + 1)
    if place is None:
        raise ConfigError(f"resume: {found} is from a spike, all before it are damaged; start a new run")
    return place


def run_of(step: Path) -> Path:
    """The run's folder of one of its checkpoints."""
    return step.parent.parent


def restarted(config: RunConfig, store: Store | None) -> RunConfig:
    """The configuration of a job that `torchrun --max-restarts` has started again: it goes on with the run
    that it began, whatever that is called, from its newest checkpoint."""
    if store is None or not store.check([BEGUN]):
        return config
    folder = Path(store.get(BEGUN).decode())
    return replace(config, run=RunDirConfig(str(folder.parent), folder.name), resume="auto")


def remember(folder: Path, store: Store | None) -> None:
    """For `restarted`."""
    if store is not None:
        store.set(BEGUN, str(folder))


def new_folder(config: RunConfig) -> Path:
    """The folder of a run from its beginning; with resume=auto also that of one without a checkpoint yet."""
    folder = Path(config.run.dir) / (config.run.name or datetime.now().strftime("%Y%m%d-%H%M%S"))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"run.dir: {nearest} is not a folder that you can write to; choose another run.dir")
    if config.resume is None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"run.name: {folder} exists already; choose another run.name, or continue with resume=auto"
        )
    return folder


def restore(
    folder: Path, config: RunConfig, engine: Engine, data: Data
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a checkpoint's state into the data and the engine's tensors; returns its manifest and these."""
    manifest = checkpoint.read_manifest(folder)
    for line in differences(manifest["config"], config):
        key = line.partition(":")[0]
        if key.startswith("model.") and key not in LOSS_WEIGHTS:
            raise ConfigError(f"resume: the checkpoint is of another model ({line}); restore that key")
    if manifest["tokenizer"] != data.tokenizer.fingerprint:
        meant = (
            config.data.on_change == "restart" and config.data.tokenizer.kind != "bpe" and manifest["data"]
        )
        if not meant:  # a BPE is another one as soon as the text is: nobody wants the model to change with it
            kept = f"{folder}/tokenizer.json"
            raise ConfigError(
                f"data.tokenizer: is another one than {kept}; restore its keys, or keep that one:"
                f" data.tokenizer.kind=file data.tokenizer.path={kept}"
            )
    if manifest["data"]:  # imported weights have seen no data
        data.train.load_state_dict(manifest["data"])
    with checkpoint.open_tensors(folder) as stored:
        targets = engine.state_to_load({key: stored.shape(key) for key in stored})
    checkpoint.load(folder, targets)
    return manifest, targets


def changes(manifest: Mapping[str, Any], config: RunConfig, world: int) -> list[str]:
    """What is not as it was when the checkpoint was saved, a line for each."""
    places = ("resume:", "run.")
    changed = [line for line in differences(manifest["config"], config) if not line.startswith(places)]
    if manifest["world"] != world:
        changed.append(f"ranks: {manifest['world']} -> {world}")
    return changed


def prepare_folder(folder: Path, config: RunConfig, step: int) -> None:
    """The run's folder as it was after `step`, with today's configuration."""
    try:
        drop_after(folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run.dir: {folder}: {error.strerror}; choose another, or mend it") from error


def drop_after(folder: Path, step: int) -> None:
    """Remove what the run did after `step`: it is about to be done anew, perhaps in another way."""
    for name in LOGS:
        keep_until(folder / name, step)
    keep_spikes(folder, step)
    for newer in checkpoint.step_folders(folder / "checkpoints"):
        if checkpoint.step_of(newer) > step:
            checkpoint.remove(newer)
