"""Checkpoints: whole or absent, the same bits on any number of ranks, one clear line for what is broken."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from configs.errors import ConfigError
from model.tensorfile import Spec, TensorFile
from train import checkpoint, saving
from train.saving import Saver

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {"tokenizer.json": '{"model": "ü"}'}
MANIFEST = {"config": "seed: 1\n", "data": {"index": 3, "rate": 1e-05}, "world": 1}


def state(seed: int, moments: bool = True) -> dict[str, Tensor]:
    """Every kind of tensor that a run has: views into one buffer, 0-d, other dtypes, odd values."""
    torch.manual_seed(seed)
    flat = torch.randn(60)
    flat[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    tensors = {
        "weight.empty": torch.empty(0, 3),
        "weight.a": flat[:24].view(4, 6),
        "weight.b.transposed": flat[24:54].view(5, 6).T,
        "weight.narrow": torch.randn(3, 5).bfloat16(),
        "buffer.tid2eid": torch.randint(-(2**62), 2**62, (7, 3)),
        "rng.cpu.0": torch.randint(0, 256, (13,), dtype=torch.uint8),
    }
    if moments:
        tensors |= {"exp_avg.a": torch.randn(4, 6), "step.a": torch.tensor(float(seed))}
    return tensors


def specs(tensors: dict[str, Tensor]) -> dict[str, Spec]:
    return {key: (x.dtype, tuple(x.shape)) for key, x in tensors.items()}


def write(folder: Path, step: int) -> Path:
    tensors = state(step)
    return saving.write(folder, step, specs(tensors), iter(tensors.items()), MANIFEST, TEXTS)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def on_disk(folder: Path) -> dict[str, Tensor]:
    """The tensors as safetensors' own reader sees them."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def assert_holds(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Through safetensors itself, `open_tensors` and `load`."""
    found, targets = on_disk(folder), {key: torch.zeros_like(x) for key, x in tensors.items()}
    checkpoint.verify(folder)
    checkpoint.load(folder, targets)
    with checkpoint.open_tensors(folder) as lazy:
        assert set(lazy) == set(found) == set(tensors) and len(lazy) == len(tensors)
        for key, x in tensors.items():
            assert same(found[key], x) and same(lazy[key], x) and same(targets[key], x), key
            assert (lazy.dtype(key), lazy.shape(key)) == (x.dtype, tuple(x.shape))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one process ----


@pytest.mark.parametrize("file_bytes", [1, 200, 10**9])
def test_written_bits_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    monkeypatch.setattr(saving, "FILE_BYTES", file_bytes)
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "step-00000007" and checkpoint.step_of(folder) == 7
    assert_holds(folder, state(7))
    files = list(folder.glob("*.safetensors"))
    assert len(files) == {1: 8, 200: 4, 10**9: 1}[file_bytes]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}  # nothing pickled


