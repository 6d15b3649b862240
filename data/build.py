"""Shards that are missing are made: by a pool of processes, before training or beside it.

Every shard has a lock, so that processes, and machines that share a folder, make each one once. Whoever needs
a shard waits for its manifest; whoever fails to make one leaves a note, so that nobody waits in vain.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from weakref import WeakValueDictionary

from datasets.utils import tqdm
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from configs.errors import ConfigError
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.files import hashed, sealed
from data.shards import Damaged, Shard, build, read_manifest
from data.sources import Say, Unit
from data.tokenizer import Tokenizer, cores

WORTH_A_PROCESS = 32 << 20  # bytes on disk; less is tokenized sooner than another process starts
POLL = 0.05  # seconds between two looks for a shard
PATIENT_SILENCE = 10.0  # seconds until whoever waits for a shard says so

Tasks = dict[Path, Unit]
Advance = Callable[[int], None]


def ignore(_: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Maker:
    """Makes shards; `say` is told of trouble with a server, which is waited for `minutes` long, and `advance`
    of the bytes of text that are done."""

    tokenizer: Tokenizer
    minutes: float
    say: Say
    advance: Advance = ignore

    def make(self, path: Path, unit: Unit, *, whole: bool = False, block: bool = True) -> bool:
        """Make a shard, unless it is there, and with `whole` intact; whether it is now. Another process that
        makes it is waited for, or without `block` left to it."""
        locks = path.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / path.stem, timeout=-1 if block else 0):
                if read_manifest(path, whole=whole) is None:
                    if read_manifest(path):
                        self.say(f"{path} is damaged; it is made anew from {unit.files[0]}")
                    for draft in path.parent.glob(f".{path.stem}.*.tmp"):  # of a build that was killed
                        draft.unlink()
                    build(
                        unit, self.tokenizer, path, minutes=self.minutes, say=self.say, advance=self.advance
                    )
        except Timeout:
            return False
        return True


def make_all(tasks: Tasks, maker: Maker, workers: int | None, *, whole: bool = False) -> None:
    """Make the shards that are missing, in order, with so many processes (None: what is worth it). Raises
    ConfigError or OSError at the first that cannot be made; those that are done stay."""
    todo = dict(tasks) if whole else {p: unit for p, unit in tasks.items() if read_manifest(p) is None}
    workers = worker_count(list(todo.values()), workers)
    for block in (False, True):  # what another process is making is waited for only when all else is done
        if not todo:
            return
        if workers == 1:
            done = {path: maker.make(path, unit, whole=whole, block=block) for path, unit in todo.items()}
        else:
            done = pooled(todo, maker, workers, whole, block)
        todo = {path: unit for path, unit in todo.items() if not done[path]}


def worker_count(units: list[Unit], wanted: int | None) -> int:
    worthwhile = -(-sum(unit.size for unit in units) // WORTH_A_PROCESS)
    return max(1, min(wanted or cores(), len(units), worthwhile if wanted is None else len(units)))


def pooled(tasks: Tasks, maker: Maker, workers: int, whole: bool, block: bool) -> dict[Path, bool]:
    """`make` for every task, in `workers` processes of one thread each."""
    spawn = multiprocessing.get_context("spawn")
    news: Queue[str | int] = spawn.Queue()
    tokenizer = maker.tokenizer
    start = (tokenizer.path, tokenizer.fast_v4, maker.minutes, news, os.getpid())
    done: dict[Path, bool] = {}
    with ProcessPoolExecutor(workers, spawn, start_worker, start) as pool:
        waiting: dict[Future[bool], Path] = {}
        left = deque(tasks.items())
        try:
            while left or waiting:
                while left and len(waiting) < 2 * workers:
                    path, unit = left.popleft()
                    with uninterrupted():
                        waiting[pool.submit(work, path, unit, whole, block)] = path
                ended, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                tell(maker, news)
                if any(process.exitcode is not None for process in processes_of(pool)):
                    raise BrokenProcessPool  # it overlooks those that it started last
                for future in ended:
                    done[waiting.pop(future)] = future.result()
        except BaseException as error:
            for process in processes_of(pool):
                process.terminate()  # what it was making is a draft, which the next build removes
            if isinstance(error, BrokenProcessPool):
                raise ConfigError(
                    "data.workers: a process that tokenizes was killed, perhaps for want of memory;"
                    f" set fewer than {workers} and go on with the same command"
                ) from error
            raise
        tell(maker, news)
    return done


def processes_of(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    return list((pool._processes or {}).values())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are started here leave Ctrl-C to this one, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tell(maker: Maker, news: Queue[str | int]) -> None:
    """What the workers had to say until now."""
    while True:
        try:
            item = news.get_nowait()
        except Empty:
            return
        maker.advance(item) if isinstance(item, int) else maker.say(item)


_maker: Maker  # of a worker


def start_worker(path: Path, fast_v4: bool, minutes: float, news: Queue[str | int], parent: int) -> None:
    """A worker uses one core, gives way to whatever trains, and ends when its parent is gone."""
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.nice(10)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which is left behind when a worker is ended

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _maker = Maker(Tokenizer(path, fast_v4=fast_v4, threads=1), minutes, news.put, news.put)


def work(path: Path, unit: Unit, whole: bool, block: bool) -> bool:
    return _maker.make(path, unit, whole=whole, block=block)


@contextmanager
def progress_bar(tasks: Tasks, shown: bool, console: Console | None = None) -> Iterator[Advance]:
    """What moves a bar over the bytes of text of the tasks; sizes on disk are a first guess of these."""
    console = console or Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    todo = sum(unit.limit or unit.size for path, unit in tasks.items() if read_manifest(path) is None)
    bar = Progress(
        TextColumn("tokenizing"), *columns, console=console, transient=True, disable=not (shown and todo)
    )
    with bar:
        task = bar.add_task("", total=todo)

        def advance(size: int) -> None:
            bar.advance(task, size)
            if (more := bar.tasks[0].completed) > (bar.tasks[0].total or 0):  # compressed text
                bar.update(task, total=more)

        yield advance


@dataclass(frozen=True)
class Beside:
    """What a builder beside the training is told: sources in the order in which they are needed."""

    config: DataConfig
    tasks: Tasks
    tokenizer: Path
    fast_v4: bool
    note: Path

    def to_json(self) -> str:
        """On one line."""
        tasks = [[str(path), asdict(unit)] for path, unit in self.tasks.items()]
        return json.dumps([asdict(self.config), tasks, str(self.tokenizer), self.fast_v4, str(self.note)])

    @staticmethod
    def from_json(text: str) -> Beside:
        """What `to_json` gave."""
        config, tasks, tokenizer, fast_v4, note = json.loads(text)
        config["tokenizer"] = TokenizerConfig(**config["tokenizer"])
        config["sources"] = {name: SourceConfig(**fields) for name, fields in config["sources"].items()}
        units = {Path(path): Unit.from_dict(fields) for path, fields in tasks}
        return Beside(DataConfig(**config), units, Path(tokenizer), fast_v4, Path(note))


class Supply:
    """The shards of a run on this machine: made before it, or beside it, and waited for."""

    def __init__(
        self, tasks: Tasks, tokenizer: Tokenizer, config: DataConfig, folder: Path, *, builder: bool, say: Say
    ):
        """One process of a machine is the `builder`; the others wait for what it makes."""
        self._tasks, self._tokenizer, self._config = tasks, tokenizer, config
        self._maker = Maker(tokenizer, config.patience_minutes, say)
        self._paths = {unit.fingerprint: path for path, unit in tasks.items()}
        self._builder, self._say = builder, say
        self._note = folder / f"failed-{hashed(*tasks)}"
        if builder:
            self._note.unlink(missing_ok=True)  # of an earlier try
        self._opened: WeakValueDictionary[Path, Shard] = WeakValueDictionary()
        self._child: subprocess.Popen[str] | None = None
        self._failure = ""  # of the child

    def make_all(self, *, progress: bool) -> None:
        """Make what is missing, before anything else; processes that are no builder wait for it."""
        missing = {path: unit for path, unit in self._tasks.items() if read_manifest(path) is None}
        with progress_bar(missing, progress and self._builder) as advance:
            if self._builder and worker_count(list(missing.values()), self._config.workers) == 1:
                with noted(self._note):
                    make_all(missing, replace(self._maker, advance=advance), 1)
            else:
                self.start(advance)
            for path in missing:
                self._wait(path, silent=progress)

    def start(self, advance: Advance = ignore) -> None:
        """Make what is missing in a process beside this one, which ends with this one. The pool is there: a
        pool starts the running program anew, and a training is too much for each of its workers."""
        missing = {path.absolute(): unit for path, unit in self._tasks.items() if read_manifest(path) is None}
        if not self._builder or not missing:
            return
        tokenizer, note = self._tokenizer, self._note.absolute()  # the child works in another folder
        order = Beside(self._config, missing, tokenizer.path.absolute(), tokenizer.fast_v4, note)
        with uninterrupted():
            self._child = subprocess.Popen(
                [sys.executable, "-m", "data.prepare", "--beside"],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).resolve().parent.parent,
            )
        assert self._child.stdin and self._child.stderr
        with suppress(BrokenPipeError):  # whoever waits notices that it has ended
            self._child.stdin.write(order.to_json() + "\n")
            self._child.stdin.flush()  # and it stays open: its end tells the child that this process is gone
        self._listener = threading.Thread(
            target=self._listen, args=(self._child.stderr, advance), daemon=True
        )
        self._listener.start()

    def _listen(self, lines: Iterator[str], advance: Advance) -> None:
        for line in lines:
            kind, _, text = line.rstrip().partition(": ")
            if kind == "done":
                advance(int(text))
            elif kind == "error":
                self._failure = text  # said by whoever waits
            else:
                self._say(line.rstrip())

    def close(self) -> None:
        """End the process beside this one."""
        if self._child:
            self._child.kill()
            self._child.wait()

    def ready(self) -> int:
        """How many shards are there."""
        return sum(read_manifest(path) is not None for path in self._tasks)

    def shard(self, unit: Unit) -> Shard:
        """The shard of a unit, once it is there. Raises ConfigError when it cannot be made."""
        path = self._paths[unit.fingerprint]
        if (opened := self._opened.get(path)) is None:
            self._wait(path)
            try:
                opened = Shard(path, self._mend)
            except Damaged:
                self._mend(path)
                opened = Shard(path, self._mend)
            self._opened[path] = opened
        return opened

    def _wait(self, path: Path, *, silent: bool = False) -> None:
        """Until a shard is there; says so when that takes long."""
        began, said = time.monotonic(), 0.0
        while read_manifest(path) is None:
            waited = time.monotonic() - began
            self._raise_failure(path, waited)
            if not silent and waited > PATIENT_SILENCE and waited > 2 * said:
                said = waited
                number = list(self._tasks).index(path) + 1
                self._say(
                    f"waiting for shard {number} of {len(self._tasks)} to be tokenized, for {waited:.0f} s"
                )
            time.sleep(POLL)

    def _raise_failure(self, path: Path, waited: float) -> None:
        """If a builder has failed: the child, or another process, whose note may be an old one until it has
        begun."""
        code = self._child.poll() if self._child else None
        if code is not None and read_manifest(path) is None:
            self._listener.join()
            raise ConfigError(self._failure or f"the process that tokenizes was killed ({code}); start again")
        if not self._builder and waited > PATIENT_SILENCE and self._note.exists():
            raise ConfigError(self._note.read_text())

    def _mend(self, path: Path) -> None:
        """Make a damaged shard anew."""
        try:
            self._maker.make(path, self._tasks[path], whole=True)
        except (ConfigError, OSError) as error:
            raise Damaged(f"{path} is damaged and cannot be made anew: {error}") from error


@contextmanager
def noted(note: Path) -> Iterator[None]:
    """Leave what fails in a note for those who wait, and say it in one line."""
    try:
        yield
    except (ConfigError, OSError) as error:
        with suppress(ConfigError, OSError), sealed(note) as file:  # a full disk: others find out themselves
            file.write(str(error).encode())
        raise ConfigError(str(error)) from error
