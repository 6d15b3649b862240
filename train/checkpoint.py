"""Checkpoints: safetensors and JSON, written aside, synced, listed in a manifest, then renamed into place.

A folder `step-00000300` is whole or does not exist, and its manifest has the size and the checksum of every
file, so that later damage is found. Keys name pieces of parameters: nothing in them depends on the number of
ranks. torch.distributed.checkpoint (DCP) plans who writes what. Nothing in the files is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from configs.errors import ConfigError
from data.files import checksum, hashed, naming
from model.hf import flush
from model.tensorfile import DTYPES, Spec, TensorFile, nbytes

FORMAT, MANIFEST = 1, "manifest.json"
FILE_BYTES = 4 * 10**9
SLAB_BYTES = 2**28

File = dict[str, Any]  # {"bytes": size, "checksum": of data.files}
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, though it was asked for


class NewerFormat(ConfigError):
    """The checkpoint is good, but only a newer version can read it."""


# ---- reading ----


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
    if not isinstance(manifest, dict) or text != _sealed_text(manifest):
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


# ---- writing ----


def write(
    folder: Path,
    step: int,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    manifest: Mapping[str, Any],
    texts: Mapping[str, str] = {},
) -> Path:
    """Write `folder`/step-N in this process with one tensor in memory at a time; returns the new folder.

    `tensors` come in the order of `specs`; `texts` are further files by name. A checkpoint of the same step
    is replaced. Raises ConfigError when the disk has too little room.
    """
    _begin(folder, step, sum(map(nbytes, specs.values())))
    try:
        files = _write_files(_partial(folder, step), 0, specs, tensors)
        return _publish(folder, step, manifest, texts, files)
    except BaseException:
        shutil.rmtree(_partial(folder, step), ignore_errors=True)
        raise


def _partial(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.partial"


def _begin(folder: Path, step: int, need: int) -> None:
    """Make the temporary folder where there is room for `need` bytes; remove what killed runs have left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        sizes = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ConfigError(f"run.dir: a checkpoint in {folder} {sizes}; make room or choose another run.dir")
    _partial(folder, step).mkdir()


def _write_files(
    folder: Path, rank: int, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, File]:
    """Stream the tensors into files of about FILE_BYTES each."""
    stream, files = iter(tensors), {}
    for number, part in enumerate(_parts(specs)):
        path = folder / f"rank-{rank:05d}-{number:03d}.safetensors"
        with naming(path), TensorFile(path, part) as file:
            for key, tensor in islice(stream, len(part)):
                file.write(key, tensor)
        files[path.name] = {"bytes": file.nbytes, "checksum": file.checksum}
    return files


def _parts(specs: Mapping[str, Spec]) -> list[dict[str, Spec]]:
    """The specs in order, a new part wherever the next tensor would exceed FILE_BYTES."""
    parts: list[dict[str, Spec]] = []
    filled = 0
    for key, spec in specs.items():
        if not parts or filled + nbytes(spec) > FILE_BYTES:
            parts.append({})
            filled = 0
        parts[-1][key] = spec
        filled += nbytes(spec)
    return parts


def _publish(
    folder: Path, step: int, manifest: Mapping[str, Any], texts: Mapping[str, str], files: Mapping[str, File]
) -> Path:
    """Complete the temporary folder, whose tensors are on disk already, and give it its name."""
    partial, final = _partial(folder, step), folder / f"step-{step:08d}"
    listed = dict(files)
    for name, text in texts.items():
        _write_text(partial / name, text)
        listed[name] = {"bytes": len(text.encode()), "checksum": checksum(partial / name)}
    sealed = _sealed_text({"format": FORMAT, "step": step, **manifest, "files": listed})
    _write_text(partial / MANIFEST, sealed)
    flush(partial)
    replaced = folder / f".{final.name}.removed"
    if final.exists():  # the same step, saved by a run that is being repeated
        final.rename(replaced)
    partial.rename(final)
    flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _write_text(path: Path, text: str) -> None:
    with naming(path):
        path.write_bytes(text.encode())
        flush(path)


