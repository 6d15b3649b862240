"""Phases cover the run, step for step and token for token."""

from __future__ import annotations

from itertools import pairwise

import pytest

from configs.errors import ConfigError
from train.phases import PhaseConfig, Timeline

RUN = {"steps": 100, "seq_len": 512, "batch_tokens": 8192, "micro_batch": 4}


def test_without_phases_the_run_is_one() -> None:
    (phase,) = Timeline({}, **RUN)
    assert (phase.name, phase.first, phase.stop, phase.seq_len) == ("", 0, 100, 512)
    assert {phase.sequences(step) for step in range(100)} == {16}
    assert Timeline({}, **RUN).tokens(100) == 100 * 8192


def test_phases_follow_each_other_and_take_what_they_do_not_say_from_the_run() -> None:
    weights = {"a": 0.5, "b": 0.5}
    timeline = Timeline(
        {
            "short": PhaseConfig(steps=30, seq_len=256),
            "long": PhaseConfig(steps=50, seq_len=2048, batch_tokens=16384),
            "end": PhaseConfig(weights=weights, micro_batch=2),
        },
        **RUN,
    )
    short, long, end = timeline
    assert [(p.first, p.stop) for p in timeline] == [(0, 30), (30, 80), (80, 100)]
    assert [(p.seq_len, p.micro_batch) for p in timeline] == [(256, 8), (2048, 1), (512, 2)]
    assert [timeline.at(step) for step in (0, 29, 30, 79, 80, 99, 100, 500)] == [
        *[short] * 2,
        *[long] * 2,
        *[end] * 4,
    ]
    assert (short.sequences(0), long.sequences(30), end.sequences(80)) == (32, 8, 16)
    assert not short.weights and end.weights == weights
    assert timeline.tokens(100) == 30 * 8192 + 50 * 16384 + 20 * 8192
    assert timeline.tokens(31) - timeline.tokens(30) == 16384


def test_a_ramp_grows_in_whole_micro_batches_to_its_end() -> None:
    timeline = Timeline({"up": PhaseConfig(steps=60, ramp_from=100), "then": PhaseConfig()}, **RUN)
    up, then = timeline
    sizes = [timeline.at(step).sequences(step) for step in range(100)]
    assert sizes[0] == 4 and set(sizes) == {4, 8, 12, 16}
    assert all(a <= b for a, b in pairwise(sizes)) and sizes[60:] == [16] * 40
    assert sizes[30] == 8  # half of the way from 100 to 8192 tokens is two micro-batches of 2048
    assert timeline.tokens(100) == 512 * sum(sizes)
    assert (up.ramp_from, then.ramp_from) == (100, 8192)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"a": PhaseConfig(steps=50)}, "50 steps, train.steps is 100"),
        ({"a": PhaseConfig(steps=120)}, "120 steps"),
        ({"a": PhaseConfig(), "b": PhaseConfig()}, "phases.b.steps"),
        ({"a": PhaseConfig(steps=0), "b": PhaseConfig()}, "phases.a.steps is 0"),
        ({"a": PhaseConfig(micro_batch=-1)}, "phases.a.micro_batch"),
        ({"a": PhaseConfig(seq_len=3000)}, "phases.a.batch_tokens is 8192; it must be a multiple of 3000"),
        ({"a": PhaseConfig(ramp_from=8193)}, "phases.a.ramp_from"),
        ({"a": PhaseConfig(ramp_from=0)}, "phases.a.ramp_from"),
        ({"a": PhaseConfig(weights={"x": -1.0})}, "phases.a.weights"),
    ],
)
def test_what_does_not_make_up_a_run_is_refused(phases: dict[str, PhaseConfig], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Timeline(phases, **RUN)
    assert words in str(caught.value) and "\n" not in str(caught.value)
