"""Making shards: once, in order, whatever fails meanwhile, and never others than the sources say."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from configs.errors import ConfigError
from data import build as module
from data import remote, shards
from data.build import Beside, Maker, Supply, Tasks, make_all, noted, worker_count
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.shards import Damaged, read_manifest, shard_path
from data.sources import Unit, find_units
from data.tokenizer import Tokenizer, train_bpe
from tests.http_server import serve
from tests.unit.data.written import write_file

ROOT = Path(__file__).parents[3]
WORDS = ["abc abd acb bca cab bac abcd dcba abab acdc "] * 9
UNITS = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    path.write_text(train_bpe(iter(WORDS), 280))
    return Tokenizer(path)


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(UNITS):
        write_file(tmp_path / "in" / f"{i}.jsonl", [f"{i} {j} " + "abc " * (j % 9) for j in range(20)])
    return tmp_path / "in"


def tasks_of(place: object, tokenizer: Tokenizer, folder: Path) -> Tasks:
    """In a folder of its own."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    config = DataConfig(cache_dir=str(folder), patience_minutes=0.1)
    units = find_units("x", SourceConfig(files=[str(place)], text_column="body"), config, print).units
    return {shard_path(unit, tokenizer, folder): unit for unit in units}


@pytest.fixture
def tasks(source, tokenizer, tmp_path) -> Tasks:
    return tasks_of(source, tokenizer, tmp_path / "cache")


@pytest.fixture
def built(monkeypatch) -> list[Path]:
    """The shards that are built in this process, in order."""
    paths: list[Path] = []
    original = shards.build

    def build(unit, tokenizer, path, **options):
        paths.append(path)
        original(unit, tokenizer, path, **options)

    monkeypatch.setattr(module, "build", build)
    return paths


def maker(tokenizer: Tokenizer, said: list[str] | None = None) -> Maker:
    return Maker(tokenizer, 0.1, print if said is None else said.append)


def supply(tasks: Tasks, tokenizer: Tokenizer, said: list[str], *, builder: bool = True) -> Supply:
    folder = next(iter(tasks)).parent.parent
    config = DataConfig(cache_dir=str(folder), workers=1, patience_minutes=0.1)
    return Supply(tasks, tokenizer, config, folder, builder=builder, say=said.append)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "shards").iterdir() if p.is_file()}


def flip(path: Path, at: float = 0.5) -> None:
    """Damage a byte, in a new file: the old one may be mapped."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.with_name("draft").write_bytes(data)
    os.replace(path.with_name("draft"), path)


def flip_tokens(path: Path) -> int:
    """Damage a token of a document that is found only when it is read; which one."""
    shard, data = shards.Shard(path), bytearray(path.read_bytes())
    row = len(shard) // 2
    data[data.index(shard._values[0].tobytes()) + 4 * int(shard._offsets[0][row])] ^= 1
    path.with_name("draft").write_bytes(data)
    os.replace(path.with_name("draft"), path)
    return row


# --- Once, and in order -----------------------------------------------------------------------------------


def test_what_is_missing_is_made_in_order_and_once(tasks, tokenizer, built):
    make_all(tasks, maker(tokenizer), 1)
    assert built == list(tasks)
    assert all(read_manifest(path, whole=True) for path in tasks)
    make_all(tasks, maker(tokenizer), 1)
    make_all(tasks, maker(tokenizer), 1, whole=True)
    assert len(built) == UNITS


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: flip(path.with_suffix(".json"), 0.7),
    ],
    ids=["bit", "torn", "gone", "no manifest", "torn manifest", "manifest bit"],
)
def test_a_damaged_shard_is_made_anew_alone(damage: Callable, tasks, tokenizer, built, tmp_path):
    make_all(tasks, maker(tokenizer), 1)
    before = contents(tmp_path / "cache")
    path = list(tasks)[2]
    damage(path)
    damaged = read_manifest(path)
    said: list[str] = []
    make_all(tasks, maker(tokenizer, said), 1, whole=True)
    assert built[UNITS:] == [path]
    assert contents(tmp_path / "cache") == before
    there = [f"{path} is damaged; it is made anew from {tasks[path].files[0]}"]
    assert said == (there if damaged else [])


def test_drafts_of_builds_that_were_killed_are_removed(tasks, tokenizer, tmp_path):
    first, second = list(tasks)[:2]
    first.with_name(f".{first.name}.77.tmp").write_text("x")
    first.with_name(f".{first.with_suffix('.json').name}.78.tmp").write_text("x")
    other = second.with_name(f".{second.name}.79.tmp")  # perhaps of a build that goes on
    other.write_text("x")
    maker(tokenizer).make(first, tasks[first])
    assert list(first.parent.glob(".*")) == [other]


def test_what_another_process_makes_is_left_to_it_until_all_else_is_done(tasks, tokenizer, built):
    first, *others = tasks
    lock = FileLock(first.parent / "locks" / first.stem)
    lock.lock_file and Path(lock.lock_file).parent.mkdir()
    with lock:
        assert maker(tokenizer).make(first, tasks[first], block=False) is False
        thread = threading.Thread(target=make_all, args=(tasks, maker(tokenizer), 1), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not all(map(read_manifest, others)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        thread.join(0.1)
        assert thread.is_alive() and built == others  # it waits
    thread.join(20)
    assert built == [*others, first]


@pytest.mark.parametrize(
    ("sizes", "wanted", "count"),
    [([1, 1, 1], None, 1), ([1, 1, 1], 2, 2), ([1, 1], 8, 2), ([10**9] * 64, None, 3), ([10**9], None, 1)],
)
def test_number_of_workers(sizes, wanted, count, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 3)
    units = [Unit(("a",), "json", "text", size, None, None, (), "") for size in sizes]
    assert worker_count(units, wanted) == count


# --- Processes --------------------------------------------------------------------------------------------

BUILD = """
import sys, time
from pathlib import Path
from data import build, shards
from data.build import Beside, Maker, make_all
from data.tokenizer import Tokenizer

