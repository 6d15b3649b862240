"""A rank that dies or hangs ends the whole job within seconds, and one line says which and why.

A daemon thread on every rank beats in the job's store (torchrun's, or rank 0's), through a client of its own,
so that whatever the main thread waits for does not hold it up. It looks for three things:

death     processes of the same machine are noticed at once, with their signal; others by their silence
no progress   of any rank for `parallel.timeout_seconds`: places where the main threads are tell who hangs
a verdict     another rank has said why the job ends: this one leaves without a word

Whoever finds a reason claims the verdict in the store; the first one alone speaks. torchrun ends the rest.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
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

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from configs.errors import ConfigError

Item = TypeVar("Item")
State = dict[str, Any]  # of a rank: beat, place, waits (in a collective), host, pid

TICK = 0.5  # seconds between two beats
SILENCE = 3.0  # seconds without a beat after which a rank is taken to be gone
LINGER = 2.0  # seconds that torchrun has to blame the culprit before those who only follow it end, too
ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"configs", "data", "model", "optim", "train"}
NOT_A_PLACE = {"train/ranks.py", "train/watch.py"}  # whoever called them is


class FailedHere(ConfigError):
    """Of all ranks, this one says why they fail."""


class FailedElsewhere(ConfigError):
    """Another rank says why."""


class Job:
    """What the ranks of a job tell each other through its store. Raises RuntimeError once that is gone."""

    def __init__(self, store: Store, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world
        self._beats = 0

    @staticmethod
    def find(seconds: float = 5) -> Job | None:
        """The job that the environment describes, by a connection of its own; None where there is none."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if world == 1 or not host or not port:
            return None
        try:
            limit = timedelta(seconds=seconds)
            store = TCPStore(host, int(port), is_master=False, timeout=limit, wait_for_workers=False)
        except RuntimeError:
            return None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Job(PrefixStore(f"watch/{attempt}", store), rank, world)

    def beat(self, moved: bool = True) -> None:
        """This rank lives, and is where it is; `moved`: and the job goes on."""
        self._beats += 1
        where, waits = place()
        state = {"beat": self._beats, "place": where, "waits": waits}
        self.store.set(
            f"rank/{self.rank}", json.dumps({**state, "host": socket.gethostname(), "pid": os.getpid()})
        )
        if moved:
            self.store.set("moved", f"{self.rank} {self._beats}")

    def moved(self) -> bytes:
        """Changes whenever some rank makes progress."""
        return self.store.get("moved")

    def states(self, ranks: Iterable[int]) -> dict[int, State]:
        return {rank: json.loads(self.store.get(f"rank/{rank}")) for rank in ranks}

    def claim(self, silent: Collection[int] = ()) -> bool:
        """Whether this rank is the one that says why the job ends; `silent` ones cannot end by themselves."""
        mine = json.dumps({"by": self.rank, "silent": list(silent), "at": time.time_ns()})
        return self.store.compare_set("verdict", "", mine).decode() == mine

    def verdict(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("verdict")) if self.store.check(["verdict"]) else None

    def say(self, text: str, line: str) -> None:
        """Print `text`, let torchrun's report have the `line`, and let the others go."""
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError):
                message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
                Path(path).write_text(json.dumps({"message": message}))
        self.store.set("said", "")

    def wait_for(self, key: str, seconds: float) -> None:
        """Until a rank has claimed the `verdict`, or has `said` it; not longer than this."""
        with suppress(DistStoreError):
            self.store.wait([key], timedelta(seconds=seconds))

    def silent(self, states: dict[int, State]) -> list[int]:
        """Ranks that have not given a sign of life since `states`."""
        now = self.states(states)
        return [rank for rank, state in states.items() if state["beat"] == now[rank]["beat"]]


