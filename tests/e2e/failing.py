"""`python -m tests.e2e.failing WHAT KEY=VALUE ...`: `python -m train`; rank 1 fails in its third step."""

from __future__ import annotations

import itertools
import os
import runpy
import sys
import time
from typing import Any

from train import loop


def fail(what: str) -> None:
    """Raise an error, or loop for ever."""
    if what == "raise":
        raise ValueError("a bug")
    while True:
        time.sleep(0)


def main() -> None:
    what = sys.argv.pop(1)
    whole_step, calls = loop.train_step, itertools.count()

    def train_step(*arguments: Any) -> dict[str, float]:
        if next(calls) == 2 and os.environ["RANK"] == "1":
            fail(what)
        return whole_step(*arguments)

    loop.train_step = train_step  # type: ignore[assignment]
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
