"""python -m tests.e2e.faulty …: `python -m train`, whose rank 1 meets a bug in its third step."""

from __future__ import annotations

import os
import sys
from typing import Any

from train import __main__, loop

train_step = loop.train_step


def faulty_step(*arguments: Any) -> dict[str, float]:
    if os.environ["RANK"] == "1" and arguments[3] == 2:
        raise ValueError("a bug")
    return train_step(*arguments)


loop.train_step = faulty_step  # type: ignore[assignment]
code = __main__.main(sys.argv[1:])
if code:
    os._exit(code)
