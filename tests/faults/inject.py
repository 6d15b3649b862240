"""Faults inside a rank's process: hooks around the trainer's functions, set up here alone.

Places, in a step: `step` (its beginning), `backward`, `update`; in a save: `write` (of a tensor), `publish`
(before the rename), `published` (before older checkpoints go); when a run goes on: `load` (of its tensors);
after its last step: `finish`.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.tensorfile import TensorFile
from tests.faults.plan import Fault
from train import checkpoint, loop, run, saving
from train.engine import Engine
from train.zero import ZeroEngine

LASTING = {"kill-moment", "term", "full"}  # they end this process some steps later


class Injector:
    """What is still to happen in this process. A fault leaves a mark in `marks`: it happens once a run."""

    def __init__(self, faults: tuple[Fault, ...], marks: Path, folder: Path, alone: bool):
        rank = int(os.environ.get("RANK", 0))
        mine = [fault for fault in faults if fault.rank == rank and not mark_of(fault, marks).exists()]
        self._pending, self._faults = {fault: fault.skip for fault in mine}, faults
        self._over = [fault for fault in faults if mark_of(fault, marks).exists()]
        self._marks, self._checkpoints, self._alone = marks, folder / "checkpoints", alone
        self._step = 0
        self._engine: Engine | None = None
        self._saver: saving.Saver | None = None

    def install(self) -> None:
        """Set the hooks."""
        whole_step, whole_backward, made = loop.train_step, ZeroEngine.backward, saving.Saver.__init__

        def train_step(engine: Engine, batch: Any, config: Any, step: int, *rest: Any) -> dict[str, float]:
            self._step, self._engine = step + 1, engine
            self._pass("step")
            return whole_step(engine, batch, config, step, *rest)

        def backward(engine: ZeroEngine, loss: torch.Tensor, last: bool = True) -> None:
            whole_backward(engine, loss * float("nan") if self._pass("backward") else loss, last)

        def make(saver: saving.Saver, *arguments: Any) -> None:
            made(saver, *arguments)
            self._saver = saver

        replace((loop, "train_step", train_step), (ZeroEngine, "backward", backward))
        replace((saving.Saver, "__init__", make))
        for owner, name, place in (
            (ZeroEngine, "_update", "update"),
            (TensorFile, "write_parts", "write"),
            (saving, "_publish", "publish"),
            (saving, "_prune", "published"),
            (checkpoint, "load", "load"),
            (run.Run, "finish", "finish"),
        ):
            replace((owner, name, self._passing(place, getattr(owner, name))))

    def _passing(self, place: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self._pass(place)
            return whole(*arguments, **options)

        return wrapped

    def _pass(self, place: str) -> bool:
        """Have happen what is due at this place; whether the loss is to be NaN."""
        fault = next((f for f in self._pending if f.place == place and self._due(f)), None)
        if fault is None:
            return False
        if self._pending[fault] > 0:
            self._pending[fault] -= 1
            return False
        del self._pending[fault]
        mark = mark_of(fault, self._marks)
        draft = mark.with_name(f"{mark.name}.draft")
        draft.write_text(str(self._step))
        draft.replace(mark)  # another rank reads it as soon as it is there
        getattr(self, f"_{fault.kind.replace('-', '_')}")(fault)
        return fault.kind == "nan"

    def _due(self, fault: Fault) -> bool:
        """One fault after the other, so that each can be told from the others."""
        earlier = self._faults[: fault.number]
        before = [mark_of(other, self._marks) for other in earlier]
        if not all(mark.exists() for mark in before):
            return False
        if any(other.kind in LASTING and other not in self._over for other in earlier):
            return False
        if fault.place != "load" and self._step < max(
            [fault.step, *(int(m.read_text()) + 1 for m in before)]
        ):
            return False
        return fault.kind not in ("torn", "flip") or self._older_exists()

    def _older_exists(self) -> bool:
        """A checkpoint to go back to when the newest is damaged."""
        if pending := self._saver and self._saver._pending:
            pending.exception()  # waits until it is on disk
        return len(checkpoint.all_steps(self._checkpoints)) > 1

    def _kill(self, _: Fault) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def _kill_all(self, _: Fault) -> None:
        os.killpg(0, signal.SIGKILL)

    def _kill_moment(self, fault: Fault) -> None:
        threading.Timer(fault.dice / 2**33, self._kill_all, [fault]).start()

    def _term(self, _: Fault) -> None:
        os.kill(os.getpid() if self._alone else os.getppid(), signal.SIGTERM)

    def _usr1(self, _: Fault) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def _freeze(self, _: Fault) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _nan(self, _: Fault) -> None:
        """See `install`."""

    def _torn(self, fault: Fault) -> None:
        path, dice = self._file(fault)
        if dice.random() < 0.25:
            path.unlink()
        else:
            os.truncate(path, dice.randrange(path.stat().st_size))
        self._kill_all(fault)

    def _flip(self, fault: Fault) -> None:
        path, dice = self._file(fault)
        data = bytearray(path.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        self._kill_all(fault)

    def _file(self, fault: Fault) -> tuple[Path, random.Random]:
        dice = random.Random(fault.dice)
        return dice.choice(sorted(checkpoint.all_steps(self._checkpoints)[-1].iterdir())), dice

    def _replica(self, fault: Fault) -> None:
        dice = random.Random(fault.dice)
        assert self._engine is not None
        floats = [replica.tensor for replica in self._engine.replicas() if replica.tensor.is_floating_point()]
        bits = dice.choice(floats).detach().view(-1).view(torch.int32)
        bits[dice.randrange(len(bits))] ^= 1 << dice.randrange(31)

    def _full(self, fault: Fault) -> None:
        """The logs are the first to fail, or they still fit and the checkpoint is."""
        size = fault.dice % 2 * 2**16
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def replace(*changes: tuple[Any, str, Any]) -> None:
    """Set attributes of modules and classes: (owner, name, value)."""
    for owner, name, value in changes:
        setattr(owner, name, value)


def mark_of(fault: Fault, marks: Path) -> Path:
    """The file that says that it has happened."""
    return marks / f"{fault.number}-{fault.kind}"


def forget_biases() -> None:
    """A bug, to see that it is found: checkpoints no longer bring the routers' biases back."""
    whole = ZeroEngine.state_to_load

    def state_to_load(engine: ZeroEngine, shapes: Any) -> dict[str, torch.Tensor]:
        found = whole(engine, shapes)
        return {key: x for key, x in found.items() if "e_score_correction_bias" not in key}

    replace((ZeroEngine, "state_to_load", state_to_load))
