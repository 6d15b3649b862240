"""Phases cover the run, step for step and token for token."""

from __future__ import annotations

from itertools import pairwise

import pytest

from configs.compose import compose
from configs.errors import ConfigError
from model.precision import NAMED
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


def test_shares_and_multiples_are_of_the_run() -> None:
    dense = PhaseConfig(share=0.254, attention_mode="dense", ramp_share=0.5)
    timeline = Timeline(
        {"a": dense, "b": PhaseConfig(share=0.001, seq_len_times=4), "c": PhaseConfig()}, **RUN
    )
    a, b, c = timeline
    assert [(p.first, p.stop) for p in timeline] == [(0, 25), (25, 26), (26, 100)]
    assert (a.ramp_from, b.ramp_from) == (4096, 8192) and (b.seq_len, b.micro_batch) == (2048, 1)
    assert (a.changes, b.changes, c.changes) == ({"attention_mode": "dense"}, {}, {})


def test_a_phase_changes_other_parts_of_the_configuration() -> None:
    """Each of its keys has its place; what it does not say, and the run beside it, stays."""
    changes = {
        "steps": 50,
        "attention_mode": "dense",
        "lr": 0.5,
        "mtp_loss_weight": 0.25,
        "indexer_loss_weight": 0.0,
        "precision": "fp4_qat",
    }
    phases = [f"phases.a.{key}={value}" for key, value in changes.items()]
    phases += ["phases.b.seq_len=512", "train.steps=100"]
    config = compose([*phases, "optim.warmup_steps=3"])
    first, second = config.at(49), config.at(50)
    assert (first.train.attention_mode, second.train.attention_mode) == ("dense", "sparse")
    assert (first.optim.lr, second.optim.lr) == (0.5, config.optim.lr)
    assert (first.train.mtp_loss_weight, second.train.mtp_loss_weight) == (0.25, config.train.mtp_loss_weight)
    assert (first.trained_sets, second.trained_sets) == (("model",), ("model", "indexer"))
    assert first.precision.at(0) == NAMED["fp4_qat"] and second.precision.at(99) == NAMED["bf16"]
    assert first.precision.compute_dtype == second.precision.compute_dtype == config.precision.compute_dtype
    assert config.fp4_experts and not compose(["train.steps=100"]).fp4_experts
    assert config.at(1000).optim.lr == config.optim.lr and first.optim.warmup_steps == 3
    with pytest.raises(ConfigError, match=r"model\.index_head_dim"):
        compose([*phases, "model.index_head_dim=24"])


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"a": PhaseConfig(steps=50)}, "50 steps, train.steps is 100"),
        ({"a": PhaseConfig(share=1.5)}, "phases.a.share is 1.5; it must be above 0"),
        ({"a": PhaseConfig(share=0.5, steps=50)}, "without steps"),
        ({"a": PhaseConfig(seq_len=512, seq_len_times=2)}, "without seq_len"),
        ({"a": PhaseConfig(ramp_share=0.5, ramp_from=2048)}, "without ramp_from"),
        ({"a": PhaseConfig(attention_mode="full")}, "phases.a.attention_mode is 'full'; it must be dense or"),
        ({"a": PhaseConfig(lr=0.0)}, "phases.a.lr is 0.0; it must be a number above 0"),
        ({"a": PhaseConfig(mtp_loss_weight=-1.0)}, "phases.a.mtp_loss_weight is -1.0"),
        ({"a": PhaseConfig(indexer_loss_weight=-1.0)}, "phases.a.indexer_loss_weight is -1.0"),
        (
            {"a": PhaseConfig(precision="fp2")},
            "phases.a.precision is 'fp2'; it must be bf16 or fp8 or fp4_qat",
        ),
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
