"""Gradients in fp32: what torch says, bit for bit."""

from __future__ import annotations

import pytest
import torch

from model.kernels.accumulate import accumulated

SHAPES = [(0, 3), (1, 1), (5, 1000), (3, 64, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums(shape: tuple[int, ...], dtype: torch.dtype, device: str, transposed: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    parts = [x.mT if transposed else x for x in parts]
    total = accumulated(None, parts[0])
    assert total.dtype == torch.float32 and total.shape == parts[0].shape
    assert torch.equal(total, parts[0].float())
    wanted = parts[0].float().clone()
    for x in parts[1:]:
        assert accumulated(total, x) is total
        wanted += x
        assert torch.equal(total, wanted)
