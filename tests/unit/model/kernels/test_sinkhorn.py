"""Sinkhorn's kernels beside fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.kernels.sinkhorn import sinkhorn
from tests.unit.model.kernels.cases import DEVICES, distance

EPS = 1e-6


def by_kernels(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.ops.fourfold.sinkhorn(logits, iterations, eps)[0]


def results(balance, logits: Tensor, upstream: Tensor, iterations: int) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """comb and the gradient of logits."""
    leaf = logits.detach().clone().requires_grad_()
    comb = balance(leaf, iterations, EPS)
    return comb.detach(), torch.autograd.grad(comb, leaf, upstream.to(comb))[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("shape", [(2, 100, 4, 4), (1, 1, 2, 2), (3, 64, 8, 8)])
def test_kernels(shape: tuple[int, ...], iterations: int, spread: float, device: str) -> None:
    generator = torch.Generator().manual_seed(iterations)
    logits, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    logits *= spread
    exact = results(sinkhorn, logits.double(), upstream, iterations)
    reference = results(sinkhorn, logits, upstream, iterations)
    ours = results(by_kernels, logits.to(device), upstream.to(device), iterations)
    for found, near, wanted in zip(ours, reference, exact, strict=True):
        assert found.shape == near.shape and found.dtype == torch.float32
        assert distance(found, wanted) <= 2 * distance(near, wanted) + 4e-6


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device: str) -> None:
    logits = torch.randn(3, 5, 4, 4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fourfold.sinkhorn.default, (logits, 3, EPS))
    comb, divisors = torch.ops.fourfold.sinkhorn(logits.detach(), 3, EPS)
    torch.library.opcheck(torch.ops.fourfold.sinkhorn_backward.default, (comb, comb, divisors, EPS))


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 9, 4, 4, requires_grad=True)
        comb, divisors = torch.ops.fourfold.sinkhorn(logits, 20, EPS)
        assert comb.shape == logits.shape and divisors.shape == (39, 18, 4)
        assert torch.autograd.grad(comb.sum(), logits)[0].shape == logits.shape
