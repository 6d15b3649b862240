"""Checkpoints: safetensors and JSON in a folder `step-00000300`, which is whole or does not exist.

Its manifest has the size and the checksum of every file, so that later damage is found. Keys name pieces of
parameters: nothing in them depends on the number of ranks. Nothing in the files is pickled. `train.saving`
writes them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import ConfigError
from data.files import checksum, hashed
from model.tensorfile import DTYPES

FORMAT, MANIFEST = 1, "manifest.json"

File = dict[str, Any]  # {"bytes": size, "checksum": of data.files}
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, though it was asked for


class NewerFormat(ConfigError):
    """The checkpoint is good, but only a newer version can read it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ConfigError when it is missing or damaged, NewerFormat."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    except ValueError:
        raise _damaged(path, "is not JSON") from None
    if not isinstance(manifest, dict) or text != sealed_text(manifest):
        raise _damaged(path, "does not match its checksum")
    if manifest["format"] > FORMAT:
        raise NewerFormat(f"{folder} was written by a newer Fourfold (format {manifest['format']}); update")
    return manifest


def verify(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Read every file, or of `world` readers every `world`-th, and compare sizes and checksums.

    Raises ConfigError, naming the first file that is not as it was written.
    """
    files = read_manifest(folder)["files"]
    _check_sizes(folder, files)
    share = sorted(files)[rank::world]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(share, pool.map(lambda name: checksum(folder / name), share)):
            if found != files[name]["checksum"]:
                raise _damaged(folder / name, "does not match its checksum")


def newest_good(
    folder: Path,
    warn: Callable[[str], None],
    check: Callable[[Path], None] = verify,
    before: int | None = None,
) -> Path | None:
    """The newest checkpoint below `folder` that passes `check`; each damaged one before it is a warning.
    Of those saved before step `before`, if that is given.

    Raises NewerFormat: not to go back for want of an update.
    """
    for step in reversed(step_folders(folder)):
        if before is not None and step_of(step) >= before:
            continue
        try:
            check(step)
            return step
        except NewerFormat:
            raise
        except ConfigError as error:
            warn(f"{step.name} is skipped: {error}")
    return None


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by key, read when asked for; as a context manager it closes them."""

    def __init__(self, files: Iterable[Path]):
        self._file_of: dict[str, Any] = {}
        with ExitStack() as stack:
            for path in files:
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise _damaged(path, f"cannot be opened ({error})") from error
                self._file_of.update(dict.fromkeys(file.keys(), file))
            self._opened = stack.pop_all()

    def __getitem__(self, key: str) -> Tensor:
        return self._file_of[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Without reading the tensor."""
        return _DTYPE_OF[self._file_of[key].get_slice(key).get_dtype()]

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def open_tensors(folder: Path) -> Tensors:
    """A checkpoint's tensors. Raises ConfigError for a missing, truncated or unreadable file."""
    files = read_manifest(folder)["files"]
    _check_sizes(folder, files)
    return Tensors(folder / name for name in sorted(files) if name.endswith(".safetensors"))


def load(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill the targets, on any device and views too, from a checkpoint that has been verified.

    Every rank reads its own keys; what else the checkpoint has is ignored. Raises ConfigError for the first
    key that it lacks or that has another dtype or shape.
    """
    with open_tensors(folder) as stored:
        for key, target in targets.items():
            if key not in stored:
                raise ConfigError(f"resume: {folder} lacks {key}; use the model that it came from")
            there, here = _named(stored.dtype(key), stored.shape(key)), _named(target.dtype, target.shape)
            if there != here:
                raise ConfigError(
                    f"resume: {key} is {there} in {folder}, {here} here; use the model that it came from"
                )
    reader = dcp.HuggingFaceStorageReader(str(folder))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with plain_errors():
        dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)


def step_folders(folder: Path) -> list[Path]:
    """What is named as a checkpoint below `folder`, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def all_steps(folder: Path) -> list[Path]:
    """The same as far as it has a manifest: complete checkpoints, though perhaps damaged later."""
    return [path for path in step_folders(folder) if (path / MANIFEST).exists()]


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is gone at once: first its name, then its files."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what a network disk holds back goes before the next save


def sealed_text(manifest: Mapping[str, Any]) -> str:
    """The one text of a manifest, with the checksum of the rest."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps({**rest, "checksum": hashed(json.dumps(rest))}, indent=1)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the error of the first rank that failed instead of DCP's collection, which is no Exception."""
    try:
        yield
    except dcp.CheckpointException as failed:
        raise failed.failures[min(failed.failures)][0] from failed


def _check_sizes(folder: Path, files: Mapping[str, File]) -> None:
    for name, file in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from error
        if size != file["bytes"]:
            raise _damaged(path, f"has {size} bytes instead of {file['bytes']}")


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} {what}; choose another checkpoint")


def _named(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
