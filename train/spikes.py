"""Spikes of the loss and of the gradient norm: when one is noticed, where it began, and what is recorded.

All of it is computed from the lines of `metrics.jsonl` and of `spikes.jsonl`: no state of its own that a
checkpoint would have to keep, and the same on every rank. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from configs.errors import ConfigError
from data.files import sealed

FILE = "spikes.jsonl"
ROLLBACKS = ("replay", "skip", "anticipate")
LEAST = 1e-3  # of a deviation: nats, or a thousandth of the norm


@dataclass(frozen=True)
class SpikesConfig:
    """What counts as a spike, and what is done about it; lengths are in steps.

    on_nan     a loss or gradient norm that is not finite: "stop" the run, or go back to the newest checkpoint
               before it and "replay" the same, "skip" the data, or "anticipate" the routing
    on_spike   one far above its trend: the same, or "record" it and go on
    threshold  deviations above the trend, as normal noise has them, from which a value is a spike
    window     steps that trend and deviation are taken from
    warmup     after the start and after a switch of phases, in which nothing but NaN is a spike
    lookback   within which a spike may have begun before it was noticed
    cooldown   after a spike, in which nothing but NaN is another one
    rollbacks  to one checkpoint; the next would end the run
    ahead      anticipate: how long before a step its routing is computed
    hold       anticipate: how long beyond the spike

    Raises ConfigError, naming `spikes.KEY`, when a value is out of range.
    """

    on_nan: str = "replay"
    on_spike: str = "record"
    threshold: float = 10.0
    window: int = 50
    warmup: int = 100
    lookback: int = 10
    cooldown: int = 50
    rollbacks: int = 3
    ahead: int = 4
    hold: int = 50

    def __post_init__(self) -> None:
        for key, first in (("on_nan", "stop"), ("on_spike", "record")):
            words = (first, *ROLLBACKS)
            self._check(key, getattr(self, key) in words, f"{', '.join(words[:-1])} or {words[-1]}")
        self._check("threshold", 0 < self.threshold < math.inf, "a number above 0")
        self._check("window", self.window >= 9, "9 or more")
        rule = f"spikes.window = {self.window} or more, so that there is a trend"
        self._check("warmup", self.warmup >= self.window, rule)
        for key in ("lookback", "cooldown", "hold"):
            self._check(key, getattr(self, key) >= 0, "0 or more")
        for key in ("rollbacks", "ahead"):
            self._check(key, getattr(self, key) >= 1, "1 or more")

    @property
    def remembered(self) -> int:
        """Points that are looked at: the trend of the first step at which a spike may have begun, and on."""
        return self.window + self.lookback + 1

    def _check(self, key: str, good: bool, rule: str) -> None:
        if not good:
            raise ConfigError(f"spikes.{key} is {getattr(self, key)!r}; it must be {rule}")


@dataclass(frozen=True)
class Point:
    """What of a step's metrics is judged. `sequences`: of the stream, handed out up to this step."""

    step: int
    loss: float
    norm: float
    sequences: int

    @staticmethod
    def of(logged: dict[str, Any]) -> Point:
        """Of a line of metrics.jsonl. The indexer's norm where nothing else is trained."""
        norm = "grad_norm_model" if "grad_norm_model" in logged else "grad_norm_indexer"
        return Point(logged["step"], logged["lm"], logged[norm], logged["sequences"])


@dataclass(frozen=True)
class Spike:
    """A line of spikes.jsonl; steps are counted from 1, as in metrics.jsonl.

    step, onset   at which it was noticed, and began
    why           in words
    policy        what was done
    sequences     the first and the last, counted from 1, that steps `onset` to `step` were trained on
    back_to       step of the checkpoint that the run went back to; None where it did not
    ahead, until  anticipate: see `SpikesConfig.ahead`; the last step whose routing is
    """

    step: int
    onset: int
    why: str
    policy: str
    sequences: tuple[int, int]
    back_to: int | None = None
    ahead: int = 0
    until: int = 0


