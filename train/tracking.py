"""What a run measures, for Weights & Biases or TensorBoard as well: sent by a process of its own.

The trainer puts dicts of floats into a bounded queue and goes on. A thread hands them, as lines of JSON, to a
child process, which alone imports and calls the backend. So a server that hangs, a package that is missing
or an exit hook that waits neither stops nor slows training, and when the trainer is killed its child still
brings its files to an end. This file is both sides: imported it is `Tracker`, run as a script the child.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from train.config import RunConfig

QUEUE = 1000  # messages that wait for the child; more are dropped
INIT_SECONDS, START_SECONDS = 20, 120  # for W&B to answer, then it writes offline; for all of a start
CLOSE_SECONDS, UPLOAD_SECONDS = 60, 1800  # for the last values at the end; with a model to send
LOG = "tracking.log"  # what the backend says, in the run's folder
SECRET = re.compile(r"(^|_)(token|key|password|secret|credentials?)$", re.IGNORECASE)


class Tracker:
    """Sends what a run measures to the backend of `config.tracking`; without `start` it does nothing.

    `warn` is called with one line for whatever goes wrong, from another thread. Nothing here raises, and only
    `close` waits, for a bounded time. Of many ranks one has a tracker that is started.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.dropped = 0
        self._queue: Queue[tuple[Any, ...]] = Queue(QUEUE)
        self._child: subprocess.Popen[str] | None = None
        self._gave_up = False

    def start(self, config: RunConfig, folder: Path, run_id: str | None = None, step: int = 0) -> str | None:
        """Begin, or with the `run_id` that an earlier start returned go on after `step`.

        Returns the id of the W&B run, None for other backends. Files go into `folder`, which exists.
        """
        tracking = config.tracking
        if tracking.backend == "none":
            return None
        run_id = (run_id or secrets.token_hex(4)) if tracking.backend == "wandb" else None
        settings = {**asdict(tracking), "name": tracking.name or folder.name, "run_id": run_id, "step": step}
        settings |= {"folder": str(folder.resolve()), "config": without_secrets(asdict(config))}
        self._artifacts = tracking.artifacts
        try:
            with open(folder / LOG, "ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is the trainer's
                )
        except OSError as error:
            self.warn(f"tracking: cannot start ({error}); metrics.jsonl has everything")
            return run_id
        self._put("start", settings)
        self._listener = Thread(target=self._listen, args=(self._child,), daemon=True)
        self._listener.start()
        Thread(target=self._send, args=(self._child,), daemon=True).start()
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of `step`; several calls for one step add up."""
        self._put("log", step, dict(metrics))

    def summary(self, **values: float | str) -> None:
        """Values or texts of the run as a whole, such as its last loss or its sample."""
        self._put("summary", values)

    def rollback(self, step: int, why: str) -> None:
        """The run goes on from `step`, an earlier one: as after a start from there, and with a word on it."""
        self._put("rollback", step, why)

    def artifact(self, folder: Path) -> None:
        """A finished model, sent if `tracking.artifacts` says so; its files must not change until `close`."""
        if self._child is not None and self._artifacts:
            self._put("artifact", str(folder.resolve()))

    def close(self, exit_code: int = 0) -> None:
        """Send what is left and end, within CLOSE_SECONDS (UPLOAD_SECONDS with `tracking.artifacts`)."""
        child, self._child = self._child, None
        if child is None:
            return
        seconds = UPLOAD_SECONDS if self._artifacts else CLOSE_SECONDS
        deadline = time.monotonic() + seconds
        try:
            self._queue.put(("close", exit_code), timeout=seconds)
            child.wait(max(0.0, deadline - time.monotonic()))
        except (Full, subprocess.TimeoutExpired):
            self.warn(f"tracking: not all was sent within {seconds} s; metrics.jsonl has everything")
            self._gave_up = True
            child.kill()
        self._listener.join(1)
        if self.dropped:
            self.warn(f"tracking: {self.dropped} messages were dropped in all")

    def _put(self, *message: Any) -> None:
        if self._child is None or self._child.poll() is not None:
            return
        try:
            self._queue.put_nowait(message)
        except Full:
            self.dropped += 1
            if self.dropped == 1:
                self.warn("tracking: does not keep up, values are dropped; metrics.jsonl has everything")

    def _send(self, child: subprocess.Popen[str]) -> None:
        """Thread: from the queue to the child, until `close` or until the child has gone."""
        assert child.stdin is not None
        kind = ""
        try:
            with child.stdin as pipe:
                while kind != "close":
                    kind, *_ = message = self._queue.get()
                    pipe.write(json.dumps(message, default=str) + "\n")
                    pipe.flush()
        except OSError:  # the child has gone, `_listen` says why
            while kind != "close":
                kind, *_ = self._queue.get()

    def _listen(self, child: subprocess.Popen[str]) -> None:
        """Thread: what the child prints are warnings; so is a death without words."""
        assert child.stdout is not None
        lines = 0
        for line in child.stdout:
            self.warn(f"tracking: {line.strip()}")
            lines += 1
        code = child.wait()
        if code and not lines and not self._gave_up:
            why = "no answer in time" if code == -signal.SIGALRM else f"exit code {code}"
            self.warn(f"tracking: ended ({why}), see {LOG} in the run's folder; training goes on without it")


def without_secrets(tree: Any) -> Any:
    """A copy of a tree of mappings and lists without the values of secret keys and passwords in URLs."""
    if isinstance(tree, Mapping):
        hidden = {key for key, value in tree.items() if value and SECRET.search(str(key))}
        return {k: "***" if k in hidden else without_secrets(value) for k, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_secrets(value) for value in tree]
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", tree) if isinstance(tree, str) else tree


def wandb_mode() -> str:
    """What "auto" means: WANDB_MODE if it is set, else online where W&B would find an API key."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


