from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest

from data import order
from data.order import Order

LENGTHS = np.random.default_rng(0).integers(1, 90, 300)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """About ten windows an epoch, so that their borders are met."""
    monkeypatch.setattr(order, "WINDOW_TOKENS", 1500)
    monkeypatch.setattr(order, "WINDOW_ROWS", 1)


def make(seed: int = 1, **options) -> Order:
    return Order(LENGTHS, seed=seed, seq_len=32, **options)


def epochs(o: Order, n: int) -> list[list]:
    """The sequences of the first n epochs."""
    found: list[list] = [[] for _ in range(n)]
    for g in count():
        epoch = o.mark(g)[1]
        if epoch == n:
            return found
        found[epoch].append(o.sequence(g))
    raise AssertionError


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_every_token_occurs_once_an_epoch(fim_rate):
    for sequences in epochs(make(fim_rate=fim_rate), 3):
        seen: Counter = Counter()
        rearranged = set()
        for sequence in sequences:
            assert sum(p.length for p in sequence) <= 32
            for p in sequence:
                if p.cuts:
                    a, b = p.cuts
                    assert 0 <= a <= b <= LENGTHS[p.document] - 1
                    assert (p.start, p.length) == (0, LENGTHS[p.document] + 3)
                    rearranged.add(p.document)
                seen.update((p.document, t) for t in range(p.start, p.start + p.length))
        expected = Counter(
            (d, t) for d, n in enumerate(LENGTHS) for t in range(n + (3 if d in rearranged else 0))
        )
        assert seen == expected
        eligible = sum(16 <= n <= 29 for n in LENGTHS)
        assert (0.25 < len(rearranged) / eligible < 0.75) if fim_rate else not rearranged


def test_windows_are_many_and_first_epoch_counts_them():
    o = make()
    first = epochs(o, 1)[0]
    assert o.mark(len(first) - 1)[2] > 5
    assert o.first_epoch() == len(first)


def test_sequence_g_does_not_depend_on_what_was_asked_before():
    forward = [make().sequence(g) for g in range(0, 900, 37)]
    o = make()
    backward = [o.sequence(g) for g in reversed(range(0, 900, 37))]
    assert backward[::-1] == forward


@pytest.mark.parametrize("g", [0, 1, 49, 333, 700])
def test_a_mark_continues_without_planning_the_past(g, monkeypatch):
    expected = [make().sequence(i) for i in range(g, g + 60)]
    mark = make().mark(g)
    fresh = make()
    fresh.start_from(mark)
    planned = []
    original = Order._planned
    monkeypatch.setattr(Order, "_planned", lambda s, e, w: planned.append((e, w)) or original(s, e, w))
    assert [fresh.sequence(i) for i in range(g, g + 60)] == expected
    assert planned[0] == mark[1:]


def test_seed_epoch_and_name_change_the_order():
    base = epochs(make(), 2)
    assert base[0] != base[1]
    first, second = ({p.document for s in make().plan(epoch, 0) for p in s} for epoch in (0, 1))
    assert first != second
    assert base == epochs(make(), 2)
    assert base[0] != epochs(make(seed=2), 1)[0]
    assert base[0] != epochs(make(name="valid"), 1)[0]
