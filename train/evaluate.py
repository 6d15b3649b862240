"""Validation: the same held-out sequences every time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model.attention import AttentionMode
from train.engine import Batch, TorchEngine


@torch.no_grad()
def evaluate(
    engine: TorchEngine, batches: Iterable[Batch], device: torch.device, mode: AttentionMode
) -> dict[str, float]:
    """Mean loss in nats of every part over `batches`: next token `lm`, and `mtp` where the model has it."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for batch in batches:
        losses = engine({name: tensor.to(device) for name, tensor in batch.items()}, mode=mode).losses
        for part in losses.keys() & {"lm", "mtp"}:
            sums[part] = sums.get(part, 0) + losses[part][0]
            counts[part] = counts.get(part, 0) + losses[part][1]
    return {part: float(sums[part] / counts[part].clamp(min=1)) for part in sorted(sums)}
