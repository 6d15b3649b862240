"""A run as phases with their own sequence length, batch, attention, rates and mixture; no torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.errors import ConfigError
from model.precision import NAMED

ATTENTION_MODES = ("dense", "warmup", "sparse")
# Keys of a phase that are others' as well.
CHANGES = ("attention_mode", "lr", "mtp_loss_weight", "indexer_loss_weight", "precision")


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the run. What is None is that of `train`, `optim` or `precision`; `micro_batch` then keeps
    the tokens of a forward pass.

    steps            optimizer steps; None, in the last phase only: until train.steps
    share            of train.steps, in place of steps: of the tokens, too, where batches are alike
    seq_len          tokens of one sequence
    seq_len_times    times train.seq_len, in place of seq_len
    batch_tokens     tokens of one optimizer step
    ramp_from        tokens of the phase's first step, growing in equal steps to batch_tokens; None: no ramp
    ramp_share       of batch_tokens, in place of ramp_from
    micro_batch      sequences of one forward pass on one rank
    attention_mode   see `train.attention_mode`
    lr               peak learning rate; the warm-up and the decay at the end are the run's
    mtp_loss_weight  of multi-token prediction, before the decay
    indexer_loss_weight  of the indexer's divergence from attention; 0: it does not learn
    precision        "bf16" (the compute dtype alone), "fp8" or "fp4_qat"
    weights          of sources in this phase, in place of those in data.sources; the others have none
    """

    steps: int | None = None
    share: float | None = None
    seq_len: int | None = None
    seq_len_times: int | None = None
    batch_tokens: int | None = None
    ramp_from: int | None = None
    ramp_share: float | None = None
    micro_batch: int | None = None
    attention_mode: str | None = None
    lr: float | None = None
    mtp_loss_weight: float | None = None
    indexer_loss_weight: float | None = None
    precision: str | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A phase from step `first` (counted from 0) up to, not including, `stop`, its batches without anything
    left open. `changes`: the keys of other parts of the configuration that have their own value meanwhile.
    """

    name: str
    first: int
    stop: int
    seq_len: int
    batch_tokens: int
    ramp_from: int
    micro_batch: int
    weights: Mapping[str, float]
    changes: Mapping[str, Any]

    def sequences(self, step: int) -> int:
        """How many sequences the batch of a step has: whole micro-batches."""
        done = (step - self.first) / (self.stop - self.first)
        tokens = self.ramp_from + (self.batch_tokens - self.ramp_from) * done
        return max(1, int(tokens) // (self.seq_len * self.micro_batch)) * self.micro_batch


class Timeline:
    """The phases of a run in order. Raises ConfigError, naming the key, when they do not make up the run."""

    def __init__(
        self,
        configs: Mapping[str, PhaseConfig],
        *,
        steps: int,
        seq_len: int,
        batch_tokens: int,
        micro_batch: int,
    ):
        self.phases: list[Phase] = []
        base = PhaseConfig(steps, seq_len=seq_len, batch_tokens=batch_tokens, micro_batch=micro_batch)
        for name, config in (configs or {"": base}).items():
            self.phases.append(self._checked(f"phases.{name}", name, config, base))
        if self.phases[-1].stop != steps:
            raise ConfigError(
                f"phases: they have {self.phases[-1].stop} steps, train.steps is {steps}; change one,"
                " or leave the last phase's steps null"
            )
        self._starts = [phase.first for phase in self.phases]
        self._tokens = [0]  # before each step that was asked for

    def _checked(self, key: str, name: str, config: PhaseConfig, base: PhaseConfig) -> Phase:
        assert base.steps and base.seq_len and base.batch_tokens and base.micro_batch
        first = self.phases[-1].stop if self.phases else 0
        steps = config.steps if config.share is None else max(1, round(config.share * base.steps))
        stop = base.steps if steps is None else first + steps
        seq_len = config.seq_len or base.seq_len * (config.seq_len_times or 1)
        batch_tokens = config.batch_tokens or base.batch_tokens
        micro_batch = config.micro_batch or max(1, base.micro_batch * base.seq_len // seq_len)
        forward = seq_len * micro_batch
        ramp = (
            round(batch_tokens * (config.ramp_share or 1)) if config.ramp_from is None else config.ramp_from
        )
        rules = {
            **_rules(config),
            "steps": (config.steps, stop > first, "1 or more, all together at most train.steps"),
            "seq_len": (seq_len, seq_len >= 2, "2 or more"),
            "micro_batch": (micro_batch, micro_batch >= 1, "1 or more"),
            "batch_tokens": (
                batch_tokens,
                batch_tokens > 0 and batch_tokens % forward == 0,
                f"a multiple of {forward}",
            ),
            "ramp_from": (ramp, 1 <= ramp <= batch_tokens, f"at most batch_tokens = {batch_tokens}"),
        }
        for part, (value, good, rule) in rules.items():
            if not good:
                raise ConfigError(f"{key}.{part} is {value!r}; it must be {rule}")
        changes = {part: getattr(config, part) for part in CHANGES if getattr(config, part) is not None}
        return Phase(name, first, stop, seq_len, batch_tokens, ramp, micro_batch, config.weights, changes)

    def at(self, step: int) -> Phase:
        """The phase of a step; beyond the end, the last one."""
        return self.phases[bisect_right(self._starts, step) - 1]

    def tokens(self, step: int) -> int:
        """Tokens of the steps before this one."""
        for done in range(len(self._tokens) - 1, step):
            phase = self.at(done)
            self._tokens.append(self._tokens[-1] + phase.sequences(done) * phase.seq_len)
        return self._tokens[step]

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)


def _rules(config: PhaseConfig) -> dict[str, tuple[Any, bool, str]]:
    """Of keys that depend on no other phase: value, whether it is good, and what it must be."""
    share, times, lr = config.share, config.seq_len_times, config.lr
    ramp, weights = config.ramp_share, config.weights.values()
    checks = {
        "share": (
            share is None or (0 < share <= 1 and config.steps is None),
            "above 0, at most 1, without steps",
        ),
        "seq_len_times": (
            times is None or (times >= 1 and config.seq_len is None),
            "1 or more, without seq_len",
        ),
        "ramp_share": (
            ramp is None or (0 < ramp <= 1 and config.ramp_from is None),
            "above 0, at most 1, without ramp_from",
        ),
        "attention_mode": (config.attention_mode in (None, *ATTENTION_MODES), " or ".join(ATTENTION_MODES)),
        "lr": (lr is None or 0 < lr < math.inf, "a number above 0"),
        "precision": (config.precision in (None, *NAMED), " or ".join(NAMED)),
        "weights": (not weights or min(weights) >= 0 < max(weights), "0 or more, not all 0"),
    }
    for part in ("mtp_loss_weight", "indexer_loss_weight"):
        weight = getattr(config, part)
        checks[part] = (weight is None or 0 <= weight < math.inf, "a finite number, 0 or more")
    return {part: (getattr(config, part), *check) for part, check in checks.items()}
