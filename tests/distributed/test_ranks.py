"""Ranks fail together: one says why, the others know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from tests.distributed.ranks import GPU, spawn
from train.ranks import Ranks
from train.watch import FailedElsewhere, FailedHere

MODULE = "tests.distributed.test_ranks"


def failing(ranks: Ranks) -> None:
    def work() -> int:
        if ranks.rank in (1, 2):
            raise OSError(28, "No space left on device", "file")
        return ranks.rank

    with pytest.raises(FailedHere if ranks.rank == 1 else FailedElsewhere) as error:
        ranks.together(work)
    assert ("No space left" in str(error.value)) == (ranks.rank == 1)
    assert ranks.together(lambda: ranks.rank) == ranks.rank
    assert ranks.together(lambda: "done", only_first=True) == ("done" if ranks.first else None)
    assert ranks.share(f"of {ranks.rank}") == "of 0"
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    for device in ("cpu", ranks.device):
        count = ranks.sum(torch.tensor([1.0, ranks.rank == 1], device=device))
        assert count.tolist() == [ranks.world, 1.0]


@pytest.mark.parametrize(("world", "device"), [(3, "cpu"), pytest.param(2, "cuda", marks=GPU)])
def test_several_ranks(world: int, device: str, tmp_path: Path) -> None:
    spawn(world, MODULE, "failing", folder=tmp_path, device=device)


def test_alone_errors_are_ones_own() -> None:
    alone = Ranks(0, 1, torch.device("cpu"))

    def work() -> None:
        raise ConfigError("why")

    with pytest.raises(FailedHere, match="why"):
        alone.together(work)
    assert alone.share(3) == 3 and alone.any(True) and not alone.any(False)
