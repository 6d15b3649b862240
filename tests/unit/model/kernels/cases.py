"""Hard inputs for casts and products, and what "equal" and "close" mean for them."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from model.kernels.gpu import triton
from model.layout import Layout, build_layout
from model.quant import Quantised, dequantise
from tests.tiny import packed_batch, tiny_config


def hard(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[R, I] of many magnitudes; in the larger also zeros, NaN, infinity, borders of scales, denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (rows, 1), generator=generator).float())
    if rows > 64:
        x[0] = 0
        x[1, ::3] = -0.0
        x[2] = 448 * x[2].sign()
        x[3] = 449 * x[3].sign()
        x[4] = 448 * 2.0**-126 * x[4].sign()
        x[5:20] = torch.randn(15, columns, generator=generator) * 2.0**-130
        x[20] = -1e-45
        x[21] = torch.linspace(-448, 448, columns)  # ties of E4M3 and of E2M1
        x[22] = torch.arange(columns) % 13 * 0.25 - 1.5
        x[23] = torch.where(torch.arange(columns) % 32 == 0, 6.0, x[22])
    if rows > 512:
        x[-3:] *= 2.0**100
        x[-1] = 3e38
        x[300, 5] = float("nan")
        x[400, columns // 2] = float("inf")
        x[401, columns // 2] = -float("inf")
    return x.to(dtype)


def plain(*shape: int, seed: int = 0) -> Tensor:
    """bf16 whose rows differ in magnitude: as any activation or gradient."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-6, 6, (*shape[:-1], 1), generator=generator).float())
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the bits of NaN."""
    a, b = a.detach().cpu().float(), b.detach().cpu().float()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(0), b.nan_to_num(0)
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def same_cast(a: Quantised, b: Quantised) -> bool:
    return a.block == b.block and same(a.values, b.values) and same(a.scales, b.scales)


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| of numbers that are NaN at the same places."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    difference = torch.linalg.vector_norm((a - b).nan_to_num(0))
    return float(difference / torch.linalg.vector_norm(b.nan_to_num(0)).clamp(min=1e-30))


def on(device: str, quantised: Quantised) -> Quantised:
    """`quantised` on another device, whose memory is laid out as it was."""
    return quantised._replace(values=quantised.values.to(device), scales=quantised.scales.to(device))


def exact(quantised: Quantised) -> Tensor:
    return dequantise(quantised, torch.float64)


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
# Where Triton kernels run: on a GPU with bf16 operands, in the interpreter with fp32 (its bf16 is not right).
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
]


def operand_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def packed_layout(kinds: str, rows: list[list[int]], length: int) -> Layout:
    """The layout of packed documents for layers of these kinds (`tests.tiny`)."""
    batch = packed_batch(rows, length)
    return build_layout(tiny_config(kinds, 0), batch["position_ids"], batch["document_ids"])
