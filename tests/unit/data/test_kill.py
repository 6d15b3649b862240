"""A stream that is killed at random moments, and continued by other worlds with other lengths, is that of one
process that never ended. FOURFOLD_STREAM_KILLS says how often (50 take about a minute)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from data import order
from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.loader import Loader
from data.opening import open_data
from tests.unit.data.mixed import rows, write_mixed

ROOT = Path(__file__).parents[3]
KILLS = int(os.environ.get("FOURFOLD_STREAM_KILLS", "3"))
WORLDS = (1, 2, 3, 4, 8)
PATIENCE = 60.0  # seconds for a step on a busy computer
Change = tuple[int, Shape]  # from this step on


def load(config: DataConfig, changes: list[Change], rank: int, world: int) -> Loader:
    def plan(step: int) -> Shape:
        return max((change for change in changes if change[0] <= step), key=lambda change: change[0])[1]

    return open_data(config, plan, mtp_depth=1, seed=7, rank=rank, world=world).train


def digests(loaders: list[Loader]) -> list[str]:
    """Of every row of the next step, on whatever rank."""
    found = [row for loader in loaders for row in rows(loader.batch())]
    return sorted(blake2b(row, digest_size=16).hexdigest() for row in found)


def done(home: Path) -> int:
    """How many steps are."""
    return sum(path.suffix == ".json" for path in (home / "steps").iterdir())


def reached(home: Path) -> dict:
    """The state after the last step that is done."""
    steps = done(home)
    if not steps:
        return {"sources": {}}
    return json.loads((home / "steps" / f"{steps - 1}.json").read_text())["state"]


# What runs in a process of its own


def serve() -> None:
    """For every line of standard input: fork a run, print its process id and, once it has ended, how. Nothing
    but imports happens before the fork, so that it costs no time and copies no thread."""
    small_windows()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def small_windows() -> None:
    order.WINDOW_TOKENS, order.WINDOW_ROWS = 3000, 1


def run(home: str, world: int, config: dict, changes: list) -> None:
    """All ranks of a world, from where the files say that the stream stood, until it is killed. A step's file
    appears whole or not at all: its rows, and the state after it."""
    sources = {name: SourceConfig(**fields) for name, fields in config["sources"].items()}
    config |= {"sources": sources, "tokenizer": TokenizerConfig(**config["tokenizer"])}
    shapes = [(step, Shape(*shape)) for step, shape in changes]
    loaders = [load(DataConfig(**config), shapes, rank, world) for rank in range(world)]
    folder = Path(home) / "steps"
    step = done(Path(home))
    if step:
        for loader in loaders:
            loader.load_state_dict(reached(Path(home)))
    parent = os.getppid()
    while os.getppid() == parent:
        found = digests(loaders)
        state, *others = [loader.state_dict() for loader in loaders]
        assert all(other == state for other in others)
        draft = folder / "draft"
        draft.write_text(json.dumps({"rows": found, "state": state, "world": world}))
        os.replace(draft, folder / f"{step}.json")
        step += 1


# The test


@contextmanager
def forks() -> Iterator[Callable[[dict], tuple[int, Callable[[], int]]]]:
    """What starts a run: it returns a process id, and what waits for the end and returns its status."""
    command = [sys.executable, "-c", "from tests.unit.data.test_kill import serve; serve()"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout
        stdin, stdout = server.stdin, server.stdout

        def start(what: dict) -> tuple[int, Callable[[], int]]:
            print(json.dumps(what), file=stdin, flush=True)
            return int(stdout.readline()), lambda: int(stdout.readline())

        yield start
        stdin.close()


def until(condition: Callable[[], bool], pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        os.kill(pid, 0)  # ProcessLookupError once it has failed
        assert time.monotonic() < deadline, "no step was done in time"
        time.sleep(0.002)


def drawn(draw: random.Random) -> Shape:
    mixtures = (None, {"web": 1.0, "code": 2.0}, {"web": 1.0, "code": 1.0, "long": 2.0})
    return Shape(draw.randrange(1, 25), draw.choice([16, 32, 64, 100, 256, 512]), draw.choice(mixtures))


def test_a_stream_killed_at_any_moment_is_the_uninterrupted_one(tmp_path, monkeypatch):
    draw = random.Random(KILLS)
    config = write_mixed(tmp_path)
    (tmp_path / "steps").mkdir()
    changes: list[Change] = []
    statuses, worlds, before_a_step, in_the_midst = [], [], 0, 0
    with forks() as start:
        for kill in range(KILLS + 1):
            first = done(tmp_path)
            changes = [change for change in changes if change[0] < first]
            gaps = [draw.randrange(4) if first else 0, *(draw.randrange(1, 9) for _ in range(5))]
            changes += [(first + after, drawn(draw)) for after in accumulate(gaps)]
            worlds.append(draw.choice([world for world in WORLDS if world not in worlds[-1:]]))
            what = {"home": str(tmp_path), "world": worlds[-1], "config": config, "changes": changes}
            pid, ended = start(json.loads(json.dumps(what, default=vars)))
            more = draw.choice([0, draw.randrange(1, 40)]) if kill < KILLS else 5
            try:
                until(lambda goal=first + more: done(tmp_path) >= goal, pid)
                time.sleep(draw.random() * (0.01 if more else 0.6))
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            statuses.append(ended())
            before_a_step += done(tmp_path) == first
            in_the_midst += any(source["cursor"][-1] for source in reached(tmp_path)["sources"].values())
    assert statuses == [signal.SIGKILL] * (KILLS + 1)

    monkeypatch.setattr(order, "WINDOW_TOKENS", 3000)
    monkeypatch.setattr(order, "WINDOW_ROWS", 1)
    alone = load(config, changes, 0, 1)
    steps = done(tmp_path)
    total = 0
    for step in range(steps):
        found = json.loads((tmp_path / "steps" / f"{step}.json").read_text())
        expected = digests([alone])
        assert found["rows"] == expected, f"step {step} of world size {found['world']}"
        assert found["state"] == json.loads(json.dumps(alone.state_dict()))
        total += len(expected)
    epochs = {name: source["cursor"][0] for name, source in found["state"]["sources"].items()}
    print(
        f"{KILLS} kills, {before_a_step} before a step was done, {in_the_midst} with a window's rest; {steps}"
        f" steps, {total} rows,"
        f" {len(changes)} changes, worlds {worlds}, epochs {epochs}"
    )
    assert steps >= 5 and in_the_midst
