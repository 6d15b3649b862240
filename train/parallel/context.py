"""Context parallelism: every row is cut into equal parts, one on each rank of a group (V4 report, on CP).

In two stages a part gets what it needs of the others. Neighbours exchange the last rows of a part, for
windows and for the compression of windows that begin before a border. Entries made, and the indexer's keys,
are then gathered over the group. Gradients go back the same two ways, added up in fp32 in the order of ranks.

Every rank of the group makes the same calls in the same order, in forward, backward and recomputation.

Legend: B batch, S sequence, L = S / parts tokens of a part, t rows to gather, C channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.layout import WholeSequence
from model.norm import widen
from train.parallel.mesh import Mesh

# torch 2.13 has the new name for it and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def context_of(mesh: Mesh) -> WholeSequence:
    """What this rank holds of every row."""
    return SequenceParts(mesh) if mesh.cp_size > 1 else WholeSequence()


class SequenceParts(WholeSequence):
    """This rank's part of every row, in the order of the mesh's ranks that share sequences out."""

    def __init__(self, mesh: Mesh):
        self.group, self.rank, self.size = mesh.cp, mesh.cp_rank, mesh.cp_size

    def part(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.size, -1))[:, self.rank]

    def extended(self, rows: int, *xs: Tensor) -> tuple[Tensor, ...]:
        if not rows:
            return xs
        before = self.before(torch.cat([x[:, -rows:] for x in xs], dim=-1))  # one message for all
        halos = before.split([x.shape[-1] for x in xs], dim=-1)
        return tuple(torch.cat(pair, dim=1) for pair in zip(halos, xs, strict=True))

    def gather(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        parts = self.every(x)
        return parts if order is None else parts.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def before(self, x: Tensor) -> Tensor:
        """The neighbour's x, of the part before; zeros in the first part."""
        return _Before.apply(x, self)

    def every(self, x: Tensor) -> Tensor:
        """x [B, t, C] of all parts, [B, parts * t, C]."""
        return _Every.apply(x, self)

    def shift(self, x: Tensor, by: int) -> Tensor:
        """x of the rank `by` places before this one; zeros where there is none."""
        sent, received = (
            [x.numel() * (rank == other) for rank in range(self.size)]
            for other in (self.rank + by, self.rank - by)
        )
        out = x.new_zeros(x.numel())
        dist.all_to_all_single(
            out[: sum(received)], x.reshape(-1)[: sum(sent)], received, sent, group=self.group
        )
        return out.view_as(x)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, parts: SequenceParts) -> Tensor:  # type: ignore[override]
        ctx.parts = parts
        return parts.shift(x, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.parts.shift(grad, -1), None


class _Every(torch.autograd.Function):
    """All-gather; backward is an all-to-all and a sum of its own: exact, and the same every time."""

    @staticmethod
    def forward(ctx, x: Tensor, parts: SequenceParts) -> Tensor:  # type: ignore[override]
        ctx.parts = parts
        out = x.new_empty(parts.size * len(x), *x.shape[1:])
        _all_gather(out, x.contiguous(), group=parts.group)
        return out.unflatten(0, (parts.size, -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        parts = ctx.parts
        sent = grad.unflatten(1, (parts.size, -1)).transpose(0, 1).contiguous()  # [parts, B, t, C]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=parts.group)
        return widen(received).sum(0).to(grad.dtype), None
