"""Against the polar factor U V^T of an fp64 singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optim.newton_schulz import newton_schulz

SHAPES = [(1, 1), (1, 9), (48, 48), (24, 96), (96, 24), (4, 256), (257, 33)]


def with_singular_values(n: int, m: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its polar factor; fp64."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64, generator=generator)).Q
    return u * values @ v.mT, u @ v.mT


def spectrum(kind: str, size: int, condition: float) -> Tensor:
    if kind == "log":
        return torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    values = torch.ones(size, dtype=torch.float64)  # one small among many large: the hardest
    values[-1] = 1 / condition
    return values


@pytest.mark.parametrize("kind", ["log", "one small"])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_polar_factor_in_fp32_and_bf16(n: int, m: int, condition: float, kind: str) -> None:
    x, polar = with_singular_values(n, m, spectrum(kind, min(n, m), condition))
    exact = newton_schulz(x.float())
    assert exact.dtype == torch.float32
    assert (torch.linalg.svdvals(exact.double()) - 1).abs().max() < 0.01
    assert (exact - polar).norm() < 1e-3 * polar.norm()
    coarse = newton_schulz(x.float(), torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, coarse.bfloat16().float())  # its products were bf16
    assert (torch.linalg.svdvals(coarse.double()) - 1).abs().max() < 0.01
    if condition <= 30:
        assert (coarse - polar).norm() < 0.05 * polar.norm()


def test_smallest_singular_value_that_converges() -> None:
    ratios = torch.tensor([2.4e-5, 1e-4, 1e-3, 1e-2], dtype=torch.float64)
    rest = (1 - ratios.square().sum()).sqrt()
    x, _ = with_singular_values(8, 8, torch.cat([rest[None], ratios]))
    values = torch.linalg.svdvals(newton_schulz(x))
    assert (values[:5] - 1).abs().max() < 0.01
    too_small, _ = with_singular_values(8, 8, torch.tensor([1.0, 1.8e-5], dtype=torch.float64))
    assert torch.linalg.svdvals(newton_schulz(too_small))[1] < 0.99


def test_a_batch_equals_its_matrices_one_by_one_and_a_tall_one_its_transpose() -> None:
    x = torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(0))
    batched = newton_schulz(x)
    assert batched.shape == x.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], newton_schulz(x[i, j]), atol=2e-6, rtol=0)
    torch.testing.assert_close(newton_schulz(x.mT.contiguous()), batched.mT, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_rank_deficient_matrices(dtype: torch.dtype) -> None:
    assert newton_schulz(torch.zeros(3, 4, 5), dtype).count_nonzero() == 0
    x, polar = with_singular_values(16, 40, torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    mixed = torch.stack([torch.zeros(16, 40), x.float()])
    result = newton_schulz(mixed, dtype)
    assert result[0].count_nonzero() == 0
    values = torch.linalg.svdvals(result[1].double())
    assert (values[:3] - 1).abs().max() < 0.015
    if dtype == torch.bfloat16:  # rounding grows directions that held nothing, as the docstring says
        assert (values - 1).abs().max() < 0.015
    else:
        assert values[3:].max() < 0.01
        assert (result[1] - polar).norm() < 0.01 * polar.norm()


@pytest.mark.parametrize("scale", [1e-30, 3e-23, 1e-20, 1e-16, 1e-8, 1e8, 1e16])
def test_any_size_is_safe(scale: float) -> None:
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(x * scale)
    assert torch.linalg.svdvals(result.double()).max() < 1.01
    if scale > 1e-14:
        torch.testing.assert_close(result, newton_schulz(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_input_shows(bad: float) -> None:
    x = torch.ones(4, 4)
    x[1, 2] = bad
    assert newton_schulz(x).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 5, 5)])
def test_input_is_left_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    result = newton_schulz(x)
    assert torch.equal(x, before)
    assert result.dtype == dtype
