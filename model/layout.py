"""Where documents, compressed entries and rotations lie in a batch: all that depends on positions alone.

Rows hold packed documents; `position_ids` restart at 0 in each. Windows, compression and visibility never
cross a document's border, so that a packed document gets exactly what it gets alone. Every shape depends
on [B, S] only: compressed slots are always S // m per row, and slots without an entry are masked.

Legend: B batch, S sequence, T = S // m compressed slots, m compression rate, R rotary channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rope import Rotation, inverse_frequencies, rotation

COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")


@dataclass(frozen=True)
class Slots:
    """The compressed entries of one rate. Entries lie in order of their documents, without gaps.

    A query t sees the slots `first[t] <= s < end[t]`: its document's windows that are complete at t.
    """

    tokens: Tensor  # [B, T, m] token indices of each window (any valid index where there is no entry)
    chained: Tensor  # [B, T] the slot before holds the preceding window of the same document
    first: Tensor  # [B, S]
    end: Tensor  # [B, S]
    rotation: Rotation  # at the position of each window's first token, [B, T, R / 2]

    def visible(self) -> Tensor:
        """[B, S, T] bool: which slots each query may attend to."""
        slot = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (slot >= self.first.unsqueeze(-1)) & (slot < self.end.unsqueeze(-1))


@dataclass(frozen=True)
class Layout:
    """Positions of one batch, shared by all layers."""

    positions: Tensor  # [B, S] within the document
    real: Tensor  # [B, S] bool, False on padding
    last: Tensor  # [B, S] index of the last token of each token's document
    rotations: dict[str, Rotation]  # "main" and "compress", at every token, [B, S, R / 2]
    slots: dict[str, Slots]  # by layer type


def positions_from_documents(document_ids: Tensor) -> Tensor:
    """[B, S] ids of contiguous documents -> [B, S] positions that restart at every border."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    border = torch.ones_like(document_ids, dtype=torch.bool)
    border[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(border, index, 0).cummax(dim=1).values


def build_layout(config: ModelConfig, positions: Tensor, document_ids: Tensor | None = None) -> Layout:
    """Layout of a batch with `positions` [B, S]; `document_ids` [B, S] is negative on padding."""
    frequencies = {
        kind: inverse_frequencies(parameters, config.qk_rope_head_dim, positions.device)
        for kind, parameters in config.rope_parameters.items()
    }
    length = positions.shape[1]
    index = torch.arange(length, device=positions.device).expand_as(positions)
    ends_here = torch.ones_like(positions, dtype=torch.bool)
    ends_here[:, :-1] = positions[:, 1:] != positions[:, :-1] + 1
    return Layout(
        positions=positions,
        real=torch.ones_like(ends_here) if document_ids is None else document_ids >= 0,
        last=torch.where(ends_here, index, length).flip(1).cummin(dim=1).values.flip(1),
        rotations={kind: rotation(positions, f) for kind, f in frequencies.items()},
        slots={
            kind: _build_slots(positions, config.compress_rates[kind], frequencies["compress"])
            for kind in COMPRESSED
            if kind in config.layer_types
        },
    )


def _build_slots(positions: Tensor, rate: int, frequencies: Tensor) -> Slots:
    batch, length = positions.shape
    count = length // rate
    index = torch.arange(length, device=positions.device).expand_as(positions)
    completes = (positions + 1) % rate == 0  # this token ends a window
    end = completes.cumsum(dim=1)  # slots complete up to and including each token
    # Scatter each window's last token into its slot; tokens that end no window go to a spare slot.
    target = torch.where(completes, end - 1, count)
    last = index.new_full((batch, count + 1), rate - 1).scatter(1, target, index)[:, :count]
    tokens = last.unsqueeze(-1) + torch.arange(1 - rate, 1, device=positions.device)  # [B, T, m]
    start = positions.gather(1, last) - (rate - 1)  # [B, T]
    return Slots(
        tokens=tokens,
        chained=start >= rate,
        first=end - (positions + 1) // rate,
        end=end,
        rotation=rotation(start, frequencies),
    )