class Wandb:
    """The child's side of Weights & Biases: one run, resumed when its id exists."""

    def __init__(self, settings: dict[str, Any], say: Callable[[str], None]):
        import wandb

        self.wandb = wandb
        mode = wandb_mode() if settings["mode"] == "auto" else settings["mode"]
        try:
            self.run = self._init(settings, mode)
        except Exception as error:
            if mode != "online":
                raise
            traceback.print_exc()
            say(f"W&B cannot be used ({one_line(error)}); writing offline, `wandb sync` sends it later")
            wandb.teardown()  # its service still holds the id
            self.run = self._init(settings, "offline")

    def _init(self, settings: dict[str, Any], mode: Any) -> Any:
        return self.wandb.init(
            **{key: settings[key] for key in ("project", "entity", "name", "group", "tags", "config")},
            id=settings["run_id"],
            resume="allow",
            allow_val_change=True,
            dir=settings["folder"],
            mode=mode,
            settings=self.wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def summary(self, values: dict[str, float | str]) -> None:
        self.run.summary.update(values)

    def rollback(self, step: int, why: str) -> None:
        """W&B takes no values of steps that it has already: it goes on when the run is past them."""
        self.run.summary.update({"rollback": f"to step {step}: {why}"})

    def artifact(self, folder: str) -> None:
        artifact = self.wandb.Artifact(f"model-{self.run.id}", type="model")
        artifact.add_dir(folder, policy="immutable")  # without a second copy on this disk
        self.run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class TensorBoard:
    """The child's side of TensorBoard: event files in the run's folder."""

    def __init__(self, settings: dict[str, Any], say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        step = settings["step"]
        self.open = partial(SummaryWriter, f"{settings['folder']}/tensorboard")
        self.writer = self.open(purge_step=step + 1 if step else None)  # hides what a resumed run does anew
        self.summary({"config": f"```\n{json.dumps(settings['config'], indent=1)}\n```"})

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def summary(self, values: dict[str, float | str]) -> None:
        for name, value in values.items():
            self.writer.add_text(name, str(value))

    def rollback(self, step: int, why: str) -> None:
        self.writer.close()
        self.writer = self.open(purge_step=step + 1)
        self.writer.add_text("rollback", f"to step {step}: {why}", step)

    def close(self, exit_code: int) -> None:
        self.writer.close()


BACKENDS: dict[str, type[Wandb] | type[TensorBoard]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def messages(lines: Iterable[str]) -> Iterator[list[Any]]:
    """The trainer's messages; a last line without its end is left out: the trainer was killed."""
    return (json.loads(line) for line in lines if line.endswith("\n"))


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def main() -> int:
    """The child: messages from standard input go to the backend until `close` or the input's end.

    An alarm ends it where the backend does not return. Standard output is for the trainer alone.
    """
    warnings = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    try:
        follow(messages(sys.stdin), lambda line: print(line, file=warnings))
    except ImportError as error:
        print(f"{error.name} is not installed (pip install {error.name}); nothing is tracked", file=warnings)
    except Exception as error:
        traceback.print_exc()
        print(f"{one_line(error)}; training goes on without it", file=warnings)
    else:
        return 0
    return 1


def follow(stream: Iterator[list[Any]], say: Callable[[str], None]) -> None:
    """Do what the messages of `stream` say; without a `close` the run counts as failed."""
    exit_code = 1
    _, settings = next(stream)
    signal.alarm(START_SECONDS)
    backend = BACKENDS[settings["backend"]](settings, say)
    signal.alarm(0)
    try:
        for kind, *values in stream:
            if kind == "close":
                (exit_code,) = values
                break
            getattr(backend, kind)(*values)
    finally:
        signal.alarm(UPLOAD_SECONDS if settings["artifacts"] else CLOSE_SECONDS)
        backend.close(exit_code)


if __name__ == "__main__":
    sys.exit(main())
