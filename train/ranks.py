"""The processes of a run: who they are, how they add up, and how they fail together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ConfigError

Result = TypeVar("Result")


class FailedHere(ConfigError):
    """Of all ranks, this one says why they fail."""


class FailedElsewhere(ConfigError):
    """Another rank says why."""


@dataclass(frozen=True)
class Ranks:
    """One process of `world`. `files`: a gloo group of its own for a background thread's collectives."""

    rank: int
    world: int
    device: torch.device
    files: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, in place; every rank has the same."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))))

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def together(self, work: Callable[[], Result], only_first: bool = False) -> Result:
        """Do `work` (on rank 0 alone if `only_first`), and fail on every rank if one failed.

        After a ConfigError or OSError the first failing rank raises FailedHere, the others FailedElsewhere.
        Where a rank has not done the work the result is None.
        """
        result, error = cast(Result, None), None
        try:
            if self.first or not only_first:
                result = work()
        except (ConfigError, OSError) as caught:
            error = caught
        failed = [error is not None]
        if self.world > 1:
            failed = [False] * self.world
            dist.all_gather_object(failed, error is not None)
        if True in failed:
            if error is None or failed.index(True) != self.rank:
                raise FailedElsewhere("another rank has failed")
            raise FailedHere(str(error)) from error
        return result


def join(wanted: str) -> Ranks:
    """Join the process group that torchrun describes, or make one of this process alone.

    `wanted`: "auto", "cpu" or "cuda" (`train.device`). Raises ConfigError where CUDA is wanted and missing.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is cuda, but torch sees no GPU here; use train.device=cpu or install a CUDA torch"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: local rank {local} has no GPU of its own, there are {torch.cuda.device_count()};"
                " lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        atexit.register(dist.destroy_process_group)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10)
        )
    return Ranks(rank, world, device, dist.new_group(backend="gloo"))
