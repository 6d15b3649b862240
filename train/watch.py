"""A rank that dies or hangs ends the whole job, and one line says which and why.

A daemon thread on every rank beats in the job's store (torchrun's, or rank 0's), through a client of its own,
so that whatever the main thread waits for does not hold it up. Reasons to end:

an error       that the main thread met; if a collective failed, a rank that has fallen silent
SIGTERM        which torchrun sends when a rank of its machine has died: again, who has fallen silent
no progress    of any rank for `parallel.timeout_seconds`, or a rank that is silent as long

Whoever finds one claims the verdict in the store; that rank alone speaks, the others leave without a word.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from configs.errors import ConfigError

Item = TypeVar("Item")
State = dict[str, Any]  # of a rank: pid, beat, done, count (of progress), place, waits (in a collective)

TICK = 0.5  # seconds between two beats
SILENCE = 4.0  # seconds without a beat after which a rank has fallen silent
LINGER = 2.0  # seconds by which those who only follow end later, so that torchrun blames who spoke
JUDGES = 2  # ranks that look for a hang, the second later, should the first be what hangs
ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"data", "model", "optim", "train"}
NOT_A_PLACE = {"train/ranks.py", "train/watch.py"}  # whoever called them is


class FailedHere(ConfigError):
    """Of all ranks, this one says why they fail."""


class FailedElsewhere(ConfigError):
    """Another rank says why."""


class Job:
    """What the ranks of a job tell each other in its store. Raises RuntimeError once that is gone."""

    def __init__(self, store: Store, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world

    @staticmethod
    def find() -> Job | None:
        """The job that the environment describes, by a connection of its own; None where there is none."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        store = connect() if world > 1 else None
        return Job(PrefixStore("watch", this_attempt(store)), rank, world) if store else None

    def states(self) -> dict[int, State]:
        """What each rank wrote last; none at all until every one has begun."""
        keys = [f"rank/{rank}" for rank in range(self.world)]
        return dict(enumerate(map(json.loads, self.store.multi_get(keys)))) if self.store.check(keys) else {}

    def silent_since(self, before: dict[int, State]) -> list[int]:
        """Ranks that have not beaten since, and had not ended as they should."""
        now = self.states()
        return [rank for rank in before if before[rank] == now[rank] and not now[rank]["done"]]

    def say(self, text: str, line: str, silent: Collection[int] = ()) -> bool:
        """Print `text` unless a rank has said why the job ends; torchrun's report gets the `line`.

        `silent` ranks cannot end by themselves.
        """
        mine = json.dumps({"by": self.rank, "silent": list(silent), "at": time.time_ns()})
        if self.store.compare_set("verdict", "", mine).decode() != mine:
            return False
        print(text, file=sys.stderr, flush=True)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
            with suppress(OSError):
                Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
        return True

    def verdict(self) -> dict[str, Any] | None:
        """Who said why the job ends (`by`), and which ranks do not answer."""
        return json.loads(self.store.get("verdict")) if self.store.check(["verdict"]) else None

    def wait_for_verdict(self, seconds: float) -> None:
        with suppress(RuntimeError):
            self.store.wait(["verdict"], timedelta(seconds=seconds))


