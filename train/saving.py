"""Writing checkpoints: aside, synced, listed in a manifest, then renamed into place.

`Saver` does it again and again while training goes on: torch.distributed.checkpoint (DCP) plans who writes
what, and gathers errors. `write` does it once, in one process.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from configs.errors import ConfigError
from data.files import checksum, naming
from model.hf import flush
from model.tensorfile import Spec, TensorFile, nbytes
from train.checkpoint import (
    FORMAT,
    MANIFEST,
    File,
    all_steps,
    plain_errors,
    remove,
    sealed_text,
    step_of,
)

FILE_BYTES = 4 * 10**9
SLAB_BYTES = 2**28


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
    sealed = sealed_text({"format": FORMAT, "step": step, **manifest, "files": listed})
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


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    for old in all_steps(folder)[:-keep_last]:
        if not keep_every or step_of(old) % keep_every:
            remove(old)


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
            with plain_errors():
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
