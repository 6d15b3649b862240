"""What several ranks must hold alike, to the bit, compared by 64-bit hashes: memory, GPUs and networks fail
silently, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ConfigError
from train.ranks import Ranks

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # words at a time, 8 MB as int64


class Replica(NamedTuple):
    """A tensor that every rank of `group` has."""

    name: str
    tensor: Tensor
    group: Any


@torch.no_grad()
def fingerprint(x: Tensor) -> Tensor:
    """64 bits of x's bytes and their order, int64 [] on its device: the sum of its words, each times an odd
    number of its place, modulo 2^64.

    A flipped bit changes that by ±2^b times an odd number, never by 0; two flipped bits cannot cancel in
    less than 2^31 words of 32 bits.
    """
    words = x.contiguous().view(-1).view(WORDS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        total += (part * torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=x.device)).sum()
    return total


def compare(replicas: Iterable[Replica], ranks: Ranks, step: int) -> None:
    """Raise ConfigError on all ranks when a tensor is not the same everywhere, naming the first such one and
    the ranks that differ from most."""
    by_group: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor, group in replicas:
        by_group[group][name] = fingerprint(tensor).to(ranks.device)
    found = [line for group, prints in by_group.items() if (line := _difference(prints, group))]

    def judge() -> None:
        if found:
            remedy = "memory or network fails; check these hosts, then go on with resume=auto"
            raise ConfigError(f"step {step}: {found[0]}: {remedy}")

    ranks.together(judge)


def _difference(prints: dict[str, Tensor], group: Any) -> str:
    """The first tensor that is not the same on all ranks of the group, and on which; "" where all are."""
    mine = torch.stack(list(prints.values()))  # [tensors]
    least = torch.stack([mine, ~mine])  # ~x falls as x grows
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    differing = (least[0] != ~least[1]).nonzero()
    if not len(differing):
        return ""
    first = int(differing[0])
    every = [torch.empty_like(mine[first]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine[first], group)
    return f"{list(prints)[first]} {_sides(dict(zip(dist.get_process_group_ranks(group), map(int, every))))}"


def _sides(value_of: dict[int, int]) -> str:
    """Such as "is not the same on rank 3 as on ranks 0, 1, 2"."""
    sides: dict[int, list[int]] = defaultdict(list)
    for rank, value in value_of.items():
        sides[value].append(rank)
    *others, most = sorted(sides.values(), key=len)
    return f"is not the same on {_named([rank for side in others for rank in side])} as on {_named(most)}"


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:4]))}{more}"
