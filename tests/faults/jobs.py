"""Starts training as `python -m train` and `torchrun -m train` do, in forks of a process with all imports.

torchrun is the real one (`elastic_launch`), but its workers are forks, too. What no fault touches is left
out: the configuration is composed once a run, memory is hardly predicted, and no curves are plotted.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import deepspeed  # noqa: F401  imported here once, it takes seconds
import torch._dynamo  # noqa: F401  the optimizers', later
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.faults.inject import replace
from train import memory, run

PATIENCE = 120  # seconds of a job


class Ended(NamedTuple):
    """How a job ended: its exit code, negative for a signal, and what all its processes printed."""

    code: int
    output: str


def launch(argv: list[str], ranks: int, max_restarts: int | None, setup: Callable[[], object]) -> Ended:
    """Run `python -m train ARGV` to its end, under torchrun unless `max_restarts` is None.

    Every rank calls `setup` first.
    """
    reading, writing = os.pipe()  # not a file, whose size RLIMIT_FSIZE would limit, too
    pid = os.fork()
    if not pid:
        os.setsid()  # to be killed as a whole
        for stream in (1, 2):
            os.dup2(writing, stream)
        code = 1
        try:
            code = rank(argv, setup) if max_restarts is None else torchrun(argv, ranks, max_restarts, setup)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    output = b""
    for text in _read(reading, pid):
        output += text
    os.close(reading)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace"))


def _read(pipe: int, pid: int) -> Iterator[bytes]:
    """What comes until all writers have gone; they are killed when they take too long."""
    until = time.monotonic() + PATIENCE
    while True:
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            os.killpg(pid, signal.SIGKILL)
            until = time.monotonic() + PATIENCE
        elif text := os.read(pipe, 2**16):
            yield text
        else:
            return


def torchrun(argv: list[str], ranks: int, max_restarts: int, setup: Callable[[], object]) -> int:
    """Its agent, in this process; the exit code."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, _worker)(argv, setup)
    except SignalException as told:
        return 128 + told.sigval
    except ChildFailedError:
        return 1
    return 0


def _worker(argv: list[str], setup: Callable[[], object]) -> None:
    if code := rank(argv, setup):
        os._exit(code)
    threading.Timer(1, os._exit, [0]).start()  # a torchrun that was told to end does not fetch the result


def rank(argv: list[str], setup: Callable[[], object]) -> int:
    """One process of `python -m train`; its exit code."""
    nothing = lambda *_: 0  # noqa: E731
    replace((memory, "_activations", nothing), (memory, "_scratch", nothing), (run, "plot_run", nothing))
    setup()
    warnings.simplefilter("ignore")
    sys.argv = ["train", *argv]
    try:
        runpy.run_module("train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
