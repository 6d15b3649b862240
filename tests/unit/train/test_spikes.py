"""What is noticed as a spike and what is not, on curves whose spikes are known; the file of spikes."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import ConfigError
from train.spikes import (
    FILE,
    Point,
    Spike,
    SpikesConfig,
    find_spike,
    keep_spikes,
    read_spikes,
    trend,
    write_spikes,
)

CONFIG = SpikesConfig()


def curve(steps: int, seed: int, drift: float = 0.0, noise: float = 0.03) -> list[Point]:
    """A run: a loss that falls ever more slowly, with `drift` a step on top, and norms with a heavy tail."""
    draw = random.Random(seed)
    return [
        Point(
            step,
            2.5 + 5 * math.exp(-step / 200) + drift * step + noise * draw.gauss(0, 1),
            0.3 * math.exp(0.25 * draw.gauss(0, 1) * (1 if draw.random() < 0.98 else 2) + 20 * drift * step),
            4 * step,
        )
        for step in range(1, steps + 1)
    ]


def spikes(points: list[Point], since: int = 0, config: SpikesConfig = CONFIG) -> list[tuple[int, int]]:
    """(noticed, began) of all spikes of a curve, point by point as a run sees them, without cool-down."""
    found = []
    for end in range(1, len(points) + 1):
        kept = points[max(0, end - config.window - config.lookback - 1) : end]
        if spike := find_spike(kept, config, since if end > since else 0, 0):
            found.append((end, spike[0]))
    return found


@pytest.mark.parametrize("drift", [0.0, 0.002, -0.002])
def test_noise_and_slow_trends_are_no_spikes(drift: float) -> None:
    assert [spikes(curve(1500, seed, drift)) for seed in range(3)] == [[]] * 3


def test_a_trend_is_needed_to_tell() -> None:
    """A rising norm is far above the level of the steps before it, and where it was to be expected."""
    rising = [0.1 * i + 0.01 * random.Random(i).gauss(0, 1) for i in range(50)]
    expected, deviation = trend(rising)
    assert expected == pytest.approx(5.0, abs=0.03) and deviation < 0.02
    falling = [3 * math.exp(-i / 10) for i in range(50)]  # the line would be below zero
    assert trend(falling)[0] > 0


@pytest.mark.parametrize(("rise", "norm"), [(0.7, 1.0), (0.0, 100.0)])
def test_a_single_spike_is_noticed_once(rise: float, norm: float) -> None:
    points = curve(400, 0)
    at = points[299]
    points[299] = replace(at, loss=at.loss + rise, norm=at.norm * norm)
    assert spikes(points) == [(300, 300)]


def test_a_spike_begins_where_it_was_half_as_high() -> None:
    """The norm rises over some steps until the loss follows; the step before is as ever."""
    points = curve(400, 1)
    for step, height in ((297, 8.0), (298, 8.5), (299, 9.0)):
        points[step - 1] = replace(points[step - 1], norm=0.3 * math.exp(0.25 * height))
    points[299] = replace(points[299], loss=points[299].loss + 1)
    found = spikes(points)
    assert found[0] == (300, 297)
    near = replace(CONFIG, lookback=2)
    assert spikes(points, config=near)[0] == (300, 298)


def test_nothing_is_judged_after_the_start_and_after_a_switch() -> None:
    """A switch raises loss and norm for good; the trend is then one of the new phase alone."""
    points = curve(700, 2)
    points[300:] = [replace(p, loss=p.loss + 1, norm=p.norm * 10) for p in points[300:]]
    assert spikes(points)[0][0] == 301
    assert spikes(points, since=300) == []
    for step, noticed in ((60, False), (101, True), (400, False), (401, True)):
        high = [*points]
        high[step - 1] = replace(high[step - 1], loss=20.0)
        assert (spikes(high, since=300) != []) == noticed
    onset = [*points]  # half as high before anything is judged: no step of the warm-up is an onset
    onset[399:401] = [replace(point, loss=20.0) for point in points[399:401]]
    assert spikes(onset, since=300)[0] == (401, 401)


def test_a_cool_down_is_quiet_but_for_nan() -> None:
    points = curve(300, 3)
    points[-1] = replace(points[-1], loss=20.0)
    assert find_spike(points, CONFIG, 0, quiet_until=299) is not None
    assert find_spike(points, CONFIG, 0, quiet_until=300) is None
    points[-1] = replace(points[-1], loss=math.nan)
    found = find_spike(points, CONFIG, 0, quiet_until=300, finite=False)
    assert found and found[0] == 300 and "not finite" in found[1]


def test_nan_is_noticed_in_the_first_step() -> None:
    assert find_spike([Point(1, math.nan, 1.0, 4)], CONFIG, 0, 0, finite=False) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"on_nan": "record"}, "spikes.on_nan"),
        ({"on_spike": "stop"}, "spikes.on_spike"),
        ({"threshold": 0.0}, "spikes.threshold"),
        ({"window": 8}, "spikes.window"),
        ({"warmup": 49}, "spikes.window = 50 or more"),
        ({"ahead": 0}, "spikes.ahead"),
        ({"hold": -1}, "spikes.hold"),
    ],
)
def test_wrong_values_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpikesConfig(**changes)


def test_spikes_are_kept_as_they_were(tmp_path: Path) -> None:
    """What the run went back for stays whatever it goes on from; what it will notice anew does not."""
    went_back = Spike(12, 11, "NaN", "skip", (41, 48), back_to=8)
    seen = Spike(10, 9, "high", "record", (33, 40))
    later = Spike(20, 20, "high", "record", (77, 80))
    assert read_spikes(tmp_path) == []
    write_spikes(tmp_path, [seen, went_back, later])
    assert read_spikes(tmp_path) == [seen, went_back, later]
    keep_spikes(tmp_path, 20)
    assert read_spikes(tmp_path) == [seen, went_back, later]
    keep_spikes(tmp_path, 4)
    assert read_spikes(tmp_path) == [seen, went_back]
    keep_spikes(tmp_path, -1)
    assert read_spikes(tmp_path) == []
    (tmp_path / FILE).write_text('{"step": 3}\n')
    with pytest.raises(ConfigError, match="is not as it was written"):
        read_spikes(tmp_path)
