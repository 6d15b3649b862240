"""The one door through which every matrix product with a weight goes.

`linear(x, w, kind)` and `grouped_linear(x, w, offsets)` compute in the activations' dtype. `kind` names the
role of the product; `model.precision` decides by kind and replaces the products on the modules of a built
model (`Linear.product`, `Experts.mlp`), so that `forward` never mentions a number format.

Legend: R rows sorted by group, E groups (experts), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal[
    "attention",  # q_a, q_b, kv and o_b projections
    "compressor",  # kv and gate projections of both compressors
    "indexer",  # the indexer's queries
    "indexer_weights",  # the indexer's head weights
    "shared_expert",
    "mtp",
]


def linear(x: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    """x [..., I] times weight [O, I] transposed -> [..., O], in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of group e times weight[e] transposed: x [R, I], weight [E, O, I] -> [R, O].

    `offsets` [E] int32 holds the end row of each group; `offsets[-1]` must be R (rows beyond it would
    stay uninitialised). Nothing is copied to the host.
    """
    weight = weight.to(x.dtype)
    if not len(x):  # CUDA's product of no rows has no backward; this one's gradients are zeros
        return F.linear(x, weight[0])
    if x.dtype == torch.float64:  # torch has no grouped product in fp64
        return _grouped_linear_masked(x, weight, offsets)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)


def _grouped_linear_masked(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same product for oracles: every group multiplies all rows, masked (E times the work)."""
    rows = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(offsets, rows, right=True, out_int32=True)  # [R]
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        out = out + F.linear(x * (group == e).unsqueeze(-1), weight[e])
    return out


class Linear(nn.Module):
    """A bias-free projection [..., I] -> [..., O] that knows its kind."""

    product: Callable[[Tensor, Tensor, Kind], Tensor] = staticmethod(linear)

    def __init__(self, in_features: int, out_features: int, kind: Kind):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.kind: Kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.kind)
