"""Where a run goes on: which checkpoint, in which folder, and what of an abandoned branch is dropped."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from configs.errors import ConfigError
from train import checkpoint
from train.config import RunConfig
from train.metrics import keep_until

LOGS = ("metrics.jsonl", "timing.jsonl")


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `resume` names: a checkpoint, the newest of a run, or "auto".

    "auto" is the newest of run.name, or without a name of all runs; None when there is none yet. Raises
    ConfigError when a named place holds no checkpoint or is another run's than run.name.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        folder = Path(config.run.dir)
        runs = [folder / config.run.name] if config.run.name else sorted(folder.glob("*"))
        newest = [steps[-1] for run in runs if (steps := checkpoint.all_steps(run / "checkpoints"))]
        return max(newest, key=lambda step: (step / checkpoint.META).stat().st_mtime, default=None)
    found = Path(config.resume).resolve()
    steps = [found] if (found / checkpoint.META).exists() else checkpoint.all_steps(found / "checkpoints")
    if not steps:
        raise ConfigError(f"resume: {found} holds no checkpoint; name a run's folder or a checkpoint in it")
    name = run_of(steps[-1]).name
    if config.run.name not in (None, name):
        raise ConfigError(
            f"run.name is {config.run.name!r}, but resume goes on with {name!r}; leave run.name out"
        )
    return steps[-1]


def run_of(step: Path) -> Path:
    """The run's folder of one of its checkpoints."""
    return step.parent.parent


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
    for newer in checkpoint.all_steps(folder / "checkpoints"):
        if checkpoint.step_of(newer) > step:
            checkpoint.remove(newer)