class Watch:
    """Counts the progress of this rank, and once started sees that nobody waits for a rank that is gone."""

    def __init__(self, job: Job | None = None, timeout_seconds: float = 600):
        self._job, self._timeout = job, timeout_seconds
        self._count = self._seen = self._patience = 0
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
        """What happens here may take any time: only the death of a rank, or its silence, ends the job."""
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
        self._job.beat()
        first = self._job.rank - int(os.environ.get("LOCAL_RANK", 0))
        here = set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) - {self._job.rank}
        self._job.store.wait([f"rank/{rank}" for rank in here], timedelta(seconds=60))
        self._pids = {rank: state["pid"] for rank, state in self._job.states(here).items()}
        self._selector = selectors.DefaultSelector()
        self._signals, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        self._processes = {}
        for rank, pid in self._pids.items() if hasattr(os, "pidfd_open") else ():
            with suppress(OSError):  # it has ended meanwhile: torchrun knows
                self._processes[rank] = os.pidfd_open(pid)
                self._selector.register(self._processes[rank], selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        # Python's handlers wait for the main thread, which may be in a collective: the thread reads the pipe.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)

    def stop(self) -> None:
        """The run is over: ranks may end as they please."""
        if self._job and not self._stopped.is_set():
            self._stopped.set()
            with suppress(RuntimeError):
                self._job.store.set(f"done/{self._job.rank}", "")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(self._wake, b"\0")
            self._thread.join(5)
            signal.set_wakeup_fd(-1)

    def _on_term(self, *_: object) -> None:
        if not self._thread.is_alive():
            os._exit(128 + signal.SIGTERM)

    def _run(self) -> None:
        assert self._job
        parent, under_torchrun = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ
        self._still_since, self._moved = time.monotonic(), b""
        try:
            while not self._stopped.is_set():
                self._tick(self._job)
                if under_torchrun and os.getppid() != parent:
                    self._job.claim()
                    os._exit(1)  # torchrun was killed: nobody else would end this process
        except RuntimeError:
            self._store_is_gone()

    def _store_is_gone(self) -> None:
        """torchrun's store goes with the node that failed; rank 0's own goes when it ends."""
        if self._stopped.wait(LINGER) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        if os.environ.get("LOCAL_RANK") == "0":
            host = os.environ["MASTER_ADDR"]
            print(
                f"error: {host} has ended the job, or does not answer; see what it says",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    def _tick(self, job: Job) -> None:
        """Wait for news at most until the next beat, then look around."""
        ready = [key for key, _ in self._selector.select(TICK)]
        job.beat(moved=self._patience > 0 or self._count != self._seen)
        self._seen = self._count
        if verdict := job.verdict():
            if verdict["by"] != job.rank:
                self._leave(verdict)
            time.sleep(TICK)  # the main thread speaks, and ends
            return
        for key in ready:
            if key.data is not None:
                self._process_ended(job, key.fd, key.data)
        if any(key.fd == self._signals for key in ready) and signal.SIGTERM in os.read(self._signals, 4096):
            self._end(f"rank {job.rank} was told to end by signal {int(signal.SIGTERM)} (SIGTERM)")
        if job.moved() != self._moved:
            self._still_since, self._moved = time.monotonic(), job.moved()
        turn = min(job.rank, 2) * (SILENCE + 4 * TICK)  # usually rank 0 is the only judge
        if time.monotonic() - self._still_since > self._timeout + turn:
            self._judge(job)

    def _process_ended(self, job: Job, fd: int, rank: int) -> None:
        status = exit_status(self._pids[rank])
        self._selector.unregister(fd)
        if status != 0 and not job.store.check([f"done/{rank}"]):
            self._end(f"rank {rank} {describe_end(status)}; mend it, then go on with resume=auto")

    def _judge(self, job: Job) -> None:
        """Nobody makes progress: say who hangs, unless it goes on after all."""
        before = job.states(range(job.world))
        for _ in range(round(SILENCE / TICK)):
            time.sleep(TICK)
            job.beat(moved=self._count != self._seen)
        silent = job.silent(before)
        if job.moved() == self._moved:
            where = describe_places(job.states(range(job.world)), silent)
            limit = f"no progress for {self._timeout:.0f} s (parallel.timeout_seconds)"
            self._end(f"{where}: {limit}; go on with resume=auto", silent)

    def _end(self, line: str, silent: Collection[int] = ()) -> None:
        """Say it, if nobody has said anything yet, and end this process."""
        assert self._job
        if self._job.claim(silent):
            self._job.say(f"error: {line}", line)
        verdict = self._job.verdict()
        assert verdict
        self._leave(verdict)

    def _leave(self, verdict: dict[str, Any]) -> None:
        assert self._job
        self._job.wait_for("said", 5)
        for rank in verdict["silent"]:
            if rank in self._processes:  # a stopped process would keep torchrun waiting
                with suppress(OSError):
                    signal.pidfd_send_signal(self._processes[rank], signal.SIGKILL)
        if verdict["by"] != self._job.rank:
            self._linger()
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hides
        os._exit(1)

    def _linger(self) -> None:
        """Until torchrun ends this process, or long enough."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals, selectors.EVENT_READ)
            selector.select(LINGER)


def speak(error: BaseException, line: str, trace: str = "") -> None:
    """Print why this process ends, with a `trace` above the `line`, unless another rank says why they all do.

    Without a store to agree by, what says it are FailedHere, other errors than ConfigError, and rank 0.
    """
    rank, wait = int(os.environ.get("RANK", 0)), seconds_for_others(error)
    line = line if isinstance(error, ConfigError) and rank == 0 else f"rank {rank}: {line}"
    text = "" if isinstance(error, KeyboardInterrupt) else f"{trace}error: {line}"
    job = Job.find()
    if job is None:
        if wait <= SILENCE:
            print(text, end="\n" if text else "", file=sys.stderr, flush=True)
        return
    with suppress(RuntimeError):  # the store went with the first node, which says why
        before = job.states(range(job.world)) if wait == SILENCE else {}
        if wait:
            job.wait_for("verdict", wait)
        if gone := job.verdict() is None and job.silent(before):
            line = f"{named(gone)} gave no sign of life; mend it, then go on with resume=auto"
            text = f"error: {line}"
        if job.claim():
            job.say(text, line)
        else:
            job.wait_for("said", 5)
            time.sleep(LINGER)


def seconds_for_others(error: BaseException) -> float:
    """How long another rank may take to say why the job ends; 0: this rank does, right away."""
    if isinstance(error, FailedElsewhere):
        return 3600  # it may have to send a model to W&B first; this rank's watch notices if it dies
    if isinstance(error, ConfigError):  # else all ranks find it
        return 0 if isinstance(error, FailedHere) or os.environ.get("RANK", "0") == "0" else 10
    return SILENCE if lost_others(error) else 0


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed, as it does when other ranks have gone."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, RuntimeError) and in_collective(Path(frames[-1].f_code.co_filename))


def place() -> tuple[str, bool]:
    """Where the main thread is, as file:line function of our own, and whether it waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    where, waits = "", False
    while frame:
        path = Path(frame.f_code.co_filename)
        waits = waits or in_collective(path)
        if not where and path.is_relative_to(ROOT):
            file = path.relative_to(ROOT)
            if file.parts[0] in ROOMS and str(file) not in NOT_A_PLACE:
                where = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return where or "unknown code", waits


def in_collective(path: Path) -> bool:
    return "torch/distributed/" in path.as_posix()


def describe_places(states: dict[int, State], silent: Collection[int]) -> str:
    """Who stood still: the silent, or else those in no collective, or else those that are not with most."""
    places = {rank: state["place"] for rank, state in states.items() if rank not in silent}
    groups = Counter(places.values()).most_common()
    culprits = list(silent) or [rank for rank in places if not states[rank]["waits"]]
    if len(culprits) in (0, len(states)):
        clear = len(groups) > 1 and groups[0][1] > groups[1][1]
        culprits = [rank for rank in places if clear and places[rank] != groups[0][0]]
    parts = (
        [f"{named(list(silent))} gave no sign of life (stopped, or the machine is gone)"] if silent else []
    )
    for where, _ in groups if not silent else ():
        if here := [rank for rank in culprits or places if places[rank] == where]:
            parts.append(f"{named(here)} stood still in {where}")
    if others := Counter(places[rank] for rank in places if culprits and rank not in culprits).most_common(1):
        parts.append(f"others waited in {others[0][0]}")
    return ", ".join(parts[:4])


def named(ranks: list[int]) -> str:
    """Such as "rank 3", or "ranks 1, 2 and 5 more"."""
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:4])) + more


def exit_status(pid: int) -> int | None:
    """What a process of this machine that has just ended ended with, as waitpid says; None: too late."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().split()[-1])
    except (OSError, ValueError):
        return None


def describe_end(status: int | None) -> str:
    if status is None:
        return "was killed, or ended without a word"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = ", perhaps for want of memory" if number == signal.SIGKILL else ""
        return f"was killed by signal {number} ({signal.Signals(number).name}){why}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"
