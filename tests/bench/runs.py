"""Several training runs, some at a time, spread over the GPUs that there are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch

FINISHED = "curves.png"  # the last thing that a run writes


def run_all(folder: Path, runs: Mapping[str, list[str]], jobs: int) -> None:
    """`python -m train` with the keys of every name into folder/name, `jobs` at a time, its output into
    folder/name.log. What is finished there is not trained again, what is not goes on. Raises
    CalledProcessError when one of them fails, after those that have begun."""
    folder.mkdir(parents=True, exist_ok=True)
    places: Queue[dict[str, str]] = Queue()
    for place in _places(jobs):
        places.put(place)

    def run(name: str) -> None:
        place = places.get()
        try:
            _train(folder, name, runs[name], place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, runs))


def _places(jobs: int) -> list[dict[str, str]]:
    """What of the environment gives each job its GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if not visible:
        return [{}] * jobs
    gpus = visible.split(",")
    return [{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]


def _train(folder: Path, name: str, keys: list[str], place: dict[str, str]) -> None:
    if (folder / name / FINISHED).exists():
        return
    own = [f"run.dir={folder}", f"run.name={name}", "resume=auto", "train.sample_tokens=0"]
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "train", *keys, *own]
        subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | place)