def test_the_manifest_tells_all(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    manifest = checkpoint.read_manifest(folder)
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("checksum")
    listed = {}
    for path in folder.iterdir():
        if path.name != "manifest.json":
            data = path.read_bytes()
            listed[path.name] = {
                "bytes": len(data),
                "checksum": blake2b(data, digest_size=16).hexdigest(),
            }
    assert manifest == {"format": 1, "step": 7, **MANIFEST, "files": listed}
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == TEXTS["tokenizer.json"]


def test_saved_bits_come_back_and_memory_follows_the_shapes(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=5)
    for step, moments in ((0, False), (1, True), (2, True), (3, False)):
        assert saver.save(step, state(step, moments), MANIFEST, TEXTS) >= 0
        folder = saver.wait()
        assert folder == tmp_path / f"step-{step:08d}"
        assert_holds(folder, state(step, moments))
        assert checkpoint.read_manifest(folder)["step"] == step
        assert (folder / "tokenizer.json").read_text(encoding="utf-8") == TEXTS["tokenizer.json"]
    assert saver.wait() == folder


def test_host_memory_is_kept_in_slabs_and_does_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SLAB_BYTES", 256)
    tensors = state(1) | {"big": torch.randn(100)}
    copies = saving._host_tensors(specs(tensors), pinned=False)
    for key, x in tensors.items():
        copies[key].copy_(x)
    assert all(same(copies[key], x) for key, x in tensors.items())
    assert len({x.untyped_storage().data_ptr() for x in copies.values() if x.numel()}) == 4


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are not written before the event is set."""
    go, write_files = threading.Event(), saving._write_files

    def later(*arguments: Any) -> dict[str, checkpoint.File]:
        assert go.wait(60)
        return write_files(*arguments)

    monkeypatch.setattr(saving, "_write_files", later)
    try:
        yield go
    finally:
        go.set()


def test_training_goes_on_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, live, manifest = Saver(tmp_path, keep_last=5), state(1), {"data": {"index": 1}}
    texts = dict(TEXTS)
    with held_back(monkeypatch) as go:
        saver.save(1, live, manifest, texts)
        for x in live.values():
            x.zero_()
        manifest["data"]["index"] = 2
        texts.clear()
        assert not checkpoint.all_steps(tmp_path)
        threading.Timer(0.3, go.set).start()
        stall = saver.save(2, live, manifest)  # the one before is finished first
        assert stall > 0.2 and names(tmp_path)[-1] == "step-00000001"
    assert_holds(tmp_path / "step-00000001", state(1))
    assert checkpoint.read_manifest(tmp_path / "step-00000001")["data"] == {"index": 1}
    assert (tmp_path / "step-00000001" / "tokenizer.json").exists()
    newest = saver.wait()
    assert newest is not None and not on_disk(newest)["weight.a"].any()


@pytest.mark.gpu
def test_tensors_of_a_gpu_may_change_at_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2)
    live = {key: x.cuda() if x.dim() else x for key, x in state(1).items()}
    big = live["weight.big"] = torch.randn(2**28, device="cuda")
    for step in (1, 2):  # into new pinned memory, and into the same again
        wanted = {key: x.to("cpu", copy=True) for key, x in live.items()}
        stall = saver.save(step, live, {})
        assert all(x.is_pinned() for x in saver._copies.values() if x.numel())
        for x in live.values():
            x.zero_()
        newest = saver.wait()
        assert newest is not None and all(same(x, wanted[key]) for key, x in on_disk(newest).items())
        big.normal_()
    assert stall < 1  # 1 GiB
    targets = {key: x.to("cuda", copy=True).zero_() for key, x in wanted.items()}
    checkpoint.load(tmp_path / "step-00000002", targets)
    assert all(same(x.cpu(), wanted[key]) for key, x in targets.items())


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(2, 0, [25, 30]), (1, 10, [10, 20, 30]), (2, 10, [10, 20, 25, 30]), (9, 0, [5, 10, 15, 20, 25, 30])],
)
def test_the_newest_and_every_nth_are_kept(tmp_path: Path, last: int, every: int, kept: list[int]) -> None:
    saver = Saver(tmp_path, last, every)
    for step in range(5, 31, 5):
        saver.save(step, state(step), {})
    saver.wait()
    assert [checkpoint.step_of(path) for path in checkpoint.all_steps(tmp_path)] == kept
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    for seed in (1, 2):
        saver.save(5, state(seed), {})
        newest = saver.wait()
        assert newest is not None
        assert_holds(newest, state(seed))
    assert_holds(write(tmp_path, 5), state(5))
    assert names(tmp_path) == ["step-00000005"]


# ---- a full disk and other failures ----


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails in the operating system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_the_disk_is_raised_by_wait_and_nothing_is_lost(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    saver.save(1, state(1), {})
    first = saver.wait()
    with largest_file(50_000):
        assert not saver.failed
        saver.save(2, {"weight.a": torch.zeros(50_000)}, {})
        until = time.monotonic() + 20
        while not saver.failed:
            assert time.monotonic() < until
        with pytest.raises(OSError) as error:
            saver.wait()
        assert not saver.failed
    assert error.value.errno == errno.EFBIG and str(error.value.filename).endswith(".safetensors")
    assert names(tmp_path) == ["step-00000001"]  # neither half a checkpoint nor any pruning
    assert saver.wait() == first  # told once
    saver.save(3, state(3), {})
    saver.wait()
    assert names(tmp_path) == ["step-00000003"]


def test_the_next_save_raises_the_error_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, keep_last=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(TensorFile, "write", full)
        saver.save(1, state(1), {})
        with pytest.raises(OSError) as error:
            saver.save(2, state(2), {})
        assert error.value.errno == errno.ENOSPC and str(error.value.filename).endswith(".safetensors")
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 3)
    assert names(tmp_path) == []
    saver.save(4, state(4), {})
    assert saver.wait() == tmp_path / "step-00000004"


def test_a_failure_at_the_very_end_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    saver = Saver(tmp_path, keep_last=1)

    def full(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(saving, "flush", full)
    saver.save(1, state(2), {})
    with pytest.raises(OSError, match=r"Input/output.*manifest\.json"):
        saver.wait()
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(tmp_path / "step-00000001", state(1))


def test_too_little_room_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(x.nbytes for x in state(1).values())
    saver = Saver(tmp_path, keep_last=1)
    for free in (need, need - 1):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        saver.save(free, state(1), {})
        if free == need:
            saver.wait()
    with pytest.raises(ConfigError, match=r"^run\.dir: .* GB are free; ") as error:
        saver.wait()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == [f"step-{need:08d}"]


def test_ranks_without_a_common_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_begin", lambda *_: None)  # rank 0 did it, but on another machine
    saver = Saver(tmp_path, keep_last=1)
    saver.save(1, state(1), {})
    with pytest.raises(ConfigError, match="shared disk"):
        saver.wait()


# ---- damage ----


def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of several files, above an older one."""
    monkeypatch.setattr(saving, "FILE_BYTES", 200)
    write(tmp_path, 5)
    return write(tmp_path, 10)


def assert_refused(folder: Path, file: str, words: str) -> None:
    with pytest.raises(ConfigError, match=None if file == "manifest.json" else words) as error:
        checkpoint.verify(folder)
    assert str(folder / file) in str(error.value) and "\n" not in str(error.value)
    warnings: list[str] = []
    older = checkpoint.newest_good(folder.parent, warnings.append)
    assert older == folder.parent / "step-00000005"
    assert len(warnings) == 1 and file in warnings[0] and folder.name in warnings[0]


def lost(data: bytes) -> Iterator[bytes | None]:
    yield None


def cut(data: bytes) -> Iterator[bytes | None]:
    for size in (0, 1, 8, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + b" "


def flipped(data: bytes) -> Iterator[bytes | None]:
    """One bit in each of several places, the ends among them."""
    draw = random.Random(0)
    for place in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(40))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lost, "is missing"), (cut, "bytes instead of"), (flipped, "not match its checksum")],
)
def test_any_damage_to_any_file_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], Iterator[bytes | None]],
    words: str,
) -> None:
    folder = whole(tmp_path, monkeypatch)
    assert len(names(folder)) == 6
    for file in names(folder):
        data = (folder / file).read_bytes()
        for damaged in damage(data):
            if damaged is None:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(damaged)
            assert_refused(folder, file, words)
        (folder / file).write_bytes(data)
    checkpoint.verify(folder)


