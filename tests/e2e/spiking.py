"""`python -m tests.e2e.spiking WHAT STEP KEY=VALUE ...`: `python -m train` with a spike in one step.

routing   labels are shuffled and gradients large, unless the routing was anticipated
nan       the gradient is not a number, once
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from train import loop, recovery

Step = Callable[..., dict[str, float]]


def disturbed(whole_step: Step, what: str, spiking: int, killed: int = 0) -> Step:
    """`loop.train_step` with a spike in one step."""
    seen: Counter[int] = Counter()

    def train_step(engine, batch, config, step, ranks, timer=None, routing=()):  # type: ignore[no-untyped-def]
        seen[step + 1] += 1
        if step + 1 == killed and routing:
            os.kill(os.getpid(), signal.SIGKILL)
        if step + 1 != spiking or (what == "routing" and routing) or (what == "nan" and seen[spiking] > 1):
            return whole_step(engine, batch, config, step, ranks, timer, routing)
        backward = engine.backward
        factor = float("nan") if what == "nan" else 1000.0
        engine.backward = lambda loss, last: backward(loss * factor, last)
        try:
            shuffled = {**batch, "labels": batch["labels"].roll(7, 1)} if what == "routing" else batch
            return whole_step(engine, shuffled, config, step, ranks, timer, routing)
        finally:
            del engine.backward

    return train_step


def set_up(spiking: int, killed: str = "", what: str = "routing") -> None:
    """Have this process's run spike. It is killed when the spike is on record and nothing is undone yet
    ("record"), or before the step of that number, once its routing is anticipated."""
    step = int(killed) if killed.isdigit() else 0
    loop.train_step = disturbed(loop.train_step, what, spiking, step)  # type: ignore[assignment]
    if killed == "record":
        write = recovery.write_spikes

        def write_and_die(*arguments: Any) -> None:
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        recovery.write_spikes = write_and_die  # type: ignore[assignment]


def main() -> None:
    what, step = sys.argv.pop(1), sys.argv.pop(1)
    set_up(int(step), what=what)
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