def _sealed_text(manifest: Mapping[str, Any]) -> str:
    """The one text of a manifest, with the checksum of the rest."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps({**rest, "checksum": hashed(json.dumps(rest))}, indent=1)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    for old in all_steps(folder)[:-keep_last]:
        if not keep_every or step_of(old) % keep_every:
            remove(old)


# ---- saving and loading through torch.distributed.checkpoint ----


class Saver:
    """Saves the state of a run again and again while training goes on; every rank of `group` has one.

    Kept are the newest `keep_last` checkpoints (at least 1) and those whose step is a multiple of
    `keep_every` (0: none). `group` is a gloo group for nothing else, by default a new one of all ranks; call
    `wait` before it is destroyed.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0, group: Any = None):
        if dist.is_initialized() and dist.get_world_size() == 1:
            group = None  # collectives in a second thread would slow a CPU's training down by half
        elif group is None and dist.is_initialized():
            group = dist.new_group(backend="gloo")
        self._folder, self._keep, self._group = folder, (keep_last, keep_every), group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._newest: Path | None = None
        self._specs: dict[str, Spec] = {}
        self._copies: dict[str, Tensor] = {}

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        texts: Mapping[str, str] = {},
    ) -> float:
        """Start to save this rank's tensors as `step`; returns the seconds for which it held up the caller.

        The tensors may be overwritten afterwards. A key that several ranks have is written once; manifest and
        texts are those of rank 0. Waits for the save before, and raises its error.
        """
        began = time.perf_counter()
        self.wait()
        self._copy(tensors)
        now = json.loads(json.dumps(manifest)), dict(texts)
        self._pending = self._thread.submit(self._write, step, *now)
        return time.perf_counter() - began

    def wait(self) -> Path | None:
        """Wait until the last save is on disk; returns the newest checkpoint that this object has saved.

        If a rank has failed, every rank raises its error, such as the OSError of a full disk, and there is no
        checkpoint of that step.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._newest = pending.result()
        return self._newest

    @property
    def done(self) -> bool:
        """Whether this rank has no save in flight."""
        return self._pending is None or self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed on this rank already; `wait` raises its error on all."""
        return self.done and self._pending is not None and self._pending.exception() is not None

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """To the host, into the same memory as the time before while keys and shapes stay."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        specs = _specs(tensors)
        if specs != self._specs:
            self._specs, self._copies = {}, {}  # the old memory goes before the new comes
            self._specs, self._copies = specs, _host_tensors(specs, pinned=on_gpu)
        for key, tensor in tensors.items():
            self._copies[key].copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, step: int, manifest: dict[str, Any], texts: dict[str, str]) -> Path:
        """In the background: all ranks write, rank 0 begins and ends it."""
        folder, group = self._folder, self._group

        def publish(files: Mapping[str, File]) -> None:
            _publish(folder, step, manifest, texts, files)
            _prune(folder, *self._keep)

        writer = _Writer(_partial(folder, step), lambda need: _begin(folder, step, need), publish)
        state, alone = {"tensors": self._copies}, group is None
        try:
            with _plain_errors():
                dcp.save(state, storage_writer=writer, planner=_Planner(), process_group=group, no_dist=alone)
        except BaseException:
            if alone or dist.get_rank(group) == 0:
                shutil.rmtree(_partial(folder, step), ignore_errors=True)
            raise
        return folder / f"step-{step:08d}"


def _host_tensors(specs: Mapping[str, Spec], pinned: bool) -> dict[str, Tensor]:
    """Uninitialised tensors, cut from slabs because pinned memory comes in powers of two."""
    tensors: dict[str, Tensor] = {}
    slab, used = torch.empty(0, dtype=torch.uint8), 0
    for key, (dtype, shape) in specs.items():
        size = nbytes((dtype, shape))
        if used + size > len(slab):
            slab, used = torch.empty(max(SLAB_BYTES, size), dtype=torch.uint8, pin_memory=pinned), 0
        tensors[key] = slab[used : used + size].view(dtype).view(shape)
        used += -(-size // 64) * 64  # aligned for every dtype
    return tensors


class _Planner(dcp.DefaultSavePlanner):
    """Has every key written by the first rank that has it. A plan is {key: bytes}.

    DCP's own plans describe each tensor at length: to pickle 30,000 of them holds the GIL for a second.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        return SavePlan([], planner_data={key: x.nbytes for key, x in self.state_dict["tensors"].items()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: set[str] = set()
        plans = []
        for plan in all_plans:
            mine = {key: size for key, size in plan.planner_data.items() if key not in seen}
            plans.append(SavePlan([], planner_data=mine))
            seen |= mine.keys()
        return plans, Metadata({})


class _Writer(dcp.HuggingFaceStorageWriter):
    """Streams each rank's tensors into safetensors files; rank 0 begins with a folder and publishes it.

    DCP's own writer makes one bytes object of a file under the GIL: training would stand still meanwhile. DCP
    gathers errors after each of these methods, so that all ranks raise and nothing incomplete is published.
    """

    def __init__(
        self, partial: Path, begin: Callable[[int], None], publish: Callable[[Mapping[str, File]], None]
    ):
        super().__init__(str(partial), save_distributed=True)
        self._partial, self._begin, self._publish = partial, begin, publish

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the folder to rank 0; the base class makes it on every machine."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before anyone writes."""
        self._begin(sum(sum(plan.planner_data.values()) for plan in plans))
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """On every rank; one result per file."""
        if not self._partial.is_dir():
            raise ConfigError(f"run.dir: not all ranks see {self._partial.parent}; choose a shared disk")
        every = cast(_Planner, planner).state_dict["tensors"]
        tensors = {key: every[key] for key in plan.planner_data}
        files = _write_files(self._partial, plan.storage_data, _specs(tensors), tensors.items())
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(MetadataIndex(name), f["bytes"], f) for name, f in files.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after everyone has written."""
        self._publish({result.index.fqn: result.storage_data for rank in results for result in rank})


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


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
    with _plain_errors():
        dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)


def _named(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error of the first rank that failed instead of DCP's collection, which is no Exception."""
    try:
        yield
    except dcp.CheckpointException as failed:
        raise failed.failures[min(failed.failures)][0] from failed
