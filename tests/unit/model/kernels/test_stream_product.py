"""Products with the streams beside fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.kernels import stream_product as stream_products
from model.kernels.stream_product import stream_product
from tests.unit.model.kernels.cases import DEVICES, INTERPRETED, distance

NARROW = torch.float16 if INTERPRETED else torch.bfloat16  # numpy has no bf16; weights suit both


def by_kernels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fourfold.stream_product(x, weight)


def inputs(tokens: int, count: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, and what comes back to product and mean."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight, product, mean = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, count), (outputs, count), (tokens, outputs), (tokens, 1))
    )
    x = (x * torch.rand(tokens, 1, generator=generator)).to(NARROW)
    return x, 4 * weight, product, count * mean  # gradients of x through product and mean are of one size


def results(function, x: Tensor, weight: Tensor, *grads: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Product, mean, and gradients of x and of the weight."""
    leaves = [y.detach().clone().requires_grad_() for y in (x, weight)]
    found = function(*leaves)
    upstream = [grad.to(y).view_as(y) for grad, y in zip(grads, found, strict=True)]
    return [y.detach() for y in (*found, *torch.autograd.grad(found, leaves, upstream))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outputs", [4, 24])
@pytest.mark.parametrize(("tokens", "count"), [(1, 128), (64, 256), (200, 2048)])
@pytest.mark.parametrize("programs", ["many", "few"])
def test_kernels(
    programs: str, tokens: int, count: int, outputs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp64 as products in fp32 are; few programs sum up more each."""
    if programs == "few":
        monkeypatch.setattr(stream_products, "FORWARD", 1)
        monkeypatch.setattr(stream_products, "BACKWARD", 1)
    x, weight, *grads = inputs(tokens, count, outputs)
    exact = results(stream_product, x.double(), weight.double(), *grads)
    reference = results(stream_product, x, weight, *grads)
    ours = results(by_kernels, *(y.to(device) for y in (x, weight, *grads)))
    for found, near, wanted in zip(ours, reference, exact, strict=True):
        assert found.dtype == near.dtype
        times = 2 if near.dtype == torch.float32 else 1.1  # both are rounded to x's dtype
        assert distance(found.view_as(near), wanted) <= times * distance(near, wanted) + 5e-7


@pytest.mark.parametrize("shape", [(0, 5, 128), (2, 0, 128)], ids=str)
def test_no_tokens(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_products, "runs_kernels", lambda _: True)
    product, mean = stream_product(torch.empty(shape, dtype=torch.bfloat16), torch.empty(24, 128))
    assert product.shape == (*shape[:-1], 24) and mean.shape == (*shape[:-1], 1)


@pytest.mark.gpu
def test_repeatable_bit_for_bit() -> None:
    arguments = [y.cuda() for y in inputs(1000, 8192, 24)]
    first, again = (results(by_kernels, *arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device: str) -> None:
    x, weight, *grads = (y.to(device) for y in inputs(70, 256, 24))
    leaves = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.fourfold.stream_product.default, leaves)
    backward = torch.ops.fourfold.stream_product_backward.default
    torch.library.opcheck(backward, (x.detach(), weight.detach(), grads[0], grads[1].flatten()))


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        x = torch.empty(70, 512, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(24, 512, requires_grad=True)
        product, mean = by_kernels(x, weight)
        assert product.shape == (70, 24) and mean.shape == (70,)
        grads = torch.autograd.grad(product.sum() + mean.sum(), (x, weight))
        assert [g.shape for g in grads] == [x.shape, weight.shape]
