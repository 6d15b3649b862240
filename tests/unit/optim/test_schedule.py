from __future__ import annotations

import math
from itertools import pairwise

import pytest

from configs.errors import ConfigError
from optim.config import OptimConfig
from optim.schedule import decay_start, lr_at, set_lr

CONFIG = OptimConfig(lr=2.0, final_lr_ratio=0.1, warmup_steps=10, decay_fraction=0.4)


def test_joints_are_exact() -> None:
    assert decay_start(100, CONFIG) == 60
    expected = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 59: 2.0, 79: 0.2 + 1.8 / 2, 99: 0.2, 100: 0.2, 5000: 0.2}
    for step, lr in expected.items():
        assert lr_at(step, 100, CONFIG) == pytest.approx(lr, rel=1e-15), step
    assert lr_at(9, 100, CONFIG) == lr_at(59, 100, CONFIG) == 2.0


def test_it_rises_then_stays_then_falls_like_a_cosine() -> None:
    lrs = [lr_at(step, 100, CONFIG) for step in range(100)]
    rises = [b - a for a, b in pairwise(lrs)]
    assert all(rise == pytest.approx(0.2) for rise in rises[:9])
    assert all(rise == 0 for rise in rises[9:59])
    assert all(rise < 0 for rise in rises[59:])
    assert rises[59] == pytest.approx(-1.8 * (1 - math.cos(math.pi / 40)) / 2)
    assert min(rises[59:]) == pytest.approx(1.8 / 2 * (math.cos(math.pi * 21 / 40) - math.cos(math.pi / 2)))


@pytest.mark.parametrize("changes", [{"warmup_steps": 0}, {"decay_fraction": 0.0}, {"warmup_steps": 60}])
def test_parts_may_be_absent(changes: dict[str, float]) -> None:
    config = OptimConfig(**{**vars(CONFIG), **changes})
    lrs = [lr_at(step, 100, config) for step in range(100)]
    assert all(0 < lr <= 2.0 for lr in lrs)
    assert max(lrs) == 2.0
    assert lrs[0] == (2.0 if config.warmup_steps == 0 else 2.0 / config.warmup_steps)
    assert lrs[-1] == pytest.approx(2.0 if config.decay_fraction == 0 else 0.2)


def test_without_a_decay_the_rate_stays_after_the_end() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=0, decay_fraction=0.0)
    assert [lr_at(step, 10, config) for step in (9, 10, 11)] == [2.0, 2.0, 2.0]


def test_overlapping_warm_up_and_decay_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps is 10.*step 9 of 15"):
        lr_at(0, 15, CONFIG)


def test_groups_keep_their_own_scale() -> None:
    groups = [{"lr": 1.0, "lr_scale": 1.0}, {"lr": 1.0, "lr_scale": 0.5}]
    set_lr(groups, 3.0)
    assert [group["lr"] for group in groups] == [3.0, 1.5]
