"""Predicted memory where a GPU will run the kernels: single operations by hand, and whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model.fp8 import fp8_expert_mlp, fp8_linear
from model.kernels.attention import Seen, attention_and_mass, shared_kv_attention
from model.kernels.gpu import BODIES, has_kernels, launched, operator, planned_for_kernels, runs_kernels
from model.kernels.indexer import index_loss, select_indices
from tests.unit.train.test_memory import recomputing, run_config
from train import recompute
from train.memory import MemTracker, predict

BF16, TILE = torch.bfloat16, 128
SHAPED: dict[str, Any] = {
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
}


@contextmanager
def counted() -> Iterator[MemTracker]:
    """Counts on the meta device as if it were a Hopper GPU."""
    with planned_for_kernels(), MemTracker() as tracker, torch.device("meta"):
        yield tracker


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def blocks(*sizes: int) -> int:
    """Bytes of tensors in blocks of 512."""
    return sum(-(-size // 512) * 512 for size in sizes)


def test_only_while_planned() -> None:
    meta, cpu = torch.empty(1, device="meta"), torch.empty(1)
    with planned_for_kernels():
        with planned_for_kernels(False):
            assert not runs_kernels(meta)
        assert runs_kernels(meta) and not runs_kernels(cpu)
    assert not runs_kernels(meta) and not has_kernels(cpu.device)


def test_kernels_are_launched_on_real_tensors_only() -> None:
    seen: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: seen.append((grid, *args, constants))

    kernel, x = launched(Kernel()), torch.empty(1)
    kernel[(2,)](torch.empty(1, device="meta"), 3, WARPS=4)
    assert not seen
    kernel[(2,)](x, 3, WARPS=4)
    assert seen == [((2,), x, 3, {"WARPS": 4})]


def test_what_an_operator_allocates_meanwhile() -> None:
    @operator("test_scratch")
    def body(x: Tensor) -> Tensor:
        parts = x.new_empty(100, len(x))
        return parts.sum(0)

    torch.library.register_fake("fourfold::test_scratch", torch.empty_like)
    with counted() as tracker:
        x = torch.empty(1000, device="meta")
        before = tracker.restart()
        out = body(x)
        assert tracker.peak - before == blocks(4 * 100 * 1000, 4 * 1000)
        assert tracker.live - before == blocks(4 * 1000)
    del BODIES[body], out


@pytest.mark.parametrize("chosen", [0, 32])
def test_attention(chosen: int) -> None:
    """No logits; gradients of keys are added up from parts in fp32, those of gathered entries are not."""
    length, heads, channels, slots = 512, 8, 64, 128
    rows, keys = length * heads, length * channels
    with counted() as tracker:
        q, kv, entries = leaf(1, length, heads, channels), leaf(1, length, channels), leaf(1, slots, channels)
        sinks, span = leaf(heads, dtype=torch.float32), torch.zeros(1, length, dtype=torch.int64)
        indices = torch.empty(1, length, chosen, dtype=torch.int32) if chosen else None
        before = tracker.restart()
        out = shared_kv_attention(q, kv, entries, Seen(span, span, indices), sinks, span, 128)
        output, lse, spans = 2 * rows * channels, 4 * rows, 2 * 2 * 4 * length
        assert tracker.live - before == blocks(output, lse, spans)
        before = tracker.restart()
        out.sum().backward()
        # dout; then what stays: dq, delta, dk of the window [parts, S, C] fp32 with its sum and rounded.
        parts = 1024 // (length // 64)
        expected = output + output + lse + 4 * parts * keys + 4 * keys
        assert tracker.peak - before == pytest.approx(expected, rel=0.01)
        gradients = 2 * (rows * channels + keys + slots * channels) + 4 * heads
        assert tracker.live - before == pytest.approx(gradients - lse - spans, abs=2048)  # `out` is held


def test_mass_of_many_heads() -> None:
    """Every 64 heads add up their own, then these are added."""
    length, heads, channels, slots, chosen = 256, 128, 64, 512, 64
    with counted() as tracker, torch.no_grad():
        q, kv, entries = leaf(1, length, heads, channels), leaf(1, length, channels), leaf(1, slots, channels)
        span, sinks = torch.zeros(1, length, dtype=torch.int64), leaf(heads, dtype=torch.float32)
        seen = Seen(span, span, torch.empty(1, length, chosen, dtype=torch.int32))
        before = tracker.restart()
        out, mass = attention_and_mass(q, kv, entries, seen, sinks, span, 128)
        mass_bytes = 4 * length * chosen
        assert mass.shape == (1, length, chosen)
        assert tracker.live - before == out.nbytes + mass_bytes
        spans, lse = (2 * 2 * 4 + 8) * length, 4 * length * heads  # and where the window's spans end, int64
        # What is returned is made before the parts: two of them, and their sum.
        assert tracker.peak - before == out.nbytes + lse + spans + (1 + 2 + 1) * mass_bytes


def test_index_loss() -> None:
    """Scores of all entries once, not of each head; then slopes in bf16."""
    length, heads, channels, slots = 256, 64, 128, 1024
    with counted() as tracker:
        q, k, weights = leaf(1, length, heads, channels), leaf(1, slots, channels), leaf(1, length, heads)
        mass = torch.empty(1, length, slots)
        attended = torch.empty(1, length, slots, dtype=torch.bool)
        real = torch.empty(1, length, dtype=torch.bool)
        before = tracker.restart()
        loss = index_loss(q, k, weights, mass, attended, real)
        every = length * slots
        assert tracker.peak - before == pytest.approx((2 + 4) * every, rel=0.03)
        assert tracker.live - before == pytest.approx(2 * every, rel=0.03)
        before = tracker.restart()
        loss.backward()
        # Gradients, and the keys' in parts of 64 queries, in fp32 with their sum.
        parts = (length // 64 + 1) * 4 * slots * channels
        gradients = 2 * (length * heads * (channels + 1) + slots * channels)
        assert tracker.peak - before == pytest.approx(parts + gradients, rel=0.03)


def test_selection_holds_some_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.index_select.SCORES_AT_ONCE", 1 << 16)
    with counted() as tracker:
        q, k, weights = torch.empty(1, 256, 64, 128, dtype=BF16), leaf(1, 1024, 128), leaf(1, 256, 64)
        span = torch.zeros(1, 256, dtype=torch.int32)
        before = tracker.restart()
        indices = select_indices(q, k, weights, span, span, 128)
        assert tracker.live - before == indices.nbytes == 4 * 256 * 128
        assert tracker.peak - before == indices.nbytes + 4 * (1 << 16)


def test_linear_in_fp8() -> None:
    """Kept: x transposed and w transposed, a byte a number, with a scale for every 128 or 128 x 128."""
    rows, inner, outer = 1024, 512, 384
    with counted() as tracker:
        x, weight = leaf(rows, inner), leaf(outer, inner)
        before = tracker.restart()
        y = fp8_linear(x, weight, "attention")
        kept = [rows * inner, 4 * rows * inner // TILE, inner * outer, 4 * inner * outer // TILE**2]
        assert tracker.live - before == blocks(*kept, 2 * rows * outer)
        cast = blocks(*kept) + blocks(*kept)  # as they are and transposed
        assert tracker.peak - before == cast + 2 * rows * outer + 512  # and where the only group ends
        before = tracker.restart()
        y.backward(torch.empty_like(y))
        assert tracker.live - before == 2 * (rows * inner + outer * inner) - blocks(*kept)


def test_experts_in_fp8() -> None:
    """By hand, at the last moment of backward: all that forward kept, gradients, and their casts."""
    rows, dim, width, experts = 1024, 256, 128, 4
    padded = TILE * (rows // TILE + experts)  # each expert's rows begin a tile

    def eight(rows: int, columns: int, block: int = 1) -> int:
        return blocks(rows * columns, 4 * -(-rows // block) * (columns // TILE))

    weights = 2 * width * dim, dim * width  # of one expert
    with counted() as tracker:
        x, scale = leaf(rows, dim), leaf(rows, dtype=torch.float32)
        gate_up, down = leaf(experts, 2 * width, dim), leaf(experts, dim, width)
        offsets = torch.empty(experts, dtype=torch.int32)
        before = tracker.restart()
        y = fp8_expert_mlp(x, scale, offsets, gate_up, down, 10.0)
        both = 2 * rows * 2 * width
        kept = eight(dim, padded) + eight(width, padded) + both
        kept += sum(blocks(experts * w, 4 * experts * w // TILE**2) for w in weights)
        assert tracker.live - before == kept + 2 * rows * dim
        grad = torch.empty_like(y)
        before = tracker.restart()
        y.backward(grad)
        gradients = 2 * rows * dim + 4 * rows + 2 * experts * sum(weights)
        cast = eight(rows, 2 * width) + eight(2 * width, padded)  # of the gradient of gates and ups
        assert tracker.peak - before == gradients + cast + 2 * rows * width
        assert tracker.live - before == gradients - kept


class Compared(MemTracker):
    """Asserts of every operator that it returns what its fake says; `seen`: which."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in BODIES:
            self.seen.add(func)
            with planned_for_kernels():
                fake = func(*args, **(kwargs or {}))
            for x, y in zip(tree_leaves(out), tree_leaves(fake), strict=True):
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        return out


@pytest.mark.parametrize("how", recompute.HOW)
def test_every_operator_returns_what_its_fake_says(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recomputing(run_config("schf", "bfloat16", precision="fp4_qat", **SHAPED), how)
    trackers: list[Compared] = []

    def compared() -> Compared:
        trackers.append(Compared())
        return trackers[-1]

    monkeypatch.setattr("train.memory.MemTracker", compared)
    with planned_for_kernels():
        predict(config)
    seen = set().union(*(tracker.seen for tracker in trackers))
    assert set(BODIES) - seen == {torch.ops.fourfold.fp4_values.default}  # of the optimizer's step


def test_runs_with_kernels_need_less() -> None:
    """At a length where logits are most of what the references need."""
    long = run_config("schc", "bfloat16", rows=1, num_nextn_predict_layers=0, index_topk=32, **SHAPED)
    long = replace(long, train=replace(long.train, seq_len=1024, batch_tokens=2048))
    reference = predict(long).activations
    with planned_for_kernels():
        bf16 = predict(long).activations
    assert bf16 < 0.7 * reference
