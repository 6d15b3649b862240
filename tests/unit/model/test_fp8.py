"""FP8 products against fp64 of the same rounded operands, and which products a precision reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from model.attention import Attention
from model.fp8 import fp8_expert_mlp, fp8_linear
from model.indexer import Indexer
from model.kernels.indexer import select_entries
from model.linear import Linear, linear
from model.moe import Experts, clamped_swiglu, expert_mlp
from model.precision import Precision, products
from model.quant import FP8_BLOCK, round_fp4, round_fp8
from tests.tiny import packed_batch, relative, tiny_config, tiny_model

OFFSETS = torch.tensor([0, 130, 131, 300], dtype=torch.int32)  # an expert without rows, one with one
EXACT = [torch.float64, torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return x.to(dtype).requires_grad_()


def over_rows(x: Tensor) -> Tensor:
    """x [R, N] rounded in tiles of 128 x 1."""
    return round_fp8(x.mT.contiguous()).mT


def run(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs that have one."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad)]


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to rounding to `found`'s dtype."""
    return (
        relative(found, wanted)
        < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[found.dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(300, 200, 70), (1, 128, 256), (129, 16, 16)])
def test_linear_is_fp64_of_rounded_operands(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(outer, inner, dtype=dtype, seed=1)
    grad = random(rows, outer, dtype=dtype, seed=2).detach()
    out, x_grad, weight_grad = run(lambda x, w: fp8_linear(x, w, "attention"), grad, x, weight)
    assert out.dtype == x_grad.dtype == weight_grad.dtype == dtype
    x, weight, wide = x.detach(), round_fp8(weight.detach(), FP8_BLOCK).double(), grad
    assert close(out, round_fp8(x).double() @ weight.mT)
    assert close(x_grad, round_fp8(wide).double() @ weight)
    assert close(weight_grad, over_rows(wide).double().mT @ over_rows(x).double())
    assert relative(out, x.double() @ weight.mT) > 1e-3  # it was rounded


def test_products_of_few_bits_are_bitwise_those_of_fp64() -> None:
    """Sums that fp32 holds exactly leave no rounding but that of the operands."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randint(-8, 9, shape, generator=generator).float() * 2.0**power
        for shape, power in (((2, 70, 256), -3), ((128, 256), 5), ((2, 70, 128), -20))
    )
    x.requires_grad_(), weight.requires_grad_()
    found = run(lambda x, w: fp8_linear(x, w, "mtp"), grad, x, weight)
    wanted = run(lambda x, w: linear(x, w, "mtp"), grad.double(), x.double(), weight.double())
    assert all(torch.equal(one.double(), other) for one, other in zip(found, wanted))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (2, 3, 24)])
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    out, x_grad, weight_grad = run(
        lambda x, w: fp8_linear(x, w, "mtp"), torch.ones(*shape[:-1], 8), x, weight
    )
    assert out.shape == (*shape[:-1], 8) and x_grad.shape == shape
    assert bool(weight_grad.any()) == bool(x.numel())


@pytest.mark.parametrize("dtype", EXACT)
def test_experts_are_fp64_of_rounded_operands(dtype: torch.dtype) -> None:
    """Forward and backward step by step, every operand rounded by itself; the clamps are met."""
    rows, weights = random(300, 160, dtype=dtype), torch.rand(300, dtype=dtype, requires_grad=True)
    gate_up, down = (random(4, *shape, dtype=dtype, seed=3) for shape in ((2 * 96, 160), (160, 96)))
    grad, limit = random(300, 160, dtype=dtype, seed=4).detach(), 10.0

    def mlp(rows: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return fp8_expert_mlp(rows, weights, OFFSETS, gate_up, down, limit)

    out, rows_grad, weights_grad, first_grad, second_grad = run(mlp, grad, rows, weights, gate_up, down)
    first, second = (round_fp8(w.detach(), FP8_BLOCK) for w in (gate_up, down))
    start = 0
    whole = torch.zeros(300, 192, dtype=dtype), torch.zeros(300, 96, dtype=dtype)
    for e, stop in enumerate(OFFSETS.tolist()):
        whole[0][start:stop] = round_fp8(rows.detach())[start:stop] @ first[e].mT
        start = stop
    both, scale = whole[0].requires_grad_(), weights.detach().clone().requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    assert (gate > limit).any() and (up.abs() > limit).any()
    hidden = clamped_swiglu(gate, up, limit) * scale.unsqueeze(-1)
    start = 0
    for e, stop in enumerate(OFFSETS.tolist()):
        own = slice(start, stop)
        assert not stop > start or close(out[own], round_fp8(hidden.detach())[own] @ second[e].mT)
        expected = over_rows(grad[own]).mT @ over_rows(hidden.detach()[own])
        assert close(second_grad[e], expected) or not expected.any()
        whole[1][own] = round_fp8(grad)[own] @ second[e]
        start = stop
    both_grad, scale_grad = torch.autograd.grad(hidden, (both, scale), whole[1])
    assert close(weights_grad, scale_grad)
    start = 0
    for e, stop in enumerate(OFFSETS.tolist()):
        own = slice(start, stop)
        assert not stop > start or close(rows_grad[own], round_fp8(both_grad)[own] @ first[e])
        expected = over_rows(both_grad[own]).mT @ over_rows(rows.detach()[own])
        assert close(first_grad[e], expected) or not expected.any()
        start = stop


def test_experts_without_rows() -> None:
    inputs = [torch.zeros(0, 32), torch.zeros(0), torch.randn(4, 48, 32), torch.randn(4, 32, 24)]
    for x in inputs:
        x.requires_grad_()
    none = torch.zeros(4, dtype=torch.int32)

    def mlp(rows: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return fp8_expert_mlp(rows, weights, none, gate_up, down, 10.0)

    out, *grads = run(mlp, torch.zeros(0, 32), *inputs)
    assert out.shape == (0, 32) and not any(grad.any() for grad in grads)


def test_a_precision_reaches_its_products_and_no_others() -> None:
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1))
    batch = packed_batch([[40]], 40, depth=1)
    plain = model(**batch).losses["lm"][0].detach()
    model.use(Precision(fp8=True))
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            kept = ".compressor." in name or name.endswith("weights_proj")
            assert module.product is (linear if kept else fp8_linear), name
        if isinstance(module, Experts):
            assert module.mlp is fp8_expert_mlp
        if isinstance(module, Indexer):
            assert not module.fp4
    eight = model(**batch).losses["lm"][0].detach()
    assert eight != plain and eight == pytest.approx(plain.item(), rel=0.05)
    model.use(Precision())
    assert torch.equal(model(**batch).losses["lm"][0], plain)
    assert all(m.mlp is expert_mlp for m in model.modules() if isinstance(m, Experts))


def note(seen: list[Tensor], function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which is also put into `seen`."""
    seen.append(function(*inputs))
    return seen[-1]


def test_stored_entries_change_what_attention_reads_and_leave_gradients() -> None:
    """Window and compressed entries both: each layer type gives something else than without."""
    for layer in "sch":
        model = tiny_model(tiny_config(layer, 1))
        batch = packed_batch([[140]], 140)
        plain = model(**batch).losses["lm"][0]
        seen: list[Tensor] = []
        model.use(Precision(fp8_kv=True))
        attention = next(m for m in model.modules() if isinstance(m, Attention))
        attention.stored = partial(note, seen, attention.stored)
        loss = model(**batch).losses["lm"][0]
        assert len(seen) == 1 + (layer != "s") and loss != plain
        for kv in seen:
            rope = model.config.qk_rope_head_dim
            assert torch.equal(round_fp8(kv[..., :-rope], (1, 64)), kv[..., :-rope])
        loss.backward()
        assert all(
            p.grad is not None for n, p in model.named_parameters() if "kv_proj" in n and "indexer" not in n
        )


def test_the_indexer_ranks_rotated_fp4_in_bf16() -> None:
    model = tiny_model(tiny_config("c", index_topk=6))
    batch = packed_batch([[96]], 96)
    found: list[Tensor] = []
    indexer = next(m for m in model.modules() if isinstance(m, Indexer))
    indexer.select = partial(note, found, indexer.select)  # type: ignore[method-assign, arg-type]
    for fp4 in (False, True):
        model.use(Precision(fp4_indexer=fp4))
        model(**batch)
    exact, four = found
    assert (exact.sum(-1) == four.sum(-1)).all()  # as many, not quite the same ones
    assert not torch.equal(exact, four) and (exact & four).sum() > 0.6 * exact.sum()
    q, k, weights = torch.ones(1, 2, 1, 2), torch.ones(1, 3, 2), torch.ones(1, 2, 1)
    k[0, 2, 0] += 1e-4  # higher in fp32, level in bf16: the lower index wins
    visible = torch.ones(1, 2, 3, dtype=torch.bool)
    assert select_entries(q, k, weights, visible, 1)[0, 0].tolist() == [False, False, True]
    assert select_entries(q, k, weights, visible, 1, torch.bfloat16)[0, 0].tolist() == [True, False, False]


def test_the_table_says_what_is_computed() -> None:
    """Every flag changes its rows, and only them."""
    plain = {row[0]: row[1:] for row in products(Precision(), "bfloat16")}
    assert {value for row in plain.values() for value in row} == {"bfloat16", "float32", "none"}
    changed = {
        field.name: {
            name
            for name, *row in products(Precision(**{field.name: True}), "bfloat16")
            if tuple(row) != plain[name]
        }
        for field in fields(Precision)
    }
    assert changed["fp4_experts"] == {"routed experts"}
    assert changed["fp4_indexer"] == {"indexer: scores"}
    assert changed["fp8_kv"] == {"attention: with entries"}
    assert changed["fp8"] == {
        "attention: q_a, q_b, kv, o_b",
        "indexer: q_b",
        "routed experts",
        "shared experts",
        "MTP: e, h",
    }
    both = {row[0]: row[1:] for row in products(Precision(fp8=True, fp4_experts=True), "bfloat16")}
    assert "FP4" in both["routed experts"][0] and "FP4" not in both["routed experts"][2]


def test_fp4_weights_lose_nothing_in_fp8_products() -> None:
    weight = round_fp4(random(128, 256, seed=5).detach())
    x = random(10, 256)
    assert close(fp8_linear(x, weight, "mtp").detach(), round_fp8(x.detach()).double() @ weight.double().mT)
    assert torch.equal(round_fp8(weight, FP8_BLOCK), weight)