def slow(unit, tokenizer, path, original=shards.build, **options):
    with open(sys.argv[1], "a") as log:
        log.write(f"{path}\\n")
    time.sleep(0.1)
    original(unit, tokenizer, path, **options)

if __name__ == "__main__":
    build.build = slow
    order = Beside.from_json(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    make_all(order.tasks, Maker(Tokenizer(order.tokenizer), 0.1, print), 1)
"""


def test_two_processes_at_once_make_each_shard_once(tasks, tokenizer, tmp_path, monkeypatch):
    log = tmp_path / "log"
    (tmp_path / "program.py").write_text(BUILD)
    command = [sys.executable, str(tmp_path / "program.py"), str(log)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin and process.stdout
    process.stdin.write(
        Beside(DataConfig(), tasks, tokenizer.path, False, tmp_path / "note").to_json() + "\n"
    )
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    here: list[str] = []
    original = shards.build

    def slow(unit, tokenizer, path, **options):
        here.append(str(path))
        time.sleep(0.1)
        original(unit, tokenizer, path, **options)

    monkeypatch.setattr(module, "build", slow)
    process.stdin.write("\n")
    process.stdin.flush()
    make_all(tasks, maker(tokenizer), 1)
    assert process.wait(20) == 0
    there = log.read_text().splitlines()
    assert sorted(here + there) == sorted(map(str, tasks))
    assert here and there
    assert all(read_manifest(path, whole=True) for path in tasks)


def children() -> set[int]:
    """Living processes that this one has started."""
    command = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
        rows = [line.split() for line in ps.stdout or ()]
    mine = {int(pid) for pid, parent, stat in rows if parent == str(os.getpid()) and "Z" not in stat}
    return mine - {ps.pid}


@pytest.fixture
def tidy() -> Iterator[None]:
    """No process is left behind."""
    before = children()
    yield
    deadline = time.monotonic() + 5
    while extra := [pid for pid in children() - before if b"resource_tracker" not in command_of(pid)]:
        assert time.monotonic() < deadline, f"{extra} are still there"
        time.sleep(0.05)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone
        return b""


@pytest.fixture
def stuck(source, tokenizer, tmp_path) -> Iterator[Tasks]:
    """One shard of a file that a server withholds, and the others."""
    with serve(source) as server:
        tasks = tasks_of(server.url("0.jsonl"), tokenizer, tmp_path / "cache")
        server.fail("0.jsonl", "status", code=503)
        server.fail("0.jsonl", "hang", times=99)
        yield tasks | tasks_of(source, tokenizer, tmp_path / "cache")


def test_an_error_in_a_pool_ends_it_at_once(stuck, source, tokenizer, tmp_path, tidy):
    """What workers say is passed on; those that wait for a server are not waited for."""
    (source / "5.jsonl").write_text("{broken")
    bad = tasks_of(source / "5.jsonl", tokenizer, tmp_path / "cache")
    first = next(iter(stuck))
    said: list[str] = []
    sizes: list[int] = []
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"5.jsonl cannot be read as json") as caught:
        make_all(dict(list(stuck.items())[:3]) | bad, Maker(tokenizer, 5, said.append, sizes.append), 2)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
    assert not read_manifest(first)
    assert len(said) == 1 and "0.jsonl: HTTP 503" in said[0]
    done = [manifest for path in stuck if (manifest := read_manifest(path))]
    assert sum(sizes) == sum(manifest.bytes for manifest in done) > 0


def test_a_worker_that_is_killed_is_one_line(source, tokenizer, tmp_path, tidy):
    """The one that was started last, before any has done anything: the pool itself does not notice that."""
    with serve(source) as server:
        tasks = tasks_of(server.url("{0..1}.jsonl"), tokenizer, tmp_path / "cache")
        for name in ("0.jsonl", "1.jsonl"):
            server.fail(name, "hang", times=99)
        before, asked = children(), len(server.requests)

        def kill_the_last() -> None:
            while len({request.name for request in server.requests[asked:]}) < 2:
                time.sleep(0.05)
            os.kill(
                max(pid for pid in children() - before if b"spawn_main" in command_of(pid)), signal.SIGKILL
            )

        threading.Thread(target=kill_the_last, daemon=True).start()
        with pytest.raises(
            ConfigError, match=r"^data.workers: a process that tokenizes was killed, .* than 2 and"
        ):
            make_all(tasks, maker(tokenizer), 2)


# --- A full disk ------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_what_is_done_stays(tasks, tokenizer, built, tmp_path, monkeypatch):
    """The third shard is written to a device that is always full."""

    def open_full(path, mode, *rest):
        full = str(path).endswith(f".{os.getpid()}.tmp") and list(tasks)[2].stem in str(path)
        return open("/dev/full" if full else path, mode, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("data.files.open", open_full, raising=False)
        with pytest.raises(
            ConfigError, match=r"/shards is full \(No space left on device\): free "
        ) as caught:
            supply(tasks, tokenizer, []).make_all(progress=False)
    assert "\n" not in str(caught.value)
    done = [path for path in tasks if read_manifest(path, whole=True)]
    assert done == list(tasks)[:2]
    assert (tmp_path / "cache" / f"failed-{module.hashed(*tasks)}").read_text() == str(caught.value)
    make_all(tasks, maker(tokenizer), 1)
    assert built[3:] == list(tasks)[2:]


def test_a_limit_on_the_size_of_files_is_one_line(tasks, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"/shards is full \(File too large\): free ") as caught:
            make_all(tasks, maker(tokenizer), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list(next(iter(tasks)).parent.glob(".*.tmp"))


# --- What training is given -------------------------------------------------------------------------------


def test_damage_is_mended_when_it_is_met(tasks, tokenizer, built, tmp_path):
    said: list[str] = []
    shelf = supply(tasks, tokenizer, said)
    shelf.make_all(progress=False)
    before = contents(tmp_path / "cache")
    wanted = {
        path: [shelf.shard(unit).tokens(row).tolist() for row in range(20)] for path, unit in tasks.items()
    }
    first, second, third, fourth, *_ = tasks
    flip(first, 0.99)  # its index
    row = flip_tokens(second)
    os.truncate(third, 100)
    flip(fourth.with_suffix(".json"))
    shelf = supply(tasks, tokenizer, said)
    assert said == []
    assert shelf.ready() == UNITS - 1
    shelf.make_all(progress=False)
    for path, unit in tasks.items():
        shard = shelf.shard(unit)
        assert [shard.tokens(row).tolist() for row in range(20)] == wanted[path]
    assert contents(tmp_path / "cache") == before
    assert built[UNITS:] == [fourth, first, second, third]
    assert said == [
        f"{p} is damaged; it is made anew from {tasks[p].files[0]}" for p in (first, second, third)
    ]
    assert 0 < row < 20


def test_damage_without_the_source_is_refused_by_name(tasks, tokenizer, source):
    make_all(tasks, maker(tokenizer), 1)
    first, second, third, *_ = tasks
    flip_tokens(first)
    flip(second, 0.99)
    third.unlink()
    shutil.rmtree(source)
    shelf = supply(tasks, tokenizer, [])
    shard = shelf.shard(tasks[first])
    for read in (lambda: [shard.tokens(row) for row in range(20)], lambda: shelf.shard(tasks[second])):
        with pytest.raises(
            Damaged, match=r"\.arrow is damaged and cannot be made anew: \S*jsonl cannot be read"
        ):
            read()
    with pytest.raises(ConfigError, match=r"jsonl cannot be read as json: "):
        shelf.make_all(progress=False)
    assert len(shelf.shard(tasks[list(tasks)[4]])) == 20  # the others are still good


def test_damage_of_a_source_that_has_changed_is_refused(tasks, tokenizer, source):
    make_all(tasks, maker(tokenizer), 1)
    first = next(iter(tasks))
    flip_tokens(first)
    write_file(Path(tasks[first].files[0]), ["others", "now"])
    with pytest.raises(ConfigError, match=r"gives other tokens now; remove it"):
        [supply(tasks, tokenizer, []).shard(tasks[first]).tokens(row) for row in range(20)]


def test_a_shard_is_opened_once(tasks, tokenizer):
    make_all(tasks, maker(tokenizer), 1)
    shelf = supply(tasks, tokenizer, [])
    unit = tasks[list(tasks)[1]]
    one = shelf.shard(unit)
    assert shelf.shard(unit) is one


def test_others_wait_for_the_builder_and_are_told_of_its_failure(tasks, tokenizer, built, monkeypatch):
    monkeypatch.setattr(module, "PATIENT_SILENCE", 0.2)
    said: list[str] = []
    waiting = supply(tasks, tokenizer, said, builder=False)
    failures: list[str] = []

    def wait() -> None:
        try:
            waiting.make_all(progress=False)
        except ConfigError as error:
            failures.append(str(error))

    first = dict(list(tasks.items())[:1])
    make_all(first, maker(tokenizer), 1)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive() and not failures
    assert any("waiting for shard 2 of 6 to be tokenized" in line for line in said)
    with pytest.raises(ConfigError), noted(waiting._note):
        raise ConfigError("a.jsonl: is broken")
    thread.join(5)
    assert failures == ["a.jsonl: is broken"]
    assert len(built) == 1

    supply(tasks, tokenizer, said)  # a builder that begins removes the note of an earlier try
    assert not waiting._note.exists()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    make_all(tasks, maker(tokenizer), 1)
    thread.join(5)
    assert not thread.is_alive() and len(failures) == 1 and len(built) == UNITS


def test_what_a_builder_beside_is_told_arrives(tasks, tmp_path):
    unit = Unit(("http://h/a", "b"), "parquet", "body", 5, 7, (3, 9), ((5, "v"), (6, "")), "f")
    sources = {"web": SourceConfig(dataset="o/n", max_tokens=9), "own": SourceConfig(of="web")}
    config = DataConfig(sources=sources, workers=3, tokenizer=TokenizerConfig("file", "t.json", 9))
    order = Beside(config, tasks | {tmp_path / "x.arrow": unit}, tmp_path / "t.json", True, tmp_path / "note")
    text = order.to_json()
    assert Beside.from_json(text) == order
    assert "\n" not in text and json.loads(text)


def test_waiting_for_a_server_is_said_once_a_try(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with serve(source) as server:
        tasks = tasks_of(server.url("{0..1}.jsonl"), tokenizer, tmp_path / "cache")
        server.fail("1.jsonl", "status", times=2)
        said: list[str] = []
        make_all(tasks, maker(tokenizer, said), 1)
    assert len(said) == 2 and all("1.jsonl: HTTP 503" in line for line in said)
