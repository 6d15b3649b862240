"""The ranks of a run as a mesh: who shares experts, sequences and optimizer states with whom.

Ranks that share a sequence (`cp`) are neighbours, and so are those that share the experts (`ep`); both cut
the same row of ranks, so an expert group may span several sequences or be a part of one:

    rank               0  1  2  3  4  5  6  7      (world 8, ep 4, cp 2)
    sequences          [a  a][b  b][c  c][d  d]
    experts            [0  1  2  3][0  1  2  3]    ranks 0 and 4 hold the same experts
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

Group = Any  # a process group, or None for this rank alone


@dataclass(frozen=True)
class Sharing:
    """How masters and moments of a kind of weights are shared out: `size` ranks of `group` hold each a part,
    this one part `rank`; every part is held, and its update repeated, by `holders` ranks, of which this is
    number `holder`."""

    name: str  # "dense" or "experts"
    group: Group
    size: int
    rank: int
    holders: int = 1
    holder: int = 0


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Groups of all ranks are the default one; of one rank they are None, but for
    `replicas` and `zero`.

    ep        ranks that hold one set of experts together
    replicas  ranks that hold the same experts
    cp        ranks that hold one sequence together, in the order of its parts
    zero      ranks that share masters and moments of what is not an expert
    repeats   ranks that hold the same masters and moments
    """

    rank: int = 0
    world: int = 1
    ep_size: int = 1
    cp_size: int = 1
    zero_size: int = 1
    ep: Group = None
    replicas: Group = None
    cp: Group = None
    zero: Group = None
    repeats: Group = None

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def cp_rank(self) -> int:
        return self.rank % self.cp_size

    @property
    def dense(self) -> Sharing:
        """Of all that is not a routed expert."""
        size = self.zero_size
        holder, rank = divmod(self.rank, size)
        return Sharing("dense", self.zero, size, rank, self.world // size, holder)

    @property
    def experts(self) -> Sharing:
        """Of routed experts: among the ranks that hold the same ones."""
        return Sharing("experts", self.replicas, self.world // self.ep_size, self.rank // self.ep_size)

    def first_expert(self, experts: int) -> int:
        """Number of this rank's first expert where the model has so many."""
        return self.ep_rank * (experts // self.ep_size)

    @property
    def data_rank(self) -> int:
        """Which share of a step's sequences this rank takes part in."""
        return self.rank // self.cp_size

    @property
    def data_world(self) -> int:
        return self.world // self.cp_size


def build_mesh(rank: int, world: int, ep: int = 1, cp: int = 1, zero: int | None = None) -> Mesh:
    """The mesh of `world` ranks; makes its process groups, on every rank the same ones in the same order.

    `ep`, `cp` and `zero` (None: all ranks) divide `world`, see `RunConfig.check_ranks`.
    """
    zero_size = zero or world
    alone = None  # DeepSpeed and dense shards want a group of one, too
    if world > 1 and (zero_size == 1 or ep == world):
        alone = dist.new_group([rank], use_local_synchronization=True)
    return Mesh(
        rank,
        world,
        ep,
        cp,
        zero_size,
        ep=_group(rank, _blocks(world, ep), world),
        replicas=_group(rank, _strides(world, ep), world) or alone,
        cp=_group(rank, _blocks(world, cp), world),
        zero=_group(rank, _blocks(world, zero_size), world) or alone,
        repeats=_group(rank, _strides(world, zero_size), world),
    )


def _blocks(world: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world, size)]


def _strides(world: int, size: int) -> list[list[int]]:
    return [list(range(start, world, size)) for start in range(size)]


def _group(rank: int, members: Iterable[list[int]], world: int) -> Group:
    mine = None
    for ranks in members:
        if len(ranks) == world:
            return dist.group.WORLD
        if len(ranks) > 1:
            group = dist.new_group(ranks)
            mine = group if rank in ranks else mine
    return mine
