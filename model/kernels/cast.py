"""Casts to FP8 in the layouts in which products take their operands: summed over along the last axis.

Legend: R rows (tokens), I input features, O output features, E groups (experts).
"""

from __future__ import annotations

from torch import Tensor

from model.quant import FP8_BLOCK, Quantised, quantise_fp8


def cast_activation(x: Tensor) -> tuple[Quantised, Quantised]:
    """x [R, I] -> itself [R, I] and transposed [I, R], each in tiles of 1 x 128 of its own.

    The first is for products with weights, the second for the weights' gradient, which sums over rows.
    """
    return quantise_fp8(x), quantise_fp8(x.mT.contiguous())


def cast_weight(weight: Tensor) -> tuple[Quantised, Quantised]:
    """weight [..., O, I] -> itself and transposed [..., I, O], the same numbers in blocks of 128 x 128."""
    quantised = quantise_fp8(weight, FP8_BLOCK)
    return quantised, quantised.mT
