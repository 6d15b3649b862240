"""A rank that dies or hangs ends the whole job, and one line says which and why.

A daemon thread on every rank beats in the job's store (torchrun's, or rank 0's), through a client of its own,
so that whatever the main thread waits for does not hold it up. It looks for

death         of processes on its machine, noticed at once with their signal; others fall silent
no progress   of any rank for `parallel.timeout_seconds`, or a rank that is silent as long
a verdict     another rank has said why the job ends: this one leaves without a word

Whoever finds a reason claims the verdict in the store; that one alone speaks. torchrun ends what is left.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from configs.errors import ConfigError

Item = TypeVar("Item")
State = dict[str, Any]  # of a rank: pid, beat, count (of progress), place, waits (in a collective)

TICK = 0.5  # seconds between two beats
SILENCE = 4.0  # seconds without a beat after which a rank no longer answers
LINGER = 2.0  # seconds that torchrun has to blame the culprit before those who only follow it end, too
JUDGES = 3  # ranks that look for a hang, one after the other should the first be what hangs
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
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if world == 1 or not host or not port:
            return None
        try:
            store = TCPStore(host, int(port), timeout=timedelta(seconds=5), wait_for_workers=False)
        except RuntimeError:
            return None
        store.set_timeout(timedelta(seconds=60))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Job(PrefixStore(f"watch/{attempt}", store), rank, world)

    def states(self, ranks: Iterable[int]) -> dict[int, State]:
        """What these ranks wrote last; none at all until each has begun."""
        keys = {rank: f"rank/{rank}" for rank in ranks}
        if not keys or not self.store.check(list(keys.values())):
            return {}
        return dict(zip(keys, map(json.loads, self.store.multi_get(list(keys.values()))), strict=True))

    def silent_since(self, before: dict[int, State]) -> list[int]:
        """Ranks that have not beaten since, and have not ended as they should."""
        now = self.states(before)
        return [r for r in before if before[r]["beat"] == now[r]["beat"] and not self.done(r)]

    def done(self, rank: int) -> bool:
        """Whether this rank ended as it should."""
        return self.store.check([f"done/{rank}"])

    def claim(self, silent: Collection[int] = ()) -> bool:
        """Whether this rank is the one that says why the job ends; `silent` ones cannot end by themselves."""
        mine = json.dumps({"by": self.rank, "silent": list(silent), "at": time.time_ns()})
        return self.store.compare_set("verdict", "", mine).decode() == mine

    def verdict(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("verdict")) if self.store.check(["verdict"]) else None

    def say(self, text: str, line: str) -> None:
        """Print `text`, let torchrun's report have the `line`, and let the others go."""
        print(text, file=sys.stderr, flush=True)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
            with suppress(OSError):
                Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
        self.store.set("said", "")

    def wait_said(self, seconds: float) -> None:
        """Until a rank has said why the job ends, but not longer than this."""
        with suppress(RuntimeError):
            self.store.wait(["said"], timedelta(seconds=seconds))


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
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._neighbours = self._find_neighbours(self._job)
        self._thread = threading.Thread(target=self._run, args=(self._job,), name="watch", daemon=True)
        self._thread.start()
        # Python's handlers wait for the main thread, which may be in a collective: the thread reads the pipe.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None if self._thread.is_alive() else os._exit(1))

    def stop(self) -> None:
        """The run is over: ranks may end as they please."""
        if self._job and not self._stopped.is_set():
            self._stopped.set()
            with suppress(RuntimeError):
                self._job.store.set(f"done/{self._job.rank}", "")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.write(self._wake, b"\0")
            self._thread.join(5)

    def _find_neighbours(self, job: Job) -> dict[int, int]:
        """Other ranks of this machine with their processes, whose end the selector will report."""
        first = job.rank - int(os.environ.get("LOCAL_RANK", 0))
        ranks = set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) - {job.rank}
        job.store.wait([f"rank/{rank}" for rank in ranks])
        pids = {rank: state["pid"] for rank, state in job.states(ranks).items()}
        for rank, pid in pids.items() if hasattr(os, "pidfd_open") else ():
            with suppress(OSError):  # it has ended meanwhile: torchrun knows
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, rank)
        return pids

    def _beat(self, job: Job) -> None:
        self._beats += 1
        self._count += self._patience > 0
        where, waits = place()
        state = {
            "pid": os.getpid(),
            "beat": self._beats,
            "count": self._count,
            "place": where,
            "waits": waits,
        }
        job.store.set(f"rank/{job.rank}", json.dumps(state))

    def _run(self, job: Job) -> None:
        judge = Judge(job, self._timeout) if job.rank < JUDGES else None
        try:
            while not self._stopped.is_set():
                ready = [key for key, _ in self._selector.select(TICK)]
                self._beat(job)
                if verdict := job.verdict():
                    if verdict["by"] != job.rank:
                        self._leave(job, verdict)
                    time.sleep(TICK)  # the main thread speaks, and ends
                    continue
                for key in ready:
                    if key.data is not None:
                        self._selector.unregister(key.fd)
                        if not job.done(key.data):
                            self._end(job, f"rank {key.data} {how_it_ended(self._neighbours[key.data])}")
                if any(key.data is None for key in ready) and signal.SIGTERM in os.read(self._wakeup, 4096):
                    self._told_to_end(job)
                if judge and (found := judge.look()):
                    self._end(job, *found)
        except RuntimeError:
            self._store_is_gone()

    def _told_to_end(self, job: Job) -> None:
        """By a person, or by torchrun because of a rank of another machine: that one falls silent."""
        before = job.states(range(job.world))
        for _ in range(round(SILENCE / TICK)):
            time.sleep(TICK)
            self._beat(job)
        gone = job.silent_since(before)
        self._end(job, f"{named(gone)} gone" if gone else f"rank {job.rank} was told to end (SIGTERM)")

    def _end(self, job: Job, line: str, silent: Collection[int] = ()) -> None:
        """Say it, if nobody has said anything yet, and end this process."""
        if job.claim(silent):
            line += "; go on with resume=auto"
            job.say(f"error: {line}", line)
        verdict = job.verdict()
        assert verdict
        self._leave(job, verdict)

    def _leave(self, job: Job, verdict: dict[str, Any]) -> None:
        job.wait_said(5)
        for rank in verdict["silent"]:
            if rank in self._neighbours:  # a stopped process would keep torchrun waiting
                with suppress(OSError):
                    os.kill(self._neighbours[rank], signal.SIGKILL)
        if verdict["by"] != job.rank:
            self._linger()
        leave()

    def _linger(self) -> None:
        """Until torchrun tells this process to end, or long enough."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            selector.select(LINGER)

    def _store_is_gone(self) -> None:
        """torchrun's store goes with its first node; rank 0's own goes when that rank ends."""
        if self._stopped.wait(LINGER):
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host = os.environ["MASTER_ADDR"]
            print(f"error: {host} has ended the job, or is gone; see there", file=sys.stderr, flush=True)
        leave()


class Judge:
    """Sees from the states of all ranks that the job hangs."""

    def __init__(self, job: Job, timeout_seconds: float):
        self._job, self._timeout = job, timeout_seconds
        self._limit = timeout_seconds + 2 * SILENCE * job.rank
        self._moved = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its last beat, and when that was new
        self._counts: list[int] = []

    def look(self) -> tuple[str, list[int]] | None:
        """Why the job has to end, and the ranks that do not answer; None while all is well."""
        now, states = time.monotonic(), self._job.states(range(self._job.world))
        for rank, state in states.items():
            if state["beat"] != self._seen.get(rank, (0, 0))[0]:
                self._seen[rank] = state["beat"], now
        if (counts := [state["count"] for state in states.values()]) != self._counts:
            self._counts, self._moved = counts, now
        oldest = min([self._moved, *(when for _, when in self._seen.values())])
        if now - oldest < self._limit:
            return None
        silent = [rank for rank, (_, when) in self._seen.items() if now - when > SILENCE]
        silent = [rank for rank in silent if not self._job.done(rank)]
        if not silent and now - self._moved < self._limit:
            return None
        limit = f"no progress for {self._timeout:.0f} s (parallel.timeout_seconds)"
        return f"{who_hangs(states, silent)}: {limit}", silent


def speak(error: BaseException, line: str, trace: str = "") -> None:
    """Print why this process ends, with `trace` above `line`, unless another rank says why they all do."""
    rank, job = int(os.environ.get("RANK", 0)), Job.find()
    everyones = isinstance(error, ConfigError) and (rank == 0 or not isinstance(error, FailedHere))
    line = line if everyones else f"rank {rank}: {line}"
    text = f"{trace}error: {line}"
    follows = isinstance(error, FailedElsewhere) or lost_others(error)
    if job is None:
        if not follows and not isinstance(error, KeyboardInterrupt):
            print(text, file=sys.stderr, flush=True)
        return
    try:
        if isinstance(error, KeyboardInterrupt):  # all know
            job.store.set(f"done/{rank}", "")
            return
        if isinstance(error, FailedElsewhere):
            job.wait_said(3600)  # it may have to send a model to W&B first
        elif follows:
            before = job.states(range(job.world))
            job.wait_said(SILENCE)
            if job.verdict() is None and (gone := job.silent_since(before)):
                text = f"error: {(line := f'{named(gone)} gone; go on with resume=auto')}"
        if job.claim():
            job.say(text, line)
            time.sleep(2 * TICK)  # the others see it while there is a store
        else:
            job.wait_said(5)
            time.sleep(LINGER)
    except RuntimeError:
        time.sleep(2 * LINGER)  # the store went with its machine: the watch says so


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


def place() -> tuple[str, bool]:
    """Where the main thread is, as file:line function of our own, and whether it waits for other ranks."""
    frame, waits = sys._current_frames().get(threading.main_thread().ident or 0), False
    while frame:
        path = Path(frame.f_code.co_filename)
        waits = waits or in_collective(str(path))
        if path.is_relative_to(ROOT):
            file = path.relative_to(ROOT)
            if file.parts[0] in ROOMS and str(file) not in NOT_A_PLACE:
                return f"{file}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "other code", waits


def who_hangs(states: dict[int, State], silent: Collection[int]) -> str:
    """The silent, or else those in no collective, or else those apart from most; and where the others are."""
    places = {rank: state["place"] for rank, state in states.items() if rank not in silent}
    culprits = [rank for rank in places if not states[rank]["waits"]]
    if silent or len(culprits) in (0, len(places)):
        most = Counter(places.values()).most_common(1)
        culprits = [rank for rank in places if places[rank] != most[0][0]]
    parts = [f"{named(silent)} not answering"] if silent else []
    for where in [] if silent else dict.fromkeys(places[rank] for rank in culprits or places):
        parts.append(f"{named([rank for rank in culprits or places if places[rank] == where])} in {where}")
    others = Counter(places[rank] for rank in places if silent or (culprits and rank not in culprits))
    parts = parts[:3] + [f"others in {where}" for where, _ in others.most_common(1)]
    return ", ".join(parts)


def named(ranks: Collection[int]) -> str:
    """Such as "rank 3 is", or "ranks 1, 2, 3, 4 and 5 more are"."""
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    words = ", ".join(map(str, list(ranks)[:4])) + more
    return f"rank {words} is" if len(ranks) == 1 else f"ranks {words} are"


def how_it_ended(pid: int) -> str:
    """What a process of this machine that has just ended ended with."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().split()[-1])
    except (OSError, ValueError):  # torchrun was faster
        return "was killed, or ended without a word"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = ", perhaps for want of memory" if number == signal.SIGKILL else ""
        return f"was killed by signal {number} ({signal.Signals(number).name}){why}"
    return f"ended before the others, with exit code {os.waitstatus_to_exitcode(status)}"
