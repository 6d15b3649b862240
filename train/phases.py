"""A run as phases with their own sequence length, batch and mixture; no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from configs.errors import ConfigError


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the run. What is None is that of `train`; `micro_batch` then keeps the tokens of a forward
    pass.

    steps         optimizer steps; None, in the last phase only: until train.steps
    seq_len       tokens of one sequence
    batch_tokens  tokens of one optimizer step
    ramp_from     tokens of the phase's first step, growing in equal steps to batch_tokens; None: no ramp
    micro_batch   sequences of one forward pass on one rank
    weights       of sources in this phase, in place of those in data.sources; the others have none
    """

    steps: int | None = None
    seq_len: int | None = None
    batch_tokens: int | None = None
    ramp_from: int | None = None
    micro_batch: int | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A phase with nothing left open, from step `first` (counted from 0) up to, not including, `stop`."""

    name: str
    first: int
    stop: int
    seq_len: int
    batch_tokens: int
    ramp_from: int
    micro_batch: int
    weights: Mapping[str, float]

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
        base = PhaseConfig(steps, seq_len, batch_tokens, None, micro_batch)
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
        stop = base.steps if config.steps is None else first + config.steps
        seq_len = config.seq_len or base.seq_len
        batch_tokens = config.batch_tokens or base.batch_tokens
        micro_batch = config.micro_batch or max(1, base.micro_batch * base.seq_len // seq_len)
        forward = seq_len * micro_batch
        ramp = batch_tokens if config.ramp_from is None else config.ramp_from
        weights = config.weights.values()
        rules = {
            "steps": (config.steps, stop > first, "1 or more, all together at most train.steps"),
            "seq_len": (seq_len, seq_len >= 2, "2 or more"),
            "micro_batch": (micro_batch, micro_batch >= 1, "1 or more"),
            "batch_tokens": (
                batch_tokens,
                batch_tokens > 0 and batch_tokens % forward == 0,
                f"a multiple of {forward}",
            ),
            "ramp_from": (ramp, 1 <= ramp <= batch_tokens, f"at most batch_tokens = {batch_tokens}"),
            "weights": (
                config.weights,
                not weights or min(weights) >= 0 < max(weights),
                "0 or more, not all 0",
            ),
        }
        for part, (value, good, rule) in rules.items():
            if not good:
                raise ConfigError(f"{key}.{part} is {value!r}; it must be {rule}")
        return Phase(name, first, stop, seq_len, batch_tokens, ramp, micro_batch, config.weights)

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
