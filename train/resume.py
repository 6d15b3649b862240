"""Where a run goes on: which checkpoint, in which folder, and what of an abandoned branch is dropped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch.distributed import Store

from configs.compose import from_yaml
from configs.errors import ConfigError
from model.config import ModelConfig
from train import checkpoint
from train.config import RunConfig
from train.metrics import keep_until
from train.sections import RunDirConfig
from train.spikes import keep_spikes, read_spikes, rollbacks

BEGUN = "fourfold/run"  # the run that a job has begun, in torchrun's store, which outlives its processes
LOGS = ("metrics.jsonl", "timing.jsonl")


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


def drop_after(folder: Path, step: int) -> None:
    """Remove what the run did after `step`: it is about to be done anew, perhaps in another way."""
    for name in LOGS:
        keep_until(folder / name, step)
    keep_spikes(folder, step)
    for newer in checkpoint.step_folders(folder / "checkpoints"):
        if checkpoint.step_of(newer) > step:
            checkpoint.remove(newer)
