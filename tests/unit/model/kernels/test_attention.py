"""Shared-KV attention: what queries see, in each of its forms; the kernels beside fp64.

The kernels' tests run on a Hopper GPU, or with TRITON_INTERPRET=1 and Triton installed on any computer, in
fp16 then: the interpreter does not multiply bf16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.kernels import attention as module
from model.kernels import shared_kv, shared_kv_backward
from model.kernels.attention import Seen, attention_and_mass, shared_kv_attention
from model.kernels.gpu import triton
from tests.tiny import relative

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, DTYPE = ("cpu", torch.float16) if INTERPRETED else ("cuda", torch.bfloat16)
with_kernels: Any = pytest.mark.usefixtures("kernels") if INTERPRETED else pytest.mark.gpu
NAMES = ("output", "mass", "q", "kv", "entries", "sinks")
ALONE = ("output", "q", "kv", "sinks")  # without entries


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runs_kernels", lambda x: x.dtype != torch.float64)


class Case(NamedTuple):
    documents: list[int]  # lengths; they repeat until the row is full
    length: int
    heads: int = 4
    channels: int = 64
    rate: int = 4  # tokens for each entry
    window: int = 16
    chosen: str | int | None = None  # "mask", or how many indices
    batch: int = 1
    halo: bool = False  # tokens of a part before
    size: float = 1.0  # of queries: how sharp the softmax is


CASES = [
    Case([37], 37),
    Case([7, 1, 20, 2], 41, heads=3, batch=2),
    Case([7, 1, 20, 2], 41, heads=3, batch=2, chosen="mask"),
    Case([7, 1, 20, 2], 41, heads=3, batch=2, chosen=3),
    Case([70, 1, 5], 79, rate=2, chosen=2, window=5),
    Case([33], 33, rate=1, window=0),
    Case([3], 3, chosen=8),  # top-k > T = 0
    Case([1], 1),
    Case([37], 37, rate=100),  # no entries: a window alone
    Case([40], 30, halo=True, rate=2, chosen=20),
    Case([25], 25, heads=70, rate=1, chosen=9),
    Case([25], 25, heads=64, rate=2, chosen="mask"),
    Case([50], 50, size=40.0, rate=2, chosen=7),
    Case([50], 50, size=40.0, rate=2),
    Case([17], 17, heads=1, channels=128, rate=2),
]
ON_GPU = [
    Case([700, 1, 300], 1500, heads=64, channels=512, window=128),
    Case([700, 1, 300], 1500, heads=8, channels=512, window=128, rate=2000),
    Case([700, 1, 300], 1500, heads=64, channels=512, window=128, chosen=64),
    Case([700, 1, 300], 1500, heads=32, channels=512, window=128, chosen="mask", batch=2),
    Case([1000], 1000, heads=128, channels=512, window=128, chosen=100),
    Case([1000], 1000, heads=128, channels=512, window=128, rate=128),
    Case([900], 900, heads=5, channels=256, window=128),
]


def inputs(case: Case) -> tuple[dict[str, Tensor], Seen, Tensor, Tensor]:
    """Tensors in fp64 with numbers that DTYPE has, who sees which entries, positions, output gradient."""
    generator = torch.Generator().manual_seed(case.length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPE).double()

    before = case.window if case.halo else 0
    sizes = (case.documents * case.length)[: case.length]
    positions = torch.cat([torch.arange(size) for size in sizes])[: before + case.length][before:]
    positions = positions.repeat(case.batch, 1)
    complete = ((positions + 1) % case.rate == 0).cumsum(1)
    seen = Seen(complete - (positions - before * case.halo + 1).clamp(min=0) // case.rate, complete)
    if case.halo:
        seen = Seen(torch.zeros_like(complete), complete)
    slots = case.length // case.rate
    if case.chosen == "mask":
        seen = seen._replace(chosen=torch.rand(case.batch, case.length, slots, generator=generator) < 0.5)
    elif case.chosen is not None:
        seen = seen._replace(chosen=some_indices(seen.mask(slots), int(case.chosen), generator))
    tensors = {
        "q": case.size * random(case.batch, case.length, case.heads, case.channels),
        "kv": random(case.batch, before + case.length, case.channels),
        "entries": random(case.batch, slots, case.channels),
        "sinks": random(case.heads),
    }
    return tensors, seen, positions, random(*tensors["q"].shape)


def some_indices(visible: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` visible entries of each query, ascending, then -1; of some queries fewer, or none."""
    chosen = torch.full((*visible.shape[:2], count), -1, dtype=torch.int32)
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in visible.shape[:2])).tolist():
        slots = visible[b, t].nonzero().flatten()
        picked = slots[torch.randperm(len(slots), generator=generator)][: count * min(t % 7, 3) // 3]
        chosen[b, t, : len(picked)] = picked.sort().values
    return chosen


def results(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Output, mass and all gradients; without entries those that are left."""
    tensors, seen, positions, grad = inputs(case)
    tensors = {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}
    if dtype != torch.float64:
        tensors["sinks"] = tensors["sinks"].detach().float().requires_grad_()
    chosen = None if seen.chosen is None else seen.chosen.to(device)
    seen = Seen(seen.first.to(device), seen.end.to(device), chosen)
    q, kv, entries, sinks = tensors.values()
    if not entries.shape[1] and seen.chosen is None:
        out = shared_kv_attention(q, kv, None, None, sinks, positions.to(device), case.window)
        return out, *torch.autograd.grad(out, (q, kv, sinks), grad.to(device, dtype))
    out, mass = attention_and_mass(q, kv, entries, seen, sinks, positions.to(device), case.window)
    assert out.dtype == dtype and not mass.requires_grad
    return out, mass, *torch.autograd.grad(out, (q, kv, entries, sinks), grad.to(device, dtype))


@pytest.fixture(params=["masked", "gathered", "repeatable"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How kernels read selected entries."""
    monkeypatch.setattr(module, "GATHER_ABOVE", 1000 if request.param == "masked" else -1)
    monkeypatch.setattr(shared_kv_backward, "PARTIAL_BYTES", 1 << 13)  # several chunks
    usual = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param == "repeatable", warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(usual)


@with_kernels
@pytest.mark.parametrize("case", CASES if INTERPRETED else CASES + ON_GPU, ids=str)
def test_kernels(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half as far again from fp64 as the reference in the same dtype, and a quarter of its epsilon.

    With large logits that half is needed, and for sinks, whose gradient is all of it, a whole epsilon: delta
    is taken from the rounded output.
    """
    if way != "masked" and not isinstance(case.chosen, int):
        pytest.skip("only entries selected by index can be gathered")
    calls: list[Tensor] = []
    forward = shared_kv.forward

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[5])
        return forward(*arguments)

    monkeypatch.setattr(shared_kv, "forward", counted)
    ours, exact = results(case, DTYPE, DEVICE), results(case, torch.float64, DEVICE)
    if isinstance(case.chosen, int):
        assert calls[0].dtype == (torch.bool if way == "masked" else torch.int32)
    monkeypatch.setattr(module, "runs_kernels", lambda x: False)
    reference = results(case, DTYPE, DEVICE)
    assert len(calls) == 1
    rounding = torch.finfo(DTYPE).eps / 4
    for name, a, b, wanted in zip(NAMES if len(ours) == 6 else ALONE, ours, reference, exact, strict=True):
        assert a.shape == wanted.shape and a.isfinite().all(), name
        allowed = 1.5 * relative(b, wanted) + (4 if name == "sinks" else 1) * rounding
        assert relative(a, wanted) <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_the_same_bits_every_time(case: Case) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = results(case, DTYPE, DEVICE)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(results(case, DTYPE, DEVICE), first))
    finally:
        torch.use_deterministic_algorithms(False)


@with_kernels
@pytest.mark.parametrize("chosen", [None, "mask", 3])
def test_operators(chosen: str | int | None) -> None:
    """Schemas, shapes without data and autograd of the operators, as torch.compile relies on them."""
    case = Case([7, 1, 20, 2], 20, chosen=chosen)
    tensors, seen, positions, _ = inputs(case)
    q, kv, entries, sinks = (x.to(DEVICE, DTYPE).requires_grad_() for x in tensors.values())
    end = torch.arange(1, 21).expand(1, -1)
    near = torch.stack((end - (positions + 1).clamp(max=16), end), -1).int().to(DEVICE)
    far = torch.stack((seen.first, seen.end), -1).int().to(DEVICE)
    where = None if seen.chosen is None else seen.chosen.to(DEVICE)
    arguments = (q, kv, near, entries, far, where, sinks.detach().float().requires_grad_())
    torch.library.opcheck(shared_kv.forward, arguments)
    out, lse = shared_kv.forward(*arguments)
    fixed = [None if x is None else x.detach() for x in (*arguments, out, lse)]
    torch.library.opcheck(shared_kv_backward.backward, (out.detach(), *fixed, True))
    torch.library.opcheck(shared_kv.entry_mass, (fixed[0], fixed[3], far, where, fixed[-1]))


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.chosen, int)], ids=str)
def test_indices_are_masks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference: the same numbers, the mass taken at the indices."""
    monkeypatch.setattr(module, "runs_kernels", lambda x: False)
    by_index = results(case, torch.float64, "cpu")
    _, seen, _, _ = inputs(case)
    mask = seen.mask(case.length // case.rate)
    assert seen.chosen is not None and torch.equal(mask.sum(-1), (seen.chosen >= 0).sum(-1))
    plain = inputs

    def masked(case: Case) -> Any:
        tensors, seen, *rest = plain(case)
        return tensors, Seen(torch.zeros_like(seen.first), torch.full_like(seen.end, 99), mask), *rest

    monkeypatch.setitem(globals(), "inputs", masked)
    by_mask = results(case, torch.float64, "cpu")
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(by_index, by_mask)) if i != 1)
    at = seen.chosen.long()
    for b, t, j in (at >= 0).nonzero().tolist():
        assert by_index[1][b, t, j] == by_mask[1][b, t, at[b, t, j]] > 0
    assert not by_index[1][at < 0].any()


def test_shapes_without_data() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, kv, entries = (
            torch.empty(*shape).bfloat16() for shape in ((2, 9, 3, 64), (2, 25, 64), (2, 4, 64))
        )
        span, sinks, chosen = torch.empty(2, 9, 2).int(), torch.empty(3), torch.empty(2, 9, 5).int()
        out, lse = shared_kv.forward(q, kv, span, entries, span, chosen, sinks)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (2, 9, 3) and lse.dtype == torch.float32
        grads = shared_kv_backward.backward(out, q, kv, span, entries, span, chosen, sinks, out, lse, False)
        assert [g.shape for g in grads] == [x.shape for x in (q, kv, entries, sinks)]
        assert shared_kv.entry_mass(q, entries, span, chosen, lse).shape == (2, 9, 5)
        assert shared_kv.entry_mass(q, entries, span, None, lse).shape == (2, 9, 4)
