"""Number formats against tables, torchao, and rules written out; what is lossless is so bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant import (
    FP4_VALUES,
    FP8_BLOCK,
    FP8_TILE,
    KV_TILE,
    Block,
    dequantise,
    dequantise_fp4,
    hadamard,
    quantise_fp4,
    quantise_fp8,
    rotated_fp4,
    round_fp4,
    round_fp8,
    stored_entry,
)

FP8_VALUES = [
    float(x) for x in torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
]  # 0 to 448


def wide(rows: int, columns: int, seed: int = 0, spread: int = 30) -> Tensor:
    """Normal numbers times powers of two from 2^-spread to 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (rows, columns), generator=generator)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(exponents.float())


def nearest(x: float, values: list[float]) -> float:
    """Of `values`, ascending from zero, whose even places have even mantissas, the one that |x| rounds to."""
    above = next((i for i, value in enumerate(values) if value >= abs(x)), len(values) - 1)
    below = max(above - 1, 0)
    to_below, to_above = abs(x) - values[below], values[above] - abs(x)
    place = below if to_below < to_above or (to_below == to_above and below % 2 == 0) else above
    return math.copysign(values[place], x)


def by_hand(x: Tensor, block: Block, values: list[float]) -> tuple[Tensor, Tensor]:
    """Rounded numbers and scales of x [M, N], number by number in Python's floats."""
    rounded = torch.zeros_like(x)
    scales = torch.zeros(-(-x.shape[0] // block[0]), -(-x.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            amax = float(x[part].abs().max())
            scale = 2.0 ** max(-126, math.ceil(math.log2(amax / values[-1]))) if amax else 2.0**-126
            scales[i, j] = scale
            rounded[part] = torch.tensor(
                [[nearest(float(v) / scale, values) * scale for v in row] for row in x[part]]
            )
    return rounded, scales


@pytest.mark.parametrize("block", [FP8_TILE, FP8_BLOCK, KV_TILE])
@pytest.mark.parametrize("shape", [(3, 200), (130, 130), (1, 1)])
def test_fp8_by_hand(block: Block, shape: tuple[int, int]) -> None:
    x = wide(*shape, spread=4)
    rounded, scales = by_hand(x, block, FP8_VALUES)
    quantised = quantise_fp8(x, block)
    assert torch.equal(quantised.scales, scales)
    assert torch.equal(dequantise(quantised), rounded) and torch.equal(round_fp8(x, block), rounded)
    assert not torch.equal(rounded, x)


def test_fp4_by_hand() -> None:
    ties = torch.arange(-28, 29).repeat(3)[:160].view(1, -1) / 4  # every number, tie and place between them
    x = torch.cat((wide(4, 160, spread=2), ties, ties * 2.0**-40))
    rounded, scales = by_hand(x, (1, 32), list(FP4_VALUES[:8]))
    packed, found = quantise_fp4(x)
    assert torch.equal(found.float(), scales) and torch.equal(round_fp4(x), rounded)
    assert torch.equal(dequantise_fp4(packed, found), rounded)
    assert packed.shape == (6, 80) and packed.dtype == torch.uint8
    first = x[0, :2] / scales[0, 0]
    codes = [
        FP4_VALUES.index(nearest(float(v), list(FP4_VALUES[:8])) or math.copysign(0.0, v)) for v in first
    ]
    codes = [code + 8 * (v < 0 and code == 0) for code, v in zip(codes, first)]
    assert packed[0, 0] == codes[0] + 16 * codes[1]


def test_bits_are_those_of_torchao() -> None:
    """Its scales come from a rounded logarithm: exact but just above a power of two, which random numbers
    do not meet."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    mode = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode.RCEIL
    ties = torch.arange(-26, 27).repeat(20)[:1024].view(1, -1) / 4
    x = torch.cat((wide(64, 1024), wide(64, 1024, spread=0), wide(32, 1024).bfloat16().float(), ties))
    scales, values = mx.to_mx(x, torch.float8_e4m3fn, 32, mode)
    ours = quantise_fp8(x, (1, 32))
    assert torch.equal(ours.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(ours.scales, scales.float())
    scales, codes = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
    packed, found = quantise_fp4(x)
    assert torch.equal(packed, codes.view(torch.uint8))
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("largest", [448.0, 6.0])
@pytest.mark.parametrize("exponent", [-126, -20, 0, 100])
def test_scales_turn_exactly_at_the_largest(largest: float, exponent: int) -> None:
    """Up to `largest` times a power of two that is the scale; from the next float on twice that is."""
    top = torch.tensor([[largest * 2.0**exponent]])
    after = torch.nextafter(top, torch.tensor(torch.inf))
    for x, wanted in ((top, exponent), (after, exponent + 1)):
        scale = quantise_fp8(x).scales if largest == 448 else quantise_fp4(x.expand(1, 2))[1].float()
        assert scale.item() == 2.0**wanted


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_block_only(bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 130] = bad
    eight, four = round_fp8(x), round_fp4(x)
    assert eight[1, 128:].isnan().all() and four[1, 128:160].isnan().all()
    eight[1, 128:], four[1, 128:160] = 1, 1
    assert torch.equal(eight, torch.ones(2, 256)) and torch.equal(four, torch.ones(2, 256))
    packed, scales = quantise_fp4(x)
    assert scales[1, 4].float().isnan() and dequantise_fp4(packed, scales)[1, 128:160].isnan().all()


def test_zeros_and_denormals() -> None:
    zeros = torch.tensor([[0.0, -0.0] * 64])
    quantised = quantise_fp8(zeros)
    assert quantised.scales.item() == 2.0**-126
    assert torch.equal(dequantise(quantised).signbit(), zeros.signbit())
    assert torch.equal(round_fp4(zeros).signbit(), zeros.signbit())
    tiny = torch.full((1, 32), 2.0**-127)  # half of the smallest scale: a number of both formats
    assert quantise_fp8(tiny).scales.item() == 2.0**-126
    assert torch.equal(round_fp8(tiny), tiny) and torch.equal(round_fp4(tiny), tiny)
    assert torch.equal(round_fp4(torch.full((1, 32), 2.0**-129)), torch.zeros(1, 32))


@given(st.integers(0, 2**31), st.integers(-120, 100), st.integers(0, 14))
@settings(max_examples=40, deadline=None)
def test_fp4_becomes_fp8_without_loss_up_to_a_span_of_14(seed: int, least: int, span: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.uint8)
    codes = codes | (torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.uint8) << 4)
    exponents = least + torch.randint(0, span + 1, (128, 4), generator=generator)
    exponents[0, :2] = torch.tensor([least, least + span])
    weights = dequantise_fp4(codes, torch.exp2(exponents.float()))
    assert torch.equal(round_fp8(weights, FP8_BLOCK), weights)
    assert torch.equal(weights.bfloat16().float(), weights)


def test_beyond_that_the_smallest_are_rounded_to_nearest() -> None:
    weights = torch.full((1, 64), 6.0)
    weights[0, 32:] = 0.5 * 2.0**-18  # as FP4: scale 2^-21 against 2^0, 4 times it
    weights[0, 33] = 6 * 2.0**-21
    assert torch.equal(round_fp4(weights), weights)
    eight = round_fp8(weights, FP8_BLOCK)
    assert torch.equal(eight[0, :32], weights[0, :32]) and not torch.equal(eight, weights)
    assert (eight - weights).abs().max() <= 2.0**-18 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_twice_is_rounding_once(dtype: torch.dtype) -> None:
    x = wide(130, 200, spread=6).to(dtype)
    for rounding in (round_fp4, round_fp8, lambda x: round_fp8(x, FP8_BLOCK)):
        once = rounding(x)
        assert once.dtype == dtype and torch.equal(rounding(once), once) and not torch.equal(once, x)
    stacked = torch.stack((x, 2 * x))
    assert torch.equal(round_fp8(stacked, FP8_BLOCK)[1], 2 * round_fp8(x, FP8_BLOCK))


def test_transposed_is_the_same_numbers() -> None:
    x = wide(130, 200, spread=3)
    quantised = quantise_fp8(x, FP8_BLOCK)
    assert torch.equal(dequantise(quantised.mT), dequantise(quantised).mT)
    columns = quantise_fp8(x.mT)
    assert torch.equal(dequantise(columns.mT), dequantise(columns).mT)


def test_stored_entries_keep_rotated_channels() -> None:
    kv = wide(2, 3 * 512, spread=4).view(2, 3, 512).requires_grad_()
    stored = stored_entry(kv, 64)
    assert torch.equal(stored[..., 448:], kv[..., 448:])
    plain = kv.detach()[..., :448].flatten(0, 1)
    assert torch.equal(stored[..., :448].flatten(0, 1), by_hand(plain, KV_TILE, FP8_VALUES)[0])
    weights = torch.randn_like(kv)
    stored.backward(weights)
    assert kv.grad is not None and torch.equal(kv.grad, weights)


def test_rotation_spreads_and_keeps_products() -> None:
    q, k = wide(7, 128, seed=1, spread=3).double(), wide(9, 128, seed=2, spread=3).double()
    signs = [[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    matrix = torch.tensor(signs, dtype=torch.float64) / math.sqrt(128)
    assert torch.allclose(hadamard(q), q @ matrix) and torch.allclose(hadamard(q) @ hadamard(k).T, q @ k.T)
    outlier = torch.zeros(1, 128)
    outlier[0, 5] = 100
    assert torch.allclose(rotated_fp4(outlier).float().abs(), torch.tensor(8.0), rtol=0.2)
    x = wide(4, 128, spread=0).requires_grad_()
    rotated = rotated_fp4(x)
    assert rotated.dtype == torch.bfloat16 and torch.equal(rotated.float(), round_fp4(hadamard(x.detach())))
    rotated.float().backward(torch.ones(4, 128))
    assert x.grad is not None
    assert torch.allclose(x.grad, hadamard(torch.ones(4, 128)), atol=1e-5)
