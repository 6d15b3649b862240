"""Gated pooling: kernels beside fp64 and the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.kernels import gated_pool as kernels
from model.kernels.pooling import gated_pool
from tests.unit.model.kernels.cases import DEVICES, distance, operand_dtype, packed_layout

CSA = ([[1, 3, 17, 2, 40], [61, 3]], 73), ([[3]], 4), ([[200]], 203)
HCA = ([[300, 130], [5, 200, 140]], 440), ([[127]], 128)
CASES = [("c", *case) for case in CSA] + [("sh", *case) for case in HCA]
CHANNELS = 72  # no multiple of a block


def pooled(pool: Callable[..., Tensor], inputs: list[Tensor], rest: tuple, upstream: Tensor) -> list[Tensor]:
    """Entries and the gradients of kv, gate and bias. Slots without an entry have none, and give none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    entries = pool(*leaves, *rest)
    used = (upstream != 0).any(-1, keepdim=True).to(entries.device)
    return [entries.detach() * used, *torch.autograd.grad(entries, leaves, upstream.to(entries))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "rows", "length"), CASES)
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_kernels(
    kind: str, rows: list[list[int]], length: int, spread: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slots,) = packed_layout(kind, rows, length).slots.values()
    generator, overlap = torch.Generator().manual_seed(length), kind == "c"
    shape = len(rows), length, CHANNELS * (1 + overlap)
    dtype, rate = operand_dtype(device), slots.tokens.shape[2]
    kv, gate = torch.randn(shape, generator=generator), spread * torch.randn(shape, generator=generator)
    bias = torch.randn(rate, shape[2], generator=generator)
    made = torch.arange(slots.tokens.shape[1]) < slots.end[:, -1:]  # [B, T]
    upstream = torch.randn(*slots.tokens.shape[:2], CHANNELS, generator=generator) * made.unsqueeze(-1)
    operands = [kv.to(dtype), gate.to(dtype), bias]
    rest = slots.tokens, slots.chained if overlap else None
    upstream = upstream.to(dtype)
    exact = pooled(gated_pool, [x.double() for x in operands], rest, upstream)
    reference = pooled(gated_pool, operands, rest, upstream)
    on_device = tuple(None if x is None else x.to(device) for x in rest)
    for blocks in (1, 4):
        monkeypatch.setattr(kernels, "BACKWARD", kernels.BACKWARD._replace(blocks=blocks))
        ours = pooled(kernels.pool, [x.to(device) for x in operands], on_device, upstream)
        for found, near, wanted in zip(ours, reference, exact, strict=True):
            assert found.dtype == near.dtype and found.shape == near.shape
            assert distance(found, wanted) <= 1.1 * distance(near, wanted) + 1e-6


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        kv, gate = (torch.empty(2, 9, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        bias, tokens = torch.empty(4, 64, requires_grad=True), torch.empty(2, 2, 4, dtype=torch.int64)
        for chained, channels in ((None, 64), (torch.empty(2, 2, dtype=torch.bool), 32)):
            entries = kernels.pool(kv, gate, bias, tokens, chained)
            assert entries.shape == (2, 2, channels) and entries.dtype == torch.bfloat16
            for found, x in zip(torch.autograd.grad(entries.sum(), (kv, gate, bias)), (kv, gate, bias)):
                assert found.shape == x.shape and found.dtype == x.dtype