def test_every_character_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    data = (folder / "manifest.json").read_bytes()
    assert b"1e-05" in data  # 1E-05 reads the same
    for place in range(len(data)):
        for bit in (1, 32):  # 32: upper and lower case
            damaged = bytearray(data)
            damaged[place] ^= bit
            (folder / "manifest.json").write_bytes(damaged)
            with pytest.raises(ConfigError, match=r"manifest\.json"):
                checkpoint.read_manifest(folder)


def test_several_readers_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole(tmp_path, monkeypatch)
    for file in set(names(folder)) - {"manifest.json"}:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        finders = 0
        for rank in range(3):
            try:
                checkpoint.verify(folder, rank, 3)
            except ConfigError:
                finders += 1
        assert finders == 1
        (folder / file).write_bytes(data)


def test_a_newer_format_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    with monkeypatch.context() as newer:
        for module in (checkpoint, saving):
            newer.setattr(module, "FORMAT", 2)
        folder = write(tmp_path, 10)
        checkpoint.verify(folder)
    for refuse in (
        lambda: checkpoint.read_manifest(folder),
        lambda: checkpoint.newest_good(tmp_path, pytest.fail),  # never goes back behind it
    ):
        with pytest.raises(ConfigError, match=r"newer Fourfold \(format 2\); update"):
            refuse()


