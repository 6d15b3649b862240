"""Run a function of a test module in several processes that form a gloo group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def spawn(
    world: int, module: str, function: str, *arguments: str, folder: Path, device: str = "cpu"
) -> list[str]:
    """Outputs of `module.function(ranks, *arguments)` on every rank; fails if any of them does.

    Ranks meet through a file in `folder`, so that tests that run at once need no ports.
    """
    code = (
        "import sys, importlib\n"
        "from tests.distributed.ranks import joined\n"
        f"getattr(importlib.import_module({module!r}), {function!r})(joined({device!r}), *sys.argv[1:])\n"
    )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment["RENDEZVOUS"] = str(folder / f"rendezvous-{function}-{world}-{len(list(folder.iterdir()))}")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    failed = [out for process, out in zip(processes, outputs, strict=True) if process.returncode]
    failed.sort(key=lambda out: "Connection closed" in out or "Connection reset" in out)  # these follow
    assert not failed, failed[0][-3000:]
    return outputs


def joined(device: str):
    """This process's Ranks, until it ends; on GPUs each has one of its own."""
    import atexit

    import torch.distributed as dist

    from train.ranks import join

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    atexit.register(
        dist.destroy_process_group
    )  # gloo's threads, left running, abort the process now and then
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=rank,
        world_size=world,
    )
    return join(device)
