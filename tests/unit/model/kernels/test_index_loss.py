"""The indexer's loss: at indices as at the mask, and kernels beside fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.kernels import index_loss as kernels
from model.kernels.index_loss import hull
from model.kernels.indexer import index_loss, mask_of, select_indices
from tests.unit.model.kernels.cases import DEVICES, distance, operand_dtype
from tests.unit.model.kernels.test_index_select import BATCHES, spans

# Of bf16 gradients: the kernels' products round what they multiply, the reference rounds its results only.
FACTOR = 2.5


def case(
    rows: list[list[int]],
    length: int,
    topk: int | None,
    scale: float = 1.0,
    heads: int = 16,
    channels: int = 32,
) -> tuple[Tensor, ...]:
    """q, k, weights, mass, attended (a mask, or indices of top-k), real queries."""
    first, end, visible = spans(rows, length)
    generator = torch.Generator().manual_seed(length)
    q = scale * torch.randn(len(rows), length, heads, channels, generator=generator)
    k = torch.randn(len(rows), visible.shape[2], channels, generator=generator)
    weights = torch.randn(len(rows), length, heads, generator=generator) / (2 * heads**0.5)
    q, k, weights = (x.bfloat16().float() for x in (q, k, weights))
    mass = torch.rand(visible.shape, generator=generator) ** 4 * visible
    mass[:, length // 2] = 0  # all of it is the window's
    real = torch.rand(len(rows), length, generator=generator) < 0.9
    if topk is None:
        return q, k, weights, mass, visible, real
    indices = select_indices(q, k, weights, first, end, topk)
    mass = mass.gather(2, indices.clamp(min=0).long()) * (indices >= 0)
    return q, k, weights, mass, indices, real


def loss_and_gradients(loss_of, q, k, weights, mass, attended, real) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, weights)]
    loss = loss_of(*leaves, mass, attended, real)
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)]


def by_kernels(*inputs: Tensor) -> Tensor:
    return torch.ops.fourfold.index_divergence(*inputs)[0].sum()


@pytest.mark.parametrize("topk", [2, 6, 100])
def test_at_indices_as_at_the_mask(topk: int) -> None:
    rows, length = BATCHES[0]
    q, k, weights, mass, indices, real = (
        x.double() if x.is_floating_point() else x for x in case(rows, length, topk)
    )
    everywhere = mass.new_zeros(*real.shape, k.shape[1] + 1)
    slot = torch.where(indices < 0, k.shape[1], indices).long()
    masked = everywhere.scatter(2, slot, mass)[..., :-1], mask_of(indices, k.shape[1]), real
    ours = loss_and_gradients(index_loss, q, k, weights, mass, indices, real)
    for found, wanted in zip(ours, loss_and_gradients(index_loss, q, k, weights, *masked), strict=True):
        assert distance(found, wanted) < 1e-13 and wanted.any()


def test_hull() -> None:
    attended = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    first, end = hull(attended.unsqueeze(0))
    assert first[0, 1:].tolist() == [1, 0, 0, 2] and end[0].tolist() == [0, 4, 1, 4, 3]


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        bf16 = torch.bfloat16
        q, k = torch.empty(2, 9, 16, 32, dtype=bf16), torch.empty(2, 7, 32, dtype=bf16)
        q.requires_grad_()
        weights, real = torch.empty(2, 9, 16), torch.empty(2, 9, dtype=torch.bool)
        for width, attended in (
            (7, torch.empty(2, 9, 7, dtype=torch.bool)),
            (3, torch.empty(2, 9, 3, dtype=torch.int32)),
        ):
            loss = by_kernels(q, k, weights, torch.empty(2, 9, width), attended, real)
            (grad,) = torch.autograd.grad(loss, q)
            assert loss.shape == () and loss.dtype == torch.float32 and grad.shape == q.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("topk", [None, 1, 6, 100])
@pytest.mark.parametrize(("rows", "length"), [*BATCHES, ([[1]], 1)])
def test_kernels(
    rows: list[list[int]], length: int, topk: int | None, deterministic: bool, device: str
) -> None:
    if topk is None and deterministic:
        pytest.skip("over all entries sums have one order anyway")
    check(case(rows, length, topk), deterministic, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("topk", [None, 6])
def test_large_scores(topk: int | None, device: str) -> None:
    check(case(*BATCHES[1], topk, scale=300.0), False, device)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("topk", [None, 100])
def test_sizes_of_v4(topk: int | None, deterministic: bool) -> None:
    check(case([[500, 1, 522], [1023]], 1023, topk, heads=64, channels=128), deterministic, "cuda")


def check(inputs: tuple[Tensor, ...], deterministic: bool, device: str) -> None:
    """Loss and every gradient as near to fp64 as the reference, but for the rounding of products in bf16."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    operands = [x.to(operand_dtype(device)) for x in inputs[:3]] + list(inputs[3:])
    exact = loss_and_gradients(index_loss, *wide)
    reference = loss_and_gradients(index_loss, *operands)
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours = loss_and_gradients(by_kernels, *(x.to(device) for x in operands))
    finally:
        torch.use_deterministic_algorithms(False)
    assert abs(float(ours[0]) - float(exact[0])) <= 1e-6 * float(exact[0]) + 1e-6 * inputs[-1].numel()
    for found, near, wanted in zip(ours[1:], reference[1:], exact[1:], strict=True):
        assert found.dtype == near.dtype and found.shape == near.shape
        assert distance(found, wanted) <= FACTOR * distance(near, wanted) + 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("topk", [None, 6])
def test_chunks_change_nothing(topk: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dk's sums are others then; loss, dq and dw are the same bit for bit."""
    inputs = case([[30], [17, 12]], 30, topk)
    operands = [x.to(device, operand_dtype(device)) for x in inputs[:3]] + [x.to(device) for x in inputs[3:]]
    found = []
    for at_once in (1 << 20, 48):  # all queries, or some, and fewer at the end
        monkeypatch.setattr(kernels, "SCORES_AT_ONCE", at_once)
        monkeypatch.setattr(kernels, "ROWS_AT_ONCE", at_once)
        torch.use_deterministic_algorithms(True)
        found.append(loss_and_gradients(by_kernels, *operands))
        torch.use_deterministic_algorithms(False)
    whole, parts = found
    assert distance(whole[2], parts[2]) < (3e-3 if device == "cuda" else 1e-6)
    assert all(torch.equal(whole[i], parts[i]) for i in (0, 1, 3))
