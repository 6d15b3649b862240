"""Checkpoints of one process: safetensors and JSON, written aside, synced, then renamed into place.

A folder `step-00000300` is complete or does not exist. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ConfigError
from model.hf import flush

TENSORS, META = "state.safetensors", "state.json"


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder`/step-N and remove all but the newest `keep`; returns the new folder."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
    (partial / META).write_text(json.dumps(meta, indent=1))
    for path in (*partial.iterdir(), partial):
        flush(path)
    if final.exists():  # the same step, saved by a run that is being repeated
        remove(final)
    partial.rename(final)
    flush(folder)
    for old in all_steps(folder)[:-keep]:
        remove(old)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is gone at once: first its name, then its files."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote. Raises ConfigError when the folder is not a whole checkpoint."""
    try:
        meta = json.loads((folder / META).read_text())
        if not isinstance(meta, dict) or not {"step", "data", "config"} <= meta.keys():
            raise ValueError(f"{META} lacks a part")
        return load_file(folder / TENSORS), meta
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"resume: {folder} is not a whole checkpoint ({error}); choose another one"
        ) from error


def all_steps(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-" + "[0-9]" * 8) if (path / META).exists())


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))
