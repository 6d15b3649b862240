"""The learning rate of every step: linear warm-up, constant, cosine; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from configs.errors import ConfigError
from optim.config import OptimConfig


def decay_start(total_steps: int, config: OptimConfig) -> int:
    """First step (from 0) of the cosine decay; `total_steps` when nothing decays.

    Raises ConfigError when warm-up and decay do not both fit into the run.
    """
    start = total_steps - round(config.decay_fraction * total_steps)
    if config.warmup_steps > start:
        raise ConfigError(
            f"optim.warmup_steps is {config.warmup_steps}, but decay starts at step {start} of {total_steps};"
            " lower optim.warmup_steps or optim.decay_fraction, or train longer"
        )
    return start


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of `step`, counted from 0 to total_steps - 1.

    Step 0 has lr / warmup_steps, step warmup_steps - 1 is the first at `lr`, step decay_start - 1 the last,
    and step total_steps - 1 the first at lr * final_lr_ratio, which also holds for every later step.
    """
    start = decay_start(total_steps, config)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if step < start or start == total_steps:
        return config.lr
    progress = min((step + 1 - start) / (total_steps - start), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give every group `lr` times its own `lr_scale` (indexer_lr / lr for the indexer, else 1)."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