def connect() -> Store | None:
    """A connection to the job's store, torchrun's or rank 0's; None where there is none."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return None
    try:
        store = TCPStore(host, int(port), timeout=timedelta(seconds=5), wait_for_workers=False)
    except RuntimeError:
        return None
    store.set_timeout(timedelta(seconds=60))
    return store


def this_attempt(store: Store) -> Store:
    """The part of a job's store that is new whenever `torchrun --max-restarts` starts its processes again."""
    return PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Watch:
    """Counts the progress of this rank, and once started sees that nobody waits for a rank that is gone."""

    def __init__(self, job: Job | None = None, timeout_seconds: float = 600):
        self._job, self._timeout = job, timeout_seconds
        self._count = self._beats = self._patience = 0
        self._stopped = threading.Event()

    def progress(self) -> None:
        """To be called often: the job ends when no rank has done so for `timeout_seconds`."""
        self._count += 1

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; every one that is taken is progress."""
        for item in items:
            self.progress()
            yield item

    @contextmanager
    def patient(self) -> Iterator[None]:
        """What happens here may take any time: only a rank that dies or stops answering ends the job."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1
            self.progress()

    def start(self) -> None:
        """Begin; from the main thread, on all ranks at about the same time."""
        if not self._job:
            return
        self._beat(self._job)
        self._wakeup, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._run, args=(self._job,), name="watch", daemon=True)
        self._thread.start()
        # Python's handlers wait for the main thread, which may be in a collective: the thread reads the pipe.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _heard)

    def stop(self) -> None:
        """The run is over: ranks may end as they please."""
        if self._job and not self._stopped.is_set():
            self._stopped.set()
            self._thread.join(4 * TICK)
            with suppress(RuntimeError):
                self._beat(self._job)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _beat(self, job: Job) -> None:
        self._beats += 1
        self._count += self._patience > 0
        mine = {"pid": os.getpid(), "beat": self._beats, "count": self._count} | place()
        job.store.set(f"rank/{job.rank}", json.dumps(mine | {"done": self._stopped.is_set()}))

    def _run(self, job: Job) -> None:
        judge = Judge(job, self._timeout) if job.rank < JUDGES else None
        try:
            while not self._stopped.is_set():
                told = select.select([self._wakeup], [], [], TICK)[0]
                self._beat(job)
                if verdict := job.verdict():
                    if verdict["by"] != job.rank:
                        self._leave(job, verdict["silent"])
                    time.sleep(TICK)  # the main thread has spoken, and ends
                elif told and signal.SIGTERM in os.read(self._wakeup, 4096):
                    if line := self._told_to_end(job):
                        self._end(job, line)
                elif judge and (found := judge.look()):
                    self._end(job, *found)
        except RuntimeError:  # torchrun's store goes with its first machine, rank 0's own with that rank
            if self._stopped.wait(LINGER):
                return
            if os.environ.get("LOCAL_RANK", "0") == "0":
                host = os.environ["MASTER_ADDR"]
                print(f"error: {host} has ended the job, or is gone; see there", file=sys.stderr, flush=True)
            leave()

    def _told_to_end(self, job: Job) -> str:
        """Why: by torchrun because a rank has died, or by a person or scheduler; "" where the main thread has
        heard it, too, and ends after its step (train/stop.py)."""
        ends_itself = signal.getsignal(signal.SIGTERM) is not _heard
        before, until = job.states(), time.monotonic() + SILENCE
        while time.monotonic() < until:
            if self._stopped.wait(TICK):
                return ""
            self._beat(job)
        if gone := job.silent_since(before):
            return died(gone)
        return "" if ends_itself else f"rank {job.rank} was told to end (SIGTERM)"

    def _end(self, job: Job, line: str, silent: Collection[int] = ()) -> None:
        """Say it, if nobody has said anything yet, and end this process."""
        line += "; go on with resume=auto"
        said = job.say(f"error: {line}", line, silent)
        self._leave(job, silent, 2 * TICK if said else LINGER)  # the others see it while there is a store

    def _leave(self, job: Job, silent: Collection[int], seconds: float = LINGER) -> None:
        """End neighbours that do not answer, for which torchrun would wait, and soon this process."""
        first = job.rank - int(os.environ.get("LOCAL_RANK", 0))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        states = job.states() if silent else {}
        for rank in set(silent) & set(here) - {job.rank}:
            with suppress(OSError):
                os.kill(states[rank]["pid"], signal.SIGKILL)
        time.sleep(seconds)
        leave()


