"""The processes of a run: who they are, how they add up, and how they fail together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from configs.errors import ConfigError
from train.watch import FailedElsewhere, FailedHere, Job, Watch, this_attempt

LONG = timedelta(days=7)  # while one rank writes or exports; the watch sees if it dies
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """One process of `world`, and the watch over all of them.

    `files`, `words`: gloo groups for a background thread's collectives, and for waiting as long as it takes
    """

    rank: int
    world: int
    device: torch.device
    files: Any = None
    words: Any = None
    watch: Watch = field(default_factory=Watch)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, in place; every rank has the same."""
        if self.world > 1:
            dist.all_reduce(x)
        self.watch.progress()
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))))

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.words, device=torch.device("cpu"))
        self.watch.progress()
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
            dist.all_gather_object(failed, error is not None, group=self.words)
            self.watch.progress()
        if True in failed:
            if error is None or failed.index(True) != self.rank:
                raise FailedElsewhere("another rank has failed")
            raise FailedHere(str(error)) from error
        return result


def join(wanted: str, timeout_seconds: float = 600) -> Ranks:
    """Join the process group that torchrun describes, or make one of this process alone, and watch it.

    `wanted`: "auto", "cpu" or "cuda" (`train.device`). `timeout_seconds`: see `Watch`; collectives give up
    somewhat later. Raises ConfigError where CUDA is wanted and missing.
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
    watch = Watch()
    if not dist.is_initialized():
        atexit.register(dist.destroy_process_group)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=1.5 * timeout_seconds + 60)
        store = dist.HashStore() if world == 1 else this_attempt(_meet(rank, world, timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        watch = Watch(Job.find(), timeout_seconds)
        watch.start()
    files, words = (dist.new_group(backend="gloo", timeout=LONG) for _ in range(2))
    return Ranks(rank, world, device, files, words, watch)


def _meet(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """The store that torchrun's environment describes; torch would find the addresses of dead ranks in it."""
    store = next(rendezvous("env://", rank, world, timeout=timeout))[0]
    store.set_timeout(timeout)
    return store
