from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from data import order
from data.order import BLOCK, Cursor, Mixture, Stream, permuted
from data.packing import FIM_MARKS, Piece
from tests.unit.data.numbered import numbered_corpus, numbered_shards, numbers_in, numbers_of

DRAW = np.random.default_rng(0)
# some shards have many documents, some one or none, and some documents are longer than a row
LENGTHS = [DRAW.integers(1, 90, n).tolist() for n in (60, 1, 0, 90, 40, 0, 3, 110)]
SHARDS = numbered_shards(LENGTHS)
L = 32
REAL = order.WINDOW_TOKENS, order.WINDOW_ROWS


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterable[None]:
    """Several windows a group, so that their borders are met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_TOKENS", 1200)
        patch.setattr(order, "WINDOW_ROWS", 1)
        yield


def make(seed: int = 1, *, shuffle_shards: int | None = None, name: str = "web", **options) -> Stream:
    return Stream(numbered_corpus(SHARDS, name, shuffle_shards=shuffle_shards), seed=seed, **options)


def sequences(
    stream: Stream, cursor: Cursor, count: int, seq_len: int = L
) -> tuple[list[list[Piece]], Cursor]:
    found = []
    for _ in range(count):
        sequence, cursor = stream.take(cursor, seq_len)
        found.append(sequence)
    return found, cursor


def epochs(stream: Stream, n: int, schedule: Sequence[tuple[int, int]] = ()) -> list[list[int]]:
    """The tokens of each of the first n epochs: those of a schedule, and what is then left of them."""
    found: list[list[int]] = [[] for _ in range(1000)]
    cursor = Cursor()

    def take(count: int, seq_len: int) -> None:
        nonlocal cursor
        for sequence in (taken := sequences(stream, cursor, count, seq_len))[0]:
            assert 0 < sum(piece.length for piece in sequence) <= seq_len
            for piece in sequence:
                found[piece.documents.order[0]] += numbers_in([piece])
        cursor = taken[1]

    for count, seq_len in schedule:
        take(count, seq_len)
    while cursor.epoch < n or cursor.rest:
        take(1, L)
    return found[:n]


def used(*, held_out: bool = False, shards: list = SHARDS, threshold: np.uint64 | None = None) -> list[int]:
    """Every token of one side."""
    if threshold is None:
        threshold = make().corpus.threshold()
    return numbers_of(shards, [(shard.keys < threshold) == held_out for shard in shards])


@pytest.mark.parametrize("shuffle_shards", [None, 1, 3, 8])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5, 1.0])
def test_every_token_occurs_once_an_epoch(fim_rate, shuffle_shards):
    stream = make(fim_rate=fim_rate, shuffle_shards=shuffle_shards)
    for tokens in epochs(stream, 3):
        assert sorted(tokens) == used(threshold=stream.corpus.threshold())


def test_held_out_and_training_documents_make_up_the_source():
    held_out, train = epochs(make(held_out=True), 1)[0], epochs(make(), 1)[0]
    assert sorted(held_out) == used(held_out=True)
    assert len(held_out) > 20
    assert sorted(held_out + train) == list(range(sum(map(sum, LENGTHS))))


def test_fill_in_the_middle_takes_its_share_of_what_fits_into_a_row():
    stream = make(fim_rate=0.5)
    cursor, seen, rearranged = Cursor(), Counter(), Counter()
    while cursor.epoch < 6:
        (sequence,), cursor = sequences(stream, cursor, 1)
        for piece in sequence:
            n = int(piece.documents.lengths[piece.number])
            if piece.cuts:
                a, b = piece.cuts
                assert 0 <= a <= b <= n - 1  # the end mark stays at the end
                assert (piece.start, piece.length) == (0, n + FIM_MARKS)
                rearranged[a < b] += 1
                assert n >= 16
            seen[16 <= n <= L - FIM_MARKS] += 1
    assert 0.4 < rearranged.total() / seen[True] < 0.6
    assert rearranged[True] > 60


def test_every_epoch_has_its_own_order_of_shards_and_documents():
    stream = make(shuffle_shards=3)
    groups = [[g.tolist() for g in stream.corpus.groups(1, epoch)] for epoch in range(3)]
    assert groups[0] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert groups[0] != groups[1] != groups[2]
    assert all(sorted(unit for group in g for unit in group) == list(range(8)) for g in groups)
    assert first_window(make(), 0) != first_window(make(), 1)


def first_window(stream: Stream, epoch: int = 0, group: int = 0) -> list[int]:
    """Which tokens it has, not in which order."""
    rows = stream.window(Cursor(epoch, group, seq_len=L)).sequences
    return sorted(number for row in rows for number in numbers_in(row))


def test_groups_of_one_size_are_permuted_differently():
    shards = numbered_shards([[20] * 200] * 2, [range(2**63, 2**63 + 200)] * 2)
    first, second = (
        first_window(Stream(numbered_corpus(shards, shuffle_shards=1), seed=1), group=g) for g in (0, 1)
    )
    assert [number - 20 * 200 for number in second] != first


def test_seed_source_and_side_change_the_order_and_nothing_else_does():
    base = epochs(make(), 2)
    assert base == epochs(make(), 2)
    for other in (make(2), make(name="code")):
        found = epochs(other, 2)
        assert found != base
        assert sorted(found[0]) == sorted(base[0])
        assert first_window(other) != first_window(make())
    shards = numbered_shards([[20] * 400], [[*range(200), *range(2**63, 2**63 + 200)]])
    corpus = numbered_corpus(shards)
    held_out, train = (first_window(Stream(corpus, seed=1, held_out=side)) for side in (True, False))
    assert [number + 20 * 200 for number in held_out] != train


def test_groups_begin_with_the_next_shards_only_when_the_last_are_used_up():
    stream = make(shuffle_shards=1)
    seen = []
    cursor = Cursor()
    while cursor.epoch == 0:
        (sequence,), cursor = sequences(stream, cursor, 1)
        seen += [piece.documents.order for piece in sequence]
    assert seen == sorted(seen)
    assert {group for epoch, group in seen if epoch == 0} == {0, 1, 3, 4, 6, 7}  # the others are empty


def test_rows_of_a_window_do_not_come_longest_first():
    stream = make()
    longest = [max(piece.length for piece in row) for row in stream.window(Cursor(seq_len=L)).sequences]
    assert len(set(longest)) > 3
    assert longest != sorted(longest, reverse=True)  # as packing left them


# Changes of the length


schedules = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([8, 16, 31, 32, 64, 100, 256])), max_size=8
)


@settings(deadline=None, max_examples=60)
@given(schedules, st.sampled_from([None, 1, 3]), st.sampled_from([0.0, 0.5]))
def test_no_change_of_length_loses_or_repeats_a_token(schedule, shuffle_shards, fim_rate):
    stream = make(shuffle_shards=shuffle_shards, fim_rate=fim_rate)
    expected = used(threshold=stream.corpus.threshold())
    n = 1 + sum(count * seq_len for count, seq_len in schedule) // len(expected)
    for tokens in epochs(stream, n, schedule):
        assert sorted(tokens) == expected


def test_several_changes_within_one_window_and_back():
    schedule = [(3, 32), (2, 64), (0, 16), (4, 16), (1, 8), (1, 128), (3, 32)]
    stream = make(fim_rate=0.5)
    cursor = Cursor()
    for count, seq_len in schedule:
        _, cursor = sequences(stream, cursor, count, seq_len)
    depth, rest = 0, cursor
    while rest := rest.rest:
        depth += 1
    assert depth == 5  # no change was at the end of a window, and one took nothing
    assert [sorted(tokens) for tokens in epochs(make(fim_rate=0.5), 2, schedule)] == [used()] * 2


def test_a_change_before_anything_is_taken_changes_nothing_else():
    stream = make()
    assert stream.at(stream.at(Cursor(), 64), L) == stream.at(Cursor(), L)


def test_a_change_at_the_end_of_a_window_leaves_no_rest():
    stream = make()
    cursor = stream.at(Cursor(), L)
    _, cursor = sequences(stream, cursor, len(stream.window(cursor).sequences))
    after = stream.at(cursor, 64)
    assert (after.rest, after.taken, after.start) == (None, 0, stream.window(cursor).start)


def test_the_rest_of_longer_rows_is_joined_again():
    """What short rows cut apart, and did not use, is whole again in long ones."""
    stream = make()
    _, cursor = sequences(stream, Cursor(), 1, 8)
    window = stream.window(stream.at(cursor, 256))
    pieces = [piece for sequence in window.sequences for piece in sequence]
    whole = [p for p in pieces if p.length == p.documents.lengths[p.number]]
    assert len(whole) >= len(pieces) - 3  # one sequence of 8 tokens was taken of at most so many documents


# Continuing


@settings(deadline=None, max_examples=25)
@given(schedules, schedules)
def test_a_cursor_continues_after_json_as_if_nothing_had_happened(before, after):
    stream = make(shuffle_shards=3, fim_rate=0.5)
    cursor = Cursor()
    for count, seq_len in before:
        _, cursor = sequences(stream, cursor, count, seq_len)
    text = json.dumps(cursor.to_list())
    fresh, again = make(shuffle_shards=3, fim_rate=0.5), Cursor.from_list(json.loads(text))
    assert again == cursor
    for count, seq_len in [*after, (30, L)]:
        expected, cursor = sequences(stream, cursor, count, seq_len)
        found, again = sequences(fresh, again, count, seq_len)
        assert list(map(numbers_in, found)) == list(map(numbers_in, expected))
        assert again == cursor


@pytest.mark.parametrize("g", [0, 1, 49, 150, 333, 900])
def test_a_cursor_continues_without_planning_the_past(g, monkeypatch):
    stream = make(shuffle_shards=3)
    _, cursor = sequences(stream, Cursor(), g)
    cursor = stream.at(cursor, L)
    expected, _ = sequences(stream, cursor, 60)
    planned, opened = [], []
    plan, documents = Stream._planned, stream.corpus.documents
    fresh = make(shuffle_shards=3)
    monkeypatch.setattr(Stream, "_planned", lambda s, c: planned.append(c) or plan(s, c))
    monkeypatch.setattr(
        fresh.corpus, "documents", lambda units, **k: opened.append(k["order"]) or documents(units, **k)
    )
    found, _ = sequences(fresh, cursor, 60)
    assert list(map(numbers_in, found)) == list(map(numbers_in, expected))
    assert planned[0] == cursor._replace(taken=0)
    assert min(planned) == planned[0]
    assert min(opened) == cursor[:2]


def test_few_windows_and_documents_are_kept():
    stream = make(shuffle_shards=1, fim_rate=0.5)
    cursor = Cursor()
    for n in range(40):
        _, cursor = sequences(stream, cursor, 9, (L, 64)[n % 2])
        assert len(stream._windows) <= 12 and len(stream._documents) <= 2
    _, cursor = sequences(stream, cursor, 500)
    assert len(stream._windows) <= 2


def test_a_window_is_planned_once(monkeypatch):
    planned = []
    plan = Stream._planned
    monkeypatch.setattr(Stream, "_planned", lambda s, c: planned.append(c) or plan(s, c))
    epochs(make(shuffle_shards=3), 2)
    assert len(planned) == len(set(planned)) > 10


def test_nothing_left_after_filters_is_said_in_one_line():
    corpus = numbered_corpus(SHARDS, min_tokens=500)
    for held_out, word in ((False, "train on"), (True, "hold out")):
        with pytest.raises(ConfigError, match=rf"^data\.sources\.web: no document .* {word}") as caught:
            Stream(corpus, seed=1, held_out=held_out).take(Cursor(), L)
        assert "\n" not in str(caught.value)


def test_a_source_of_one_document_goes_round():
    shards = numbered_shards([[5], [], [7]], [[0], [], [2**63]])
    stream = Stream(numbered_corpus(shards), seed=1)
    found, cursor = sequences(stream, Cursor(), 4, 16)
    assert list(map(numbers_in, found)) == [[5, 6, 7, 8, 9, 10, 11]] * 4
    assert cursor.epoch == 3


# Windows of their real size


@pytest.fixture
def real_windows(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_TOKENS", REAL[0])
    monkeypatch.setattr(order, "WINDOW_ROWS", REAL[1])


@pytest.mark.parametrize("seq_len", [2048, 4096, 8192, 16384])
def test_padding_is_below_a_fifth_of_a_percent(seq_len, real_windows):
    lengths = np.random.default_rng(3).lognormal(6.2, 1.2, 36_000).astype(int) + 1
    stream = Stream(numbered_corpus(numbered_shards([lengths.tolist()])), seed=1)
    rows = stream.window(Cursor(seq_len=seq_len)).sequences
    tokens = sum(piece.length for row in rows for piece in row)
    assert tokens > 6_000_000
    assert 1 - tokens / (len(rows) * seq_len) < 0.002


@given(st.integers(2, 30_000), st.sampled_from([8, 32, 64]))
@settings(deadline=None, max_examples=40)
def test_windows_of_a_group_are_of_one_size(count, seq_len):
    stream = make()
    documents = numbered_corpus(numbered_shards([[10] * count])).documents(np.array([0]), held_out=False)
    sizes, start = [], 0
    while start < len(documents):
        stop = stream._window_end(documents, start, seq_len)
        sizes.append(stop - start)
        start = stop
    assert sum(sizes) == len(documents)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert not sizes or 10 * max(sizes) <= 1.5 * 1200 + 10


# Permutations


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(deadline=None)
def test_permuted_is_a_permutation_and_any_part_of_it_alone(n, key):
    whole = permuted(np.arange(n), n, key)
    assert sorted(whole.tolist()) == list(range(n))
    part = np.arange(n // 3, n // 2)
    assert permuted(part, n, key).tolist() == whole[part].tolist()


@pytest.mark.parametrize("bits", [20, 31, 33, 40])
def test_permuted_does_not_collide_among_many_things(bits):
    for n in (2**bits - 1, 2**bits, 2**bits + 1):
        places = np.unique(np.random.default_rng(bits).integers(0, n, 20_000))
        found = permuted(places, n, "key")
        assert len(np.unique(found)) == len(places)
        assert found.min() >= 0 and found.max() < n
        assert abs(found.mean() / n - 0.5) < 0.02


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations of it."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 33, 64, 100])
def test_permuted_looks_uniform(n):
    """Over many keys everything comes to every place, and after every other, equally often."""
    found = np.array([permuted(np.arange(n), n, key) for key in range(1500)])
    for place in (0, n // 2, n - 1):
        assert chi_square(np.bincount(found[:, place], minlength=n)) < 5
    for apart in {1, n // 2}:
        steps = (found[:, apart] - found[:, 0]) % n
        assert n == 2 or chi_square(np.bincount(steps, minlength=n)[1:]) < 5
    assert len({tuple(row) for row in found.tolist()}) > (1 if n == 2 else 5 if n == 3 else 110)


def test_large_permutations_differ_by_key_and_keep_no_neighbours():
    a, b = (permuted(np.arange(10_000), 10_000, key) for key in ("a", "b"))
    assert (a == b).mean() < 0.002
    for one in (a, b):
        assert (np.abs(np.diff(one)) == 1).mean() < 0.002
        assert abs(np.corrcoef(np.arange(10_000), one)[0, 1]) < 0.04
        assert chi_square(np.bincount(one[:2000] // 100, minlength=100)) < 5


# Mixtures

weights_of_sources = st.lists(st.floats(0.01, 5), min_size=1, max_size=32)


@given(weights_of_sources)
@settings(deadline=None, max_examples=50)
def test_shares_are_exact_to_the_sequence(weights):
    named = {f"s{i:02d}": weight for i, weight in enumerate(weights)}
    mixture = Mixture(named, seed=1)
    share = {name: weight / sum(weights) for name, weight in named.items()}
    heaviest = max(named, key=lambda name: (named[name], [-ord(c) for c in name]))
    handed = dict.fromkeys(named, 0)
    for block in range(40):
        quotas = mixture.quotas(block)
        assert sum(quotas) == BLOCK and min(quotas) >= 0
        for name, quota in zip(mixture._names, quotas, strict=True):
            handed[name] += quota
            error = handed[name] - share[name] * BLOCK * (block + 1)
            # the heaviest takes what rounding leaves over of each of the others
            assert abs(error) < (1 if name != heaviest else max(1, len(named) - 1)) + 1e-6


def test_a_block_has_its_quotas_in_an_order_of_its_own():
    mixture = Mixture({"web": 5.0, "code": 2.0, "long": 0.3, "none": 0.0}, seed=1)
    blocks = [[mixture.source(n) for n in range(b * BLOCK, (b + 1) * BLOCK)] for b in range(3)]
    for number, names in enumerate(blocks):
        quotas = dict(zip(mixture._names, mixture.quotas(number), strict=True))
        assert dict(Counter(names)) == {name: quota for name, quota in quotas.items() if quota}
        runs = sum(a != b for a, b in pairwise(names))
        assert 0.7 < runs / (2 * 1024 * (5 * 2 + 5 * 0.3 + 2 * 0.3) / 7.3**2) < 1.3  # as drawn by chance
    equal = Mixture({"a": 1.0, "b": 1.0}, seed=1)
    first, second = ([equal.source(n) for n in range(at, at + BLOCK)] for at in (0, BLOCK))
    assert Counter(first) == Counter(second) and first != second


def test_the_source_of_a_sequence_depends_on_weights_and_seed_alone():
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    forward = Mixture(weights, 1)
    expected = [forward.source(n) for n in range(0, 5000, 7)]
    backward = Mixture(dict(reversed(weights.items())), 1)
    assert [backward.source(n) for n in reversed(range(0, 5000, 7))][::-1] == expected
    assert [Mixture(weights, 2).source(n) for n in range(0, 500, 7)] != expected[:72]
    scaled = Mixture({name: 4 * weight for name, weight in weights.items()}, 1)
    assert [scaled.source(n) for n in range(0, 5000, 7)] == expected
