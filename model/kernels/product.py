"""Products of FP8 numbers, added up in fp32: one matrix, or a matrix for every group of rows.

Each operand has the axis that is summed over last, with the scales of `model.kernels.cast`. Elsewhere than
on Hopper the same numbers are multiplied in the output's dtype, in which FP8 numbers are exact.

Legend: R rows sorted by group, E groups (experts), K what is summed over, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import grouped_linear
from model.quant import Quantised, dequantise


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [O, K] transposed -> [M, O]."""
    return F.linear(dequantise(a, dtype), dequantise(b, dtype))


def grouped_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of group e of a [R, K] times b[e] transposed, b [E, O, K] -> [R, O].

    `offsets` [E] int32: the end row of each group, the last of which is R.
    """
    return grouped_linear(dequantise(a, dtype), dequantise(b, dtype), offsets)


def grouped_outer_product(a: Quantised, b: Quantised, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """a [O, R] times b [I, R] transposed over the rows of each group -> [E, O, I]; zeros of an empty group.

    Tiles of 128 rows are counted from the first row of all, whatever group it belongs to.
    """
    if not a.values.shape[-1]:
        return a.scales.new_zeros(len(offsets), len(a.values), len(b.values), dtype=dtype)
    rows = dequantise(a, dtype).mT.contiguous(), dequantise(b, dtype).mT.contiguous()  # [R, O], [R, I]
    if dtype == torch.float64:  # torch has no grouped product in fp64
        ends = offsets.tolist()
        parts = zip(*(x.tensor_split(ends)[:-1] for x in rows))
        return torch.stack([own.mT @ other for own, other in parts])
    return F.grouped_mm(rows[0].mT, rows[1], offs=offsets)
