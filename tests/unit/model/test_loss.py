"""Cross-entropy from hidden states, against logits held whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.loss
from model.loss import linear_cross_entropy, token_cross_entropy
from tests.tiny import relative


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 13, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(21, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 21, (2, 13), generator=generator)
    labels[:, 3:6] = -100
    labels[0, 0] = 0  # the class at which ignored labels are clamped
    return hidden, weight, labels


@pytest.mark.parametrize("budget", [1 << 26, 21 * 5, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_value_and_gradients(
    budget: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in chunks with a remainder, and row by row; the upstream gradient is 3."""
    monkeypatch.setattr(model.loss, "LOGIT_BUDGET", budget)
    hidden, weight, labels = inputs(dtype)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    wanted = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.autograd.grad(3 * wanted, (hidden, weight))
    assert relative(loss, wanted) <= tolerance and int(count) == 20
    for mine, theirs in zip(ours, expected):
        assert mine.dtype == dtype and relative(mine, theirs) <= tolerance
    assert not ours[0][:, 3:6].any()


def test_chunks_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.loss, "LOGIT_BUDGET", 21 * 5)
    rows: list[int] = []
    plain = F.linear

    def counted(h: Tensor, w: Tensor) -> Tensor:
        rows.append(len(h))
        return plain(h, w)

    monkeypatch.setattr(F, "linear", counted)
    linear_cross_entropy(*inputs())
    assert rows == [5, 5, 5, 5, 5, 1]


def test_one_gradient_at_a_time() -> None:
    hidden, weight, labels = inputs()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    (only,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels)[0], hidden)
    assert torch.equal(only, both[0])
    (only,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels)[0], weight)
    assert torch.equal(only, both[1])


def test_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels)[0].detach())


def test_nothing_to_predict() -> None:
    hidden, weight, labels = inputs()
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and int(count) == 0
    assert all(not grad.any() for grad in grads)  # NaN would count


def test_bf16() -> None:
    """Loss accumulated in fp32; gradients in the inputs' dtype, near the exact ones."""
    hidden, weight, labels = inputs(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(loss, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted, _ = linear_cross_entropy(exact[0], exact[1], labels)
    rounded = F.linear(hidden, weight).detach().double().flatten(0, 1)  # only the product is in bf16
    assert loss.dtype == torch.float32 and relative(loss, wanted) < 0.01
    assert relative(loss, F.cross_entropy(rounded, labels.flatten(), reduction="sum")) < 1e-6
    for mine, theirs in zip(grads, torch.autograd.grad(wanted, exact)):
        assert mine.dtype == torch.bfloat16 and relative(mine, theirs) < 0.01


def test_fp32_weight_with_bf16_hidden() -> None:
    """A head kept in fp32 gets its gradient in fp32."""
    hidden, weight, labels = inputs()
    loss, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    (grad,) = torch.autograd.grad(loss, weight)
    assert loss.dtype == grad.dtype == torch.float32


def test_validation_makes_no_gradients(monkeypatch):
    """Under no_grad no gradient of the head is made, although the head is a parameter."""
    weight = torch.nn.Parameter(torch.randn(11, 6))
    hidden, labels = torch.randn(5, 6), torch.randint(11, (5,))
    expected, _ = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("a gradient was allocated"))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels)[0], expected)


@pytest.mark.parametrize("budget", [1 << 26, 21 * 5, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_token_by_token(
    budget: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.loss, "LOGIT_BUDGET", budget)
    hidden, weight, labels = inputs(dtype)
    (total, count), scores = token_cross_entropy(hidden, weight, labels)
    expected_total, expected_count = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(total, expected_total) and torch.equal(count, expected_count)  # to the bit
    logits = hidden.detach().double() @ weight.detach().double().T
    wanted = F.cross_entropy(logits.mT, labels, reduction="none")
    assert relative(scores.loss, wanted) <= tolerance and scores.loss.dtype == dtype
    assert torch.equal(scores.counted, labels != -100) and not scores.loss[~scores.counted].any()
    assert torch.equal(scores.correct, logits.argmax(-1) == labels)
    best = logits.argmax(-1)
    assert token_cross_entropy(hidden, weight, best)[1].correct.all()
    assert not token_cross_entropy(hidden, weight, (best + 1) % 21)[1].correct.any()


def test_scores_of_bfloat16_are_fp32() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    (total, _), scores = token_cross_entropy(hidden, weight.float(), labels)
    assert torch.equal(total, linear_cross_entropy(hidden, weight.float(), labels)[0].detach())
    assert scores.loss.dtype == total.dtype == torch.float32 and not scores.loss.requires_grad
