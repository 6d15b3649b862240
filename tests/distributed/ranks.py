"""Run a function of a test module in several processes that form a gloo (or NCCL) group."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds that ranks may take
GPU = pytest.mark.gpu
DEVICES = ("cpu", pytest.param("cuda", marks=GPU))
forks = get_context("forkserver")
forks.set_forkserver_preload(["deepspeed", "torch._dynamo", "train.zero", "train.opening"])


def spawn(
    world: int, module: str, function: str, *arguments: str, folder: Path, device: str = "cpu"
) -> list[str]:
    """Outputs of `module.function(ranks, *arguments)` on every rank; fails if any of them does.

    Ranks meet through a file in `folder`, so that tests that run at once need no ports. On a CPU they are
    forks of a process that has imported what takes seconds to import. On GPUs, over NCCL, each has one of
    its own; the test is skipped where there are fewer.
    """
    if device == "cuda" and world > (found := _gpus()):
        pytest.skip(f"needs {world} GPUs, there are {found}")
    place = f"{function}-{world}-{len(list(folder.iterdir()))}"
    environment = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "RENDEZVOUS": str(folder / f"rendezvous-{place}"),
    }
    start = _fork if device == "cpu" else _begin
    job = module, function, device, *arguments
    logs = [folder / f"output-{place}-{rank}.txt" for rank in range(world)]
    waits = [
        start({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log, job)
        for rank, log in enumerate(logs)
    ]
    codes = [wait() for wait in waits]
    outputs = [log.read_text(errors="replace") for log in logs]
    failed = [out for code, out in zip(codes, outputs, strict=True) if code != 0]
    failed.sort(key=lambda out: "Connection closed" in out or "Connection reset" in out)  # these follow
    assert not failed, failed[0][-3000:]
    return outputs


def fork(function: Callable[..., None], *arguments: Any, daemon: bool = True) -> BaseProcess:
    """`function` in a fork of a process that has imported what takes seconds to import."""
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}):
        forkserver.ensure_running()  # and imports, the first time
    process = forks.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def _fork(environment: dict[str, str], log: Path, job: tuple[str, ...]) -> Callable[[], int | None]:
    process = fork(_forked, environment, log, job)

    def wait() -> int | None:
        process.join(TIMEOUT)
        process.kill()  # if it is still there
        return process.exitcode

    return wait


def _forked(environment: dict[str, str], log: Path, job: tuple[str, ...]) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(job)
    sys.stdout.flush()


def _begin(environment: dict[str, str], log: Path, job: tuple[str, ...]) -> Callable[[], int | None]:
    """A process of its own: CUDA does not survive a fork."""
    environment = {**os.environ, **environment, "PYTHONPATH": _path()}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks", *job],
            env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return lambda: process.wait(TIMEOUT)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def main(job: tuple[str, ...]) -> None:
    """Call a function as one of the ranks: module, function, device, arguments."""
    import torch.distributed as dist

    module, function, device, *arguments = job
    try:
        getattr(importlib.import_module(module), function)(joined(device), *arguments)
    finally:
        if dist.is_initialized():  # gloo's threads, left running, abort the process now and then
            dist.destroy_process_group()


def joined(device: str) -> Any:
    """This process's Ranks; on GPUs each has one of its own."""
    import torch.distributed as dist

    from train.ranks import join

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=rank,
        world_size=world,
    )
    return join(device)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
