"""Where documents, compressed entries and rotations lie in a batch: all that depends on positions alone.

Rows hold packed documents; `position_ids` restart at 0 in each. Windows, compression and visibility never
cross a document's border, so that a packed document gets exactly what it gets alone. Every shape depends
on [B, S] only: compressed slots are always S // m per row, and slots without an entry are masked.

Rows may be cut into equal parts, each held elsewhere (`train.parallel.context`). Queries then are those of
one part; slots and what numbers them are still those of the whole row.

Legend: B batch, S sequence, L = S / parts tokens held here, T = S // m compressed slots, t slots made here,
m compression rate, R rotary channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.rope import Rotation, inverse_frequencies, rotation

SELECTIVE = "compressed_sparse_attention"  # whose entries an indexer selects
COMPRESSED = (SELECTIVE, "heavily_compressed_attention")


class WholeSequence:
    """Which part of every row is held here: all of it. Its methods are what a part needs of the others."""

    rank, size = 0, 1  # which of how many parts

    def part(self, x: Tensor) -> Tensor:
        """Of whole rows [B, S, ...] the part held here, [B, L, ...]."""
        return x

    def extended(self, rows: int, *xs: Tensor) -> tuple[Tensor, ...]:
        """Each of xs [B, L, C] after the last `rows` rows of the part before: [B, rows + L, C].

        Zeros before the first part; nothing is added to whole rows.
        """
        return xs

    def gather(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """x [B, t, C] of all parts, one after the other: [B, parts * t, C], or its rows at `order` [B, T]."""
        return x


@dataclass(frozen=True)
class Slots:
    """The compressed entries of one rate. Entries lie in order of their documents, without gaps.

    A query sees the slots `first <= s < end`: its document's windows that are complete at its token. Where
    rows are cut, the part that holds a window's last token makes the entry; so that the windows before are
    at hand, its tokens come after the last `halo` of the part before, and `lead` more windows before its own.
    """

    tokens: Tensor  # [B, lead + t, m] indices of each window among halo + L (any where there is no entry)
    chained: Tensor  # [B, lead + t] the slot before holds the preceding window of the same document
    order: Tensor  # [B, T] where in the gathered parts each slot's entry lies
    first: Tensor  # [B, L]
    end: Tensor  # [B, L]
    rotation: Rotation  # at the position of each window's first token, [B, t, R / 2]
    halo: int
    lead: int
    context: WholeSequence

    def visible(self) -> Tensor:
        """[B, L, T] bool: which slots each query may attend to."""
        slot = torch.arange(self.order.shape[1], device=self.order.device)
        return (slot >= self.first.unsqueeze(-1)) & (slot < self.end.unsqueeze(-1))


@dataclass(frozen=True)
class Layout:
    """Positions of one batch, shared by all layers."""

    positions: Tensor  # [B, L] within the document
    real: Tensor  # [B, L] bool, False on padding
    first: Tensor  # [B, L] index in the row of the first token of each token's document
    last: Tensor  # [B, L] of its last token
    rotations: dict[str, Rotation]  # "main" and "compress", at every token, [B, L, R / 2]
    slots: dict[str, Slots]  # by layer type
    context: WholeSequence


def positions_from_documents(document_ids: Tensor) -> Tensor:
    """[B, S] ids of contiguous documents -> [B, S] positions that restart at every border."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    border = torch.ones_like(document_ids, dtype=torch.bool)
    border[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(border, index, 0).cummax(dim=1).values


def entry_readers(config: ModelConfig, positions: Tensor, real: Tensor) -> Tensor:
    """How many real queries see at least one entry, over all CSA layers: what the indexer's loss counts.

    positions, real [B, S], of whole rows or of any part: the first window of a document is complete at
    position m - 1.
    """
    sees = positions >= config.compress_rates[SELECTIVE] - 1
    return config.layer_types.count(SELECTIVE) * (sees & real).sum()


def build_layout(
    config: ModelConfig,
    positions: Tensor,
    document_ids: Tensor | None = None,
    context: WholeSequence | None = None,
) -> Layout:
    """Layout of the part that `context` holds of a batch with `positions` [B, S] of whole rows.

    `document_ids` [B, S] is negative on padding. Without `context` all is held here.
    """
    context = context or WholeSequence()
    frequencies = {
        kind: inverse_frequencies(parameters, config.qk_rope_head_dim, positions.device)
        for kind, parameters in config.rope_parameters.items()
    }
    length = positions.shape[1]
    index = torch.arange(length, device=positions.device).expand_as(positions)
    ends_here = torch.ones_like(positions, dtype=torch.bool)
    ends_here[:, :-1] = positions[:, 1:] != positions[:, :-1] + 1
    here = context.part(positions)
    return Layout(
        positions=here,
        real=context.part(torch.ones_like(ends_here) if document_ids is None else document_ids >= 0),
        first=context.part(index - positions),
        last=context.part(torch.where(ends_here, index, length).flip(1).cummin(dim=1).values.flip(1)),
        rotations={kind: rotation(here, f) for kind, f in frequencies.items()},
        slots={
            kind: _build_slots(positions, config.compress_rates[kind], frequencies["compress"], context, kind)
            for kind in COMPRESSED
            if kind in config.layer_types
        },
        context=context,
    )


def _build_slots(
    positions: Tensor, rate: int, frequencies: Tensor, context: WholeSequence, kind: str
) -> Slots:
    batch, length = positions.shape
    count, here = length // rate, length // context.size
    made = min(-(-here // rate), count)  # as many windows at most end in a part
    index = torch.arange(length, device=positions.device).expand_as(positions)
    completes = (positions + 1) % rate == 0  # this token ends a window
    end = completes.cumsum(dim=1)  # slots complete up to and including each token
    # Scatter each window's last token into its slot; tokens that end no window go to a spare slot.
    target = torch.where(completes, end - 1, count)
    last = index.new_full((batch, count + 1), rate - 1).scatter(1, target, index)[:, :count]
    earlier = F.pad(end, (1, 0))[:, :-1:here]  # [B, parts] slots complete before each part
    slot, part = torch.arange(count, device=positions.device), last // here

    overlap, cut = kind == SELECTIVE, context.size > 1
    halo, lead = (rate * (1 + overlap), int(overlap)) if cut else (0, 0)
    own = torch.arange(-lead, made, device=positions.device) + earlier[:, context.rank, None]
    own = own.clamp(0, count - 1)  # [B, lead + t] slots of this part
    shift = halo - context.rank * here  # from tokens of the row to those at hand
    ends = (last.gather(1, own) + shift).clamp(rate - 1, halo + here - 1)
    start = positions.gather(1, last).gather(1, own) - (rate - 1)  # [B, lead + t]
    return Slots(
        tokens=ends.unsqueeze(-1) + torch.arange(1 - rate, 1, device=positions.device),
        chained=start >= rate,
        order=part * made + slot - earlier.gather(1, part),
        first=context.part(end - (positions + 1) // rate),
        end=context.part(end),
        rotation=rotation(start[:, lead:], frequencies),
        halo=halo,
        lead=lead,
        context=context,
    )
