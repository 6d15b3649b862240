"""What a step does with what its parts raise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from configs.compose import compose
from data.shards import Damaged
from train.loop import advance
from train.ranks import Ranks
from train.watch import FailedHere


def test_damage_is_said_by_the_rank_that_reads_it() -> None:
    """The others do not know of it: a plain ConfigError is said by rank 0 alone."""

    def batch() -> None:
        raise Damaged("a.arrow: document 3 is damaged")

    run = SimpleNamespace(
        config=compose([]),
        step=0,
        ranks=Ranks(0, 1, torch.device("cpu")),
        data=SimpleNamespace(train=SimpleNamespace(batch=batch)),
    )
    with pytest.raises(FailedHere, match="document 3 is damaged"):
        advance(run)  # type: ignore[arg-type]
