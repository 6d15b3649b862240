"""Signals that end a run after the step at hand, and what ends it if that takes too long.

SIGINT             Ctrl-C; one more, seconds later, interrupts at once, as usual
SIGTERM, SIGUSR1   what schedulers and torchrun send a while before they kill: the run is to be saved within
                   `train.stop_seconds`
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from train.watch import leave, speak

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN = 2  # seconds: under torchrun every Ctrl-C comes twice, from the terminal and from torchrun


class Stop:
    """Notes these signals while it is entered: in the middle of a step weights may be half updated.

    `seconds` after SIGTERM or SIGUSR1 one line says that it took too long and which checkpoint is the
    `newest`, and the process ends, whatever its main thread does.
    """

    def __init__(self, seconds: float, newest: Callable[[], Path | None]):
        self._seconds, self._newest = seconds, newest
        self._told: list[tuple[signal.Signals, float]] = []  # and when
        self._late, self._left = threading.Event(), threading.Event()

    @property
    def asked(self) -> bool:
        return bool(self._told)

    @property
    def interrupted(self) -> bool:
        """By a person."""
        return any(number == signal.SIGINT for number, _ in self._told)

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._tell) for number in SIGNALS}
        self._thread = threading.Thread(target=self._count_down, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._left.set()
        self._late.set()
        self._thread.join()  # who refers to the run last frees its tensors, which must not be at exit

    def _tell(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._told and now - self._told[0][1] > AGAIN:
            raise KeyboardInterrupt
        counting = any(told != signal.SIGINT for told, _ in self._told)
        self._told.append((signal.Signals(number), now))
        if number != signal.SIGINT and not counting:  # a handler within another's `set` would wait for ever
            self._late.set()

    def _count_down(self) -> None:
        self._late.wait()
        if self._left.wait(self._seconds):
            return
        names = ", ".join(number.name for number, _ in self._told)
        newest = self._newest()
        remains = f"{newest} remains, go on with resume=auto" if newest else "there is no checkpoint yet"
        line = f"{names}: the step was not saved within {self._seconds} s (train.stop_seconds); {remains}"
        speak(ConfigError(line), line)
        leave()