class Judge:
    """Sees from the states of all ranks that the job hangs."""

    def __init__(self, job: Job, timeout_seconds: float):
        self._job, self._timeout = job, timeout_seconds
        self._limit = timeout_seconds + 2 * SILENCE * job.rank
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its last beat, and when that was new
        self._counts, self._moved = [0], time.monotonic()

    def look(self) -> tuple[str, list[int]] | None:
        """Why the job has to end, and the ranks that do not answer; None while all is well."""
        now, states = time.monotonic(), self._job.states()
        for rank, state in states.items():
            if state["beat"] != self._seen.get(rank, (0, 0))[0] or state["done"]:
                self._seen[rank] = state["beat"], now
        if (counts := [state["count"] for state in states.values()]) != self._counts:
            self._counts, self._moved = counts, now
        if now - min([self._moved, *(when for _, when in self._seen.values())]) < self._limit:
            return None
        silent = [rank for rank, (_, when) in self._seen.items() if now - when > SILENCE]
        limit = f"no progress for {self._timeout:.0f} s (parallel.timeout_seconds)"
        return f"{who_hangs(states, silent)}: {limit}", silent


def speak(error: BaseException, line: str, trace: str = "") -> None:
    """Print why this process ends, with `trace` above `line`, unless another rank says why they all do."""
    rank, job = int(os.environ.get("RANK", 0)), Job.find()
    if isinstance(error, KeyboardInterrupt):  # all know
        return
    everyones = isinstance(error, ConfigError) and (rank == 0 or not isinstance(error, FailedHere))
    line = line if everyones else f"rank {rank}: {line}"
    text = f"{trace}error: {line}"
    follows = isinstance(error, FailedElsewhere) or lost_others(error)
    if job is None:
        print(text, file=sys.stderr, flush=True)
        return
    try:
        if isinstance(error, FailedElsewhere):
            job.wait_for_verdict(3600)  # whoever speaks may have to send a model to W&B first
        elif follows:
            before = job.states()
            job.wait_for_verdict(SILENCE)
            if gone := job.silent_since(before):
                text = f"error: {(line := f'{died(gone)}; go on with resume=auto')}"
        # The others see it while there is a store, and end after whoever spoke.
        time.sleep(2 * TICK if job.say(text, line) else LINGER)
    except RuntimeError:
        time.sleep(2 * LINGER)  # the store went with its machine: the watch says so


def _heard(*_: object) -> None:
    """SIGTERM, where only the watch acts on it."""


def leave() -> None:
    """End this process, whatever its main thread does."""
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hides
    os._exit(1)


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed, as it does when other ranks have gone."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, RuntimeError) and in_collective(frames[-1].f_code.co_filename)


def in_collective(file: str) -> bool:
    return "torch/distributed/" in Path(file).as_posix()


def place() -> dict[str, Any]:
    """Where the main thread is, as file:line function of our own, and whether it waits for other ranks."""
    frame, waits = sys._current_frames().get(threading.main_thread().ident or 0), False
    while frame:
        path = Path(frame.f_code.co_filename)
        waits = waits or in_collective(str(path))
        if path.is_relative_to(ROOT):
            file = path.relative_to(ROOT)
            if file.parts[0] in ROOMS and str(file) not in NOT_A_PLACE:
                return {"place": f"{file}:{frame.f_lineno} {frame.f_code.co_name}", "waits": waits}
        frame = frame.f_back
    return {"place": "other code", "waits": waits}


def who_hangs(states: dict[int, State], silent: Collection[int]) -> str:
    """The silent; else where all are, first those in no collective and those apart from most."""
    if silent:
        return f"{named(silent)} not answering"
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, state in states.items():
        groups.setdefault((state["waits"], state["place"]), []).append(rank)
    order = sorted(groups.items(), key=lambda group: (group[0][0], len(group[1])))
    return ", ".join(f"{named(ranks)} {'waiting ' * waits}in {at}" for (waits, at), ranks in order[:3])


def died(ranks: Collection[int]) -> str:
    return f"{named(ranks)} gone: killed, perhaps for want of memory (torchrun's report says by which signal)"


def named(ranks: Collection[int]) -> str:
    """Such as "rank 3 is", or "ranks 1, 2, 3, 4 and 5 more are"."""
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    words = ", ".join(map(str, list(ranks)[:4])) + more
    return f"rank {words} is" if len(ranks) == 1 else f"ranks {words} are"
