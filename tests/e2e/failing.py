"""A run whose rank 1 fails in its third step."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

from train import loop


def fail(what: str) -> None:
    """Raise an error, loop for ever, or get a signal."""
    if what == "raise":
        raise ValueError("a bug")
    if what in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[what])
    while True:
        time.sleep(0)


def set_up(what: str) -> None:
    """Have it happen in this process, if that is rank 1."""
    whole_step, calls = loop.train_step, itertools.count()

    def train_step(*arguments: Any) -> dict[str, float]:
        if next(calls) == 2 and os.environ["RANK"] == "1":
            fail(what)
        return whole_step(*arguments)

    loop.train_step = train_step  # type: ignore[assignment]