def test_what_killed_runs_left_does_not_count_and_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 5)
    for name in (".step-00000010.partial", ".step-00000002.removed", ".step-00000015.partial"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    (tmp_path / "step-00000002").mkdir()  # its manifest is gone
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == ["step-00000005"]
    assert checkpoint.newest_good(tmp_path, pytest.fail) == tmp_path / "step-00000005"
    saver = Saver(tmp_path, keep_last=2)
    saver.save(10, state(10), {})
    saver.wait()
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000010"]
    checkpoint.remove(tmp_path / "step-00000005")
    assert names(tmp_path) == ["step-00000002", "step-00000010"]


def test_loading_says_what_does_not_fit(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    for key, target, words in (
        ("weight.other", torch.zeros(2), f"{folder} lacks weight.other"),
        ("weight.a", torch.zeros(6, 4), r"weight.a is float32 \[4, 6\] in .*, float32 \[6, 4\] here"),
        ("weight.a", torch.zeros(4, 6, dtype=torch.bfloat16), r"bfloat16 \[4, 6\] here"),
    ):
        before = torch.zeros(())
        with pytest.raises(ConfigError, match=words) as error:
            checkpoint.load(folder, {"step.a": before, key: target})
        assert "\n" not in str(error.value) and before == 0
    with checkpoint.open_tensors(folder) as tensors, pytest.raises(KeyError):
        tensors["weight.other"]


def test_views_are_filled_in_place(tmp_path: Path) -> None:
    folder, wanted = write(tmp_path, 5), state(5)
    flat = torch.zeros(100)
    views = {"exp_avg.a": flat[10:34].view(4, 6), "weight.b.transposed": flat[40:70].view(6, 5)}
    checkpoint.load(folder, views)
    assert same(flat[10:34].view(4, 6), wanted["exp_avg.a"])
    assert same(flat[40:70].view(6, 5), wanted["weight.b.transposed"])
    assert not flat[:10].any() and not flat[34:40].any() and not flat[70:].any()


# ---- kill -9 ----

SAVE_UNTIL_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from train import checkpoint
from train.saving import Saver
folder, draw, newest = Path(sys.argv[1]), random.Random(0), 0
for _ in range(25):
    child = os.fork()
    if child == 0:
        saver = Saver(folder, keep_last=2, keep_every=1000)
        for step in range(newest + 1, 10**6):
            value = torch.full((3000,), step, dtype=torch.int64)
            saver.save(step, {f"weight.{i}": value + i for i in range(5)}, {}, {"tokenizer.json": str(step)})
    time.sleep(draw.uniform(0.0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    good = checkpoint.newest_good(folder, sys.exit)
    if good is None:
        assert newest == 0
        continue
    step = checkpoint.step_of(good)
    assert step >= newest
    targets = {f"weight.{i}": torch.zeros(3000, dtype=torch.int64) for i in range(5)}
    checkpoint.load(good, targets)
    assert all((x == step + i).all() for i, x in enumerate(targets.values()))
    newest = step
print(newest)
"""


def test_kill_minus_nine_never_costs_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SAVE_UNTIL_KILLED, str(tmp_path / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    newest = int(done.stdout)
    assert newest > 5
    saver = Saver(tmp_path / "checkpoints", keep_last=2)
    saver.save(newest + 1, state(1), {})
    saver.wait()
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in (newest, newest + 1)]


# ---- several processes ----

KEYS = 11


def all_keys() -> dict[str, Tensor]:
    """The state of a run over all ranks."""
    return {f"weight.{i}": torch.arange(6.0).view(2, 3) + 10 * i for i in range(KEYS)}


def share(rank: int, world: int) -> dict[str, Tensor]:
    """What a rank has of it, and what every rank has."""
    keys = all_keys()
    buffer = {"buffer.bias": torch.arange(4.0)}
    return {f"weight.{i}": keys[f"weight.{i}"] for i in range(rank, KEYS, world)} | buffer


def in_a_rank(rank: int, folder: Path) -> None:
    """Four ranks save, two of them save, one fails, and all load what others have saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    four = Saver(folder / "four", keep_last=2)
    four.save(1, share(rank, 4), {"world": rank}, {"tokenizer.json": str(rank)})
    assert four.wait() == folder / "four" / "step-00000001"

    pair = dist.new_group([0, 1], backend="gloo")
    if rank < 2:
        two = Saver(folder / "two", 2, group=pair)
        two.save(1, share(rank, 2), {"world": 2})
        two.wait()
    dist.barrier()

    assert_raised_by_all(four, rank, folder)
    for source, world in (("two", 4), ("four", 2), ("four", 3)):
        wanted = share(rank % world, world)
        targets = {key: torch.zeros_like(x) for key, x in wanted.items()}
        checkpoint.load(folder / source / "step-00000001", targets)
        assert all(same(targets[key], x) for key, x in wanted.items())
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def assert_raised_by_all(saver: Saver, rank: int, folder: Path) -> None:
    """Rank 2 cannot write its tensors, rank 0 not the manifest; step 3 is saved as if nothing had been."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken, owner, name, file in (
        (2, TensorFile, "write", "rank-00002"),
        (0, saving, "flush", "manifest.json"),
    ):
        with patch.object(owner, name, full) if rank == broken else nullcontext():
            saver.save(2, share(rank, 4), {})
            with pytest.raises(OSError) as error:
                saver.wait()
        assert error.value.errno == errno.ENOSPC and file in str(error.value.filename)
        dist.barrier()
        assert names(folder / "four") == ["step-00000001"]
        dist.barrier()
    saver.save(3, share(rank, 4), {})
    assert saver.wait() == folder / "four" / "step-00000003"


def test_ranks_save_together_and_any_number_loads(tmp_path: Path) -> None:
    spawn(in_a_rank, (tmp_path,), nprocs=4)
    assert len(list(tmp_path.glob("done-*"))) == 4
    everything = all_keys() | {"buffer.bias": torch.arange(4.0)}
    for folder, ranks in (("four", 4), ("two", 2)):
        assert_holds(tmp_path / folder / "step-00000001", everything)
        assert len(list((tmp_path / folder / "step-00000001").glob("*.safetensors"))) == ranks
    first = tmp_path / "four" / "step-00000001"
    assert checkpoint.read_manifest(first)["world"] == 0 and (first / "tokenizer.json").read_text() == "0"
