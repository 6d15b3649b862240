"""Validation: the same held-out sequences every time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from model.attention import AttentionMode
from model.hyper_connection import HyperConnection, Mix
from train.engine import Batch, TorchEngine


@torch.no_grad()
def evaluate(
    engine: TorchEngine, batches: Iterable[Batch], device: torch.device, mode: AttentionMode
) -> dict[str, float]:
    """Mean loss in nats of every part over `batches`: next token `lm`, and `mtp` where the model has it.

    With hyper-connections also `hc_row_error` and `hc_spectral_norm` of `mixing_errors`, on the first batch.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    combs: list[Tensor] = []
    for number, batch in enumerate(batches):
        with recorded_combs(engine.model, combs) if number == 0 else nullcontext():
            losses = engine({name: x.to(device) for name, x in batch.items()}, mode=mode).losses
        for part in losses.keys() & {"lm", "mtp"}:
            sums[part] = sums.get(part, 0) + losses[part][0]
            counts[part] = counts.get(part, 0) + losses[part][1]
    means = {part: float(sums[part] / counts[part].clamp(min=1)) for part in sorted(sums)}
    return means | mixing_errors(combs)


@contextmanager
def recorded_combs(model: nn.Module, combs: list[Tensor]) -> Iterator[None]:
    """Append to `combs` the matrices [S, N, N] with which each hyper-connection mixes the first row."""
    kept = [(module, module.leave) for module in model.modules() if isinstance(module, HyperConnection)]

    def recording(module: HyperConnection) -> None:
        leave = module.leave

        def record(output: Tensor, streams: Tensor, mix: Mix | None) -> Tensor:
            assert mix is not None
            combs.append(mix[1][0].float())
            return leave(output, streams, mix)

        module.leave = record  # type: ignore[method-assign]

    for module, _ in kept:
        recording(module)
    try:
        yield
    finally:
        for module, leave in kept:
            module.leave = leave  # type: ignore[method-assign]


def mixing_errors(combs: list[Tensor]) -> dict[str, float]:
    """How far mixing matrices [S, N, N] are from doubly stochastic: the largest |row sum - 1| and norm.

    Columns are exact by construction. A spectral norm of 1 means that mixing never amplifies the streams.
    """
    if not combs:
        return {}
    comb = torch.cat(combs)
    squared = torch.linalg.eigvalsh(comb.mT @ comb)[..., -1]
    return {
        "hc_row_error": float((comb.sum(-1) - 1).abs().max()),
        "hc_spectral_norm": float(squared.max().sqrt()),
    }
