"""Losses and right predictions of single tokens, added up by groups of tokens.

Legend: B batch, L tokens of a sequence held here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.loss import TokenScores

SHORTEST = 64  # positions of the first group
STARTS = (0, *(SHORTEST << i for i in range(16)))  # the last group has no end
POSITIONS = tuple(f"at_{start}" for start in STARTS)


class Tally:
    """Sums over tokens in groups of these names: `totals` [3, groups] fp64 of the loss in nats, of right
    predictions and of tokens. Totals of ranks and batches add up."""

    def __init__(self, groups: Sequence[str], device: torch.device):
        self.groups = tuple(groups)
        self.totals = torch.zeros(3, len(self.groups), dtype=torch.float64, device=device)

    def add(self, scores: TokenScores, group: Tensor) -> None:
        """Scores [B, L] of tokens, each in the group of this number [B, L]; a number outside counts nowhere.

        A sum for each group instead of a scatter: the same bits every time, on GPUs too.
        """
        loss = scores.loss.double()
        for number in range(len(self.groups)):
            here = scores.counted & (group == number)
            sums = torch.where(here, loss, 0.0).sum(), (scores.correct & here).sum(), here.sum()
            self.totals[:, number] += torch.stack([x.double() for x in sums])

    def losses(self) -> dict[str, float]:
        """Mean loss in nats of the tokens in every group that has any."""
        rows = zip(self.groups, *self.totals[[0, 2]].tolist(), strict=True)
        return {group: loss / count for group, loss, count in rows if count}

    def accuracy(self, groups: Sequence[str] | None = None) -> float | None:
        """Share of right predictions over these groups, by default all; None without tokens."""
        chosen = [i for i, group in enumerate(self.groups) if groups is None or group in groups]
        right, count = self.totals[1:, chosen].sum(1).tolist()
        return right / count if count else None


def position_group(positions: Tensor) -> Tensor:
    """The group of POSITIONS that each position within a document lies in: 0 to 63, 64 to 127, and so on."""
    borders = torch.tensor(STARTS[1:], device=positions.device)
    return torch.bucketize(positions.contiguous(), borders, right=True)
