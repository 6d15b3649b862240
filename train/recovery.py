"""What a run does about a spike: it goes back to a checkpoint, and may pass data over or anticipate routing.

All decisions come from numbers that every rank has, and from `spikes.jsonl`, which is on disk before anything
is undone: a run that is killed in between does the same again.

Anticipatory routing (V4 report, on training stability): the experts of a step are chosen with the parameters
of `ahead` steps before, in a forward pass over a batch that is fetched so much earlier; the weights of the
chosen, and all gradients, are of the present. At the first step after a rollback the routing of the next
`ahead` steps is computed at once, then that of one more step at each, and at the end of none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from configs.errors import ConfigError
from train import checkpoint
from train.config import RunConfig
from train.engine import Batch, Engine, micro_batches
from train.metrics import read_lines
from train.ranks import Ranks
from train.spikes import ROLLBACKS, Point, Spike, find_spike, read_spikes, rollbacks, write_spikes

if TYPE_CHECKING:
    from train.run import Run

# Of a micro-batch, one for each MoE: [B, S, K], on the host once a device is done; None of hash layers
Routes = list[Tensor | None]


@dataclass
class Recovery:
    """The spikes of a run and the last points of its metrics; after one, the routing of the next steps."""

    config: RunConfig
    spikes: list[Spike] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    routes: dict[int, list[Routes]] = field(default_factory=dict)  # by step, from 0; int16 on the host
    postponed: bool = False  # a checkpoint is

    @property
    def passed_over(self) -> tuple[range, ...]:
        """Sequences of the stream that are not trained on."""
        skipped = (spike.sequences for spike in rollbacks(self.spikes) if spike.policy == "skip")
        return tuple(range(first - 1, last) for first, last in skipped)

    def look(self, point: Point, finite: bool) -> Spike | None:
        """The spike that a step is in, with what is to be done; `finite`: whether all that was logged is."""
        config, step = self.config.spikes, point.step
        self.points = [*self.points, point][-config.remembered :]
        quiet = max((spike.step + config.cooldown for spike in self.spikes), default=0)
        since = self.config.last_switch(step - 1)
        found = find_spike(self.points, config, since, quiet, finite)
        if not found:
            return None
        onset, why = found
        begin = next(p for p in self.points if p.step == onset)
        first = begin.sequences - self.config.timeline.at(onset - 1).sequences(onset - 1) + 1
        policy = config.on_spike if finite else config.on_nan
        return Spike(step, onset, why, policy, (first, point.sequences))

    # ---- anticipatory routing ----

    def due(self, step: int) -> range:
        """The steps whose routing is to be computed with the parameters that train `step` (from 0)."""
        anticipated = [spike for spike in self.spikes if spike.policy == "anticipate"]
        now = [spike for spike in anticipated if (spike.back_to or 0) <= step < spike.until]
        if not now:
            return range(0)
        last = min(max(spike.until for spike in now), self.config.train.steps)
        return range(max([step, *self.routes]) + 1, min(step + now[-1].ahead + 1, last))

    def anticipate(self, engine: Engine, batches: Mapping[int, Batch], ranks: Ranks) -> None:
        """Choose the experts of later steps, by step, with the parameters of today."""
        for step, batch in batches.items():
            self.routes[step] = choose_experts(engine, batch, self.config.at(step), ranks)

    def routing(self, step: int) -> list[Routes]:
        """By micro-batch, what was chosen for a step before; empty if nothing was."""
        return self.routes.pop(step, [])

    def postpone(self) -> bool:
        """Whether a checkpoint has to wait: routing by parameters that are gone would not be in it."""
        self.postponed = bool(self.routes)
        return self.postponed


def find_recovery(config: RunConfig, folder: Path, ranks: Ranks) -> Recovery:
    """Of the run in `folder`, from its files, which are as they were after the last step."""

    def read() -> tuple[list[Spike], list[Point]]:
        metrics = folder / "metrics.jsonl"
        lines = read_lines(metrics) if metrics.exists() else []
        points = [Point.of(line) for line in lines if "lm" in line and "sequences" in line]
        return read_spikes(folder), points[-config.spikes.remembered :]

    return Recovery(config, *ranks.share(ranks.together(read, only_first=True)))


def recover(run: Run, spike: Spike, finite: bool) -> bool:
    """Record a spike, and go back where its policy says so; whether the run did.

    Raises ConfigError where the run had better end: `finite` tells NaN from a loss that may fall again.
    """
    config, ranks, folder, known = run.config.spikes, run.ranks, run.folder, run.recovery.spikes
    newest = run.saved()
    place = _checkpoint_before(spike.onset, run) if spike.policy != "record" else None
    step = checkpoint.step_of(place) if place else None
    tried = sum(other.back_to == step for other in rollbacks(known))
    if tried >= config.rollbacks or (not finite and place is None):
        spike = replace(spike, policy="stop")
    elif place is None:
        spike = replace(spike, policy="record")
    elif spike.policy == "anticipate":
        spike = replace(spike, back_to=step, ahead=config.ahead, until=spike.step + config.hold)
    elif spike.policy in ROLLBACKS:
        spike = replace(spike, back_to=step)
    known.append(spike)
    ranks.together(lambda: write_spikes(folder, known), only_first=True)
    line = f"step {spike.step}: {spike.why}"
    if spike.policy == "stop":
        helped = f"{tried} rollbacks to step {step} did not help; " if tried else ""
        remedy = f"go on from {place or newest}" if newest else "start again"
        raise ConfigError(f"{line}; {helped}{remedy}, lower optim.lr")
    first, last = spike.sequences
    since = f"since step {spike.onset}, sequences {first} to {last}"
    run.report.warn(f"{line} ({since}); {spike.policy}" + (f" from step {step}" if place else ""))
    if place:
        with ranks.watch.patient():
            run.go_back(place)
        run.tracker.rollback(run.step, line)
    return place is not None


def _checkpoint_before(onset: int, run: Run) -> Path | None:
    """The newest good one of the run, on every rank."""

    def find() -> Path | None:
        return checkpoint.newest_good(run.folder / "checkpoints", run.report.warn, before=onset)

    with run.ranks.watch.patient():
        return run.ranks.share(run.ranks.together(find, only_first=True))


def choose_experts(engine: Engine, batch: Batch, config: RunConfig, ranks: Ranks) -> list[Routes]:
    """Forward without losses and backward, of this rank's sequences [B, S] -> the experts of every
    micro-batch. Where layers are compiled it runs what is compiled for training (`train.compiled`)."""
    compiled = config.train.compile
    options = {"mode": config.attention_mode, "indexer_loss": compiled and config.indexer_loss}
    hashed = [moe.gate.is_hash for moe in engine.model.moes()]
    found: list[Routes] = []
    for micro in ranks.watch.each(micro_batches(batch, config.train.micro_batch)):
        micro = {name: x.to(ranks.device, non_blocking=True) for name, x in micro.items()}
        with torch.set_grad_enabled(compiled):
            chosen = engine(micro, return_losses=False, **options).expert_indices
        kept = [x.to(torch.int16).to("cpu", non_blocking=True) for x in chosen]
        found.append([None if of_hash else x for of_hash, x in zip(hashed, kept, strict=True)])
    return found
