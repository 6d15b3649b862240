"""Number formats of training and of the released files: FP8 and FP4 in blocks that share a power of two.

    FP8   E4M3 (largest 448), scale 2^ceil(log2(amax / 448)) for 1 x 128 activations or gradients, along what
          a product sums over, 128 x 128 weights, or 1 x 64 numbers of a KV entry
    FP4   MXFP4: E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6, and negative), scale 2^ceil(log2(amax / 6)) for 1 x 32

Scales are powers of two between 2^-126 and 2^127 (ue8m0 without its smallest), so that scaling is exact;
numbers are rounded to nearest, ties to even. As no number exceeds its block's amax, nothing overflows.

    zeros            a block of zeros has the scale 2^-126; the sign of a zero stays
    denormal amax    below 448 or 6 times 2^-126 the scale is 2^-126: numbers become denormals or zero
    NaN, infinity    one such number makes its whole block NaN, as in torchao's MX formats

The last block of an axis that is no multiple of the block is shorter. Sources: DeepSeek-V3 report, section
3.3; DeepSeek-V4 report, on FP4 quantisation-aware training; OCP Microscaling Formats (MX) 1.0.

Legend: M rows, N columns, r x c the block.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.norm import widen

Block = tuple[int, int]
FP8_TILE: Block = (1, 128)
FP8_BLOCK: Block = (128, 128)
KV_TILE: Block = (1, 64)
FP4_BLOCK: Block = (1, 32)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LEAST = -126  # exponent of the smallest scale, the smallest normal fp32 number


class Quantised(NamedTuple):
    """Numbers that are `values` times the scale of their block."""

    values: Tensor  # [..., M, N] float8_e4m3fn
    scales: Tensor  # [..., ceil(M / r), ceil(N / c)] fp32, powers of two
    block: Block

    @property
    def mT(self) -> Quantised:
        """The same numbers, transposed."""
        return Quantised(self.values.mT, self.scales.mT, (self.block[1], self.block[0]))


def quantise_fp8(x: Tensor, block: Block = FP8_TILE) -> Quantised:
    """x [..., M, N] in E4M3."""
    blocks = _blocks(widen(x), block)
    scales = _scales(blocks, E4M3_MAX)
    values = _whole((blocks / scales).to(torch.float8_e4m3fn), x.shape)
    return Quantised(values, scales.squeeze((-3, -1)), block)


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., M, N]; exact in fp32 and, as long as they are normal numbers, in bf16."""
    values, scales, block = quantised
    blocks = _blocks(values.to(torch.promote_types(dtype, torch.float32)), block)
    return _whole(blocks * scales[..., :, None, :, None], values.shape).to(dtype)


def round_fp8(x: Tensor, block: Block = FP8_TILE) -> Tensor:
    """x [..., M, N] as FP8 keeps it, in its own dtype."""
    return dequantise(quantise_fp8(x, block), x.dtype)


def round_fp4(x: Tensor) -> Tensor:
    """x [..., M, N] as FP4 keeps it, in its own dtype."""
    blocks = _blocks(widen(x), FP4_BLOCK)
    scales = _scales(blocks, E2M1_MAX)
    return _whole(_round_e2m1(blocks / scales) * scales, x.shape).to(x.dtype)


def quantise_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., M, N], N even -> codes uint8 [..., M, N / 2], two in a byte, the first in its low half, and
    scales float8_e8m0fnu [..., M, ceil(N / 32)]. The numbers are those of `round_fp4`."""
    blocks = _blocks(widen(x), FP4_BLOCK)
    scales = _scales(blocks, E2M1_MAX)
    rounded = _whole(_round_e2m1(blocks / scales), x.shape)
    magnitude = rounded.abs()
    code = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 6, magnitude + 2, 7))
    code = code.to(torch.uint8) | (rounded.signbit().to(torch.uint8) << 3)
    low, high = code.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4), scales.squeeze((-3, -1)).to(torch.float8_e8m0fnu)


def dequantise_fp4(packed: Tensor, scales: Tensor) -> Tensor:
    """fp32 [..., M, N] of what `quantise_fp4` returns; bytes may be int8 as well, scales fp32."""
    packed = packed.view(torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    values = torch.tensor(FP4_VALUES, device=packed.device)[codes.int()]
    return _whole(_blocks(values, FP4_BLOCK) * scales.float()[..., None, :, None], values.shape)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to x unchanged."""
    return _StraightThrough.apply(x, rounded.detach())


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:  # type: ignore[override]
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def stored_entry(kv: Tensor, rotated: int) -> Tensor:
    """KV entries [..., C] as a cache returns them that keeps all but the last `rotated` channels in FP8.

    Straight through in backward. V4 report, on the KV cache.
    """
    plain, rope = kv.detach().split([kv.shape[-1] - rotated, rotated], dim=-1)
    return straight_through(kv, torch.cat((round_fp8(plain, KV_TILE), rope), dim=-1))


def rotated_fp4(x: Tensor) -> Tensor:
    """Index queries or keys [..., c], c a power of two, rotated (`hadamard`) and rounded to FP4, in bf16.

    The rotation leaves products of queries and keys as they are, and spreads outliers over all channels.
    Straight through in backward. V4 report, on the FP4 indexer.
    """
    x = hadamard(x)
    return straight_through(x, round_fp4(x)).to(torch.bfloat16)


def hadamard(x: Tensor) -> Tensor:
    """x [..., c] times the symmetric orthonormal Hadamard matrix of c, a power of two, in x's dtype."""
    size = x.shape[-1]
    signs = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(signs) < size:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return x @ signs * size**-0.5


def _blocks(x: Tensor, block: Block) -> Tensor:
    """x [..., M, N] -> [..., ceil(M / r), r, ceil(N / c), c], filled up with zeros."""
    count = [-(-size // part) for size, part in zip(x.shape[-2:], block)]
    rows, columns = (n * part - size for n, part, size in zip(count, block, x.shape[-2:]))
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    return x.unflatten(-1, (count[1], block[1])).unflatten(-3, (count[0], block[0]))


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_blocks`: without what filled up."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def _scales(blocks: Tensor, largest: float) -> Tensor:
    """The smallest power of two of every block, 2^-126 or more, by which none exceeds `largest`.

    [..., M / r, r, N / c, c] -> [..., M / r, 1, N / c, 1] fp32. Of two positive floats' bits, the difference
    over 2^23 is between the same integers as log2 of their quotient: rounding it up rounds the exponent up.
    """
    amax = blocks.abs().amax((-3, -1), keepdim=True).float()
    (top,) = struct.unpack("i", struct.pack("f", largest))
    exponent = (amax.view(torch.int32) - top + (2**23 - 1)) >> 23
    scales = ((exponent.clamp(min=LEAST) + 127) << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scales, torch.nan)


def _round_e2m1(x: Tensor) -> Tensor:
    """x, |x| <= 6, to the nearest E2M1 number; of two as near, that with an even mantissa."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round() * step