def find_spike(
    points: Sequence[Point], config: SpikesConfig, since: int, quiet_until: int, finite: bool = True
) -> tuple[int, str] | None:
    """Whether the last of these points, of consecutive steps, is in a spike: the step at which it began, and
    a text; else None.

    since         step after which trends begin: that of the last switch of phases, 0 without any
    quiet_until   last step of a cool-down
    finite        whether all that was logged of the step is

    A value is a spike from `threshold` deviations above its trend on, in nats for the loss, in logarithms for
    the norm. It began with the first step of the last `lookback` that was half as far above its own trend.
    """
    last = points[-1]
    why = "" if finite else "the loss or a gradient norm is not finite"
    if finite and last.step > max(since + config.warmup, quiet_until):
        heights = height(points, config.window, since)
        name, most = max(zip(("loss", "gradient norm"), heights), key=lambda item: item[1])
        value = last.loss if name == "loss" else last.norm
        if most >= config.threshold:
            why = f"the {name} is {value:.4g}, {most:.1f} deviations above its trend"
    if not why:
        return None
    first = max(since + config.warmup, last.step - config.lookback - 1)
    earlier = (points[:end] for end in range(1, len(points)) if points[end - 1].step > first)
    high = (p[-1].step for p in earlier if max(height(p, config.window, since)) >= config.threshold / 2)
    return next(high, last.step), why


def height(points: Sequence[Point], window: int, since: int) -> tuple[float, float]:
    """How many deviations the last point's loss, and its norm, are above the trend of those before it; 0
    where there are fewer than `window` of them after `since`."""
    *before, last = points[-window - 1 :]
    if len(before) < window or before[0].step <= since:
        return 0.0, 0.0
    found = []
    for value in (lambda p: p.loss, lambda p: math.log(max(p.norm, 1e-30))):
        expected, deviation = trend([value(point) for point in before])
        found.append((value(last) - expected) / deviation)
    return found[0], found[1]


def trend(values: Sequence[float]) -> tuple[float, float]:
    """What comes next, and the deviation to expect: Tukey's resistant line through the medians of the outer
    thirds, and the median distance from it, as large as normal noise's standard deviation.

    Up to a sixth of the values may be anything. A curve that falls more and more slowly is above its line:
    the last third's median is the least that is expected.
    """
    third = len(values) // 3
    left, right = median(values[:third]), median(values[-third:])
    slope = (right - left) / (len(values) - third)
    rests = [value - slope * i for i, value in enumerate(values)]
    level = median(rests)
    deviation = 1.4826 * median(abs(rest - level) for rest in rests)
    return max(level + slope * len(values), right), max(deviation, LEAST)


# ---- records ----


def read_spikes(folder: Path) -> list[Spike]:
    """The spikes of the run in `folder`, in the order in which they were noticed."""
    path = folder / FILE
    try:
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [Spike(**(line | {"sequences": tuple(line["sequences"])})) for line in lines]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{path} is not as it was written; restore it") from None


def write_spikes(folder: Path, spikes: Iterable[Spike]) -> None:
    """Replace spikes.jsonl, durably: whatever happens, it is the one before or this one."""
    with sealed(folder / FILE) as file:
        file.writelines(f"{json.dumps(asdict(spike))}\n".encode() for spike in spikes)


def keep_spikes(folder: Path, step: int) -> None:
    """Drop what a run that goes on from `step` will notice anew. What it has gone back for stays, as the run
    is to do the same again; for a run from the beginning, -1, nothing does."""
    spikes = read_spikes(folder)
    went_back = max((i for i, spike in enumerate(spikes) if spike.back_to is not None), default=-1)
    kept = [s for i, s in enumerate(spikes) if s.step <= step or (i <= went_back and step >= 0)]
    if kept != spikes:
        write_spikes(folder, kept)


def rollbacks(spikes: Iterable[Spike]) -> list[Spike]:
    """Those that the run went back for."""
    return [spike for spike in spikes if spike.back_to is not None]
