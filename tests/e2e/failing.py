"""`python -m tests.e2e.failing WHAT KEY=VALUE ...`: `python -m train`, but rank 1 fails in its third step."""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from train import loop
from train.ranks import Ranks


def fail(what: str, ranks: Ranks) -> None:
    """Raise an error, loop for ever, or enter a collective that others never enter."""
    if what == "raise":
        raise ValueError("a bug")
    if what == "alone":
        ranks.share(None)
    while True:
        time.sleep(0)


def main() -> None:
    what = sys.argv.pop(1)
    whole_step = loop.train_step

    def train_step(engine: Any, batch: Any, config: Any, step: int, ranks: Ranks, *others: Any) -> Any:
        if step == 2 and ranks.rank == 1:
            fail(what, ranks)
        return whole_step(engine, batch, config, step, ranks, *others)

    loop.train_step = train_step  # type: ignore[assignment]
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
