from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import (
    FIM_MARKS,
    Piece,
    assemble,
    best_fit_decreasing,
    joined_pieces,
    rearranged,
    split_long,
    tokens_of,
)
from data.tokenizer import FimIds
from tests.unit.data.numbered import MARKS, numbered_corpus, numbered_shards

lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """How full the bins are, by searching all of them for every item."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in range(len(bins)) if bins[b] + length <= capacity]
        if fitting:
            bins[max(fitting, key=lambda b: bins[b])] += length
        else:
            bins.append(length)
    return sorted(bins)


@given(lengths_of_documents)
def test_packing_equals_a_naive_best_fit(lengths):
    bins = best_fit_decreasing(lengths, 60)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in b) for b in bins) == naive_best_fit(lengths, 60)


@given(lengths_of_documents, st.integers(1, 20))
def test_splitting_covers_every_document_in_order(lengths, capacity):
    expected = [(d, a, min(capacity, n - a)) for d, n in enumerate(lengths) for a in range(0, n, capacity)]
    found = zip(*(x.tolist() for x in split_long(np.array(lengths), capacity)), strict=True)
    assert list(found) == expected


def documents(lengths: list[int], order: tuple[int, int] = (0, 0)):
    """All documents of these lengths but one that is held out, their tokens numbered from 1 on."""
    corpus = numbered_corpus(numbered_shards([[1, *lengths]], [[0, *range(2**63, 2**63 + len(lengths))]]))
    return corpus.documents(np.array([0]), held_out=False, order=order)


@st.composite
def leftovers(draw):
    """Documents of two groups cut at random places, of which random pieces are left, in any order."""
    left = []
    for order in ((0, 0), (0, 1)):
        lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
        whole = documents(lengths, order)
        for number, length in enumerate(lengths):
            middle = length > 2 and draw(st.booleans())
            marked = length + FIM_MARKS * middle
            ends = sorted({*draw(st.lists(st.integers(1, marked), max_size=4)), marked})
            for start, stop in zip([0, *ends], ends, strict=False):
                if draw(st.booleans()):
                    left.append(Piece(whole, number, start, stop - start, (1, 2) if middle else None))
    return draw(st.permutations(left))


@settings(deadline=None)
@given(leftovers(), st.integers(1, 50))
def test_joining_keeps_every_token_in_as_few_pieces_as_possible(left, capacity):
    def places(pieces: list[Piece]) -> list[tuple]:
        return sorted(
            (p.documents.order, p.number, p.cuts, p.start + i) for p in pieces for i in range(p.length)
        )

    joined = joined_pieces(left, capacity)
    assert places(joined) == places(left)
    taken = set(places(left))
    runs, before = [], None
    for place in sorted(taken):
        if before is None or (*before[:3], before[3] + 1) != place:
            runs.append(0)
        runs[-1] += 1
        before = place
    assert len(joined) == sum(-(-run // capacity) for run in runs)
    assert all(1 <= piece.length <= capacity for piece in joined)
    numbers = [sorted(n for p in pieces for n in tokens_of(p, MARKS).tolist()) for pieces in (left, joined)]
    assert numbers[0] == numbers[1]


def test_neighbours_of_two_epochs_are_not_one():
    first = documents([9])
    pieces = [Piece(first, 0, 0, 4), Piece(first.again((1, 0)), 0, 4, 5)]
    assert joined_pieces(pieces, 100) == pieces


@pytest.mark.parametrize("fim", [MARKS, None], ids=["marks", "none"])
def test_a_piece_is_a_part_of_the_document_as_it_is_arranged(fim):
    whole = documents([6, 9])
    assert tokens_of(Piece(whole, 1, 2, 4), fim).tolist() == [9, 10, 11, 12]
    rearranged_ids = rearranged(whole[1], (2, 5), MARKS).tolist()
    assert len(rearranged_ids) == 12
    expected = rearranged_ids if fim else whole[1].tolist()
    assert tokens_of(Piece(whole, 1, 3, 7, (2, 5)), fim).tolist() == expected[3:10]


@pytest.mark.parametrize("cuts", [(0, 0), (0, 5), (5, 5), (2, 2)])
def test_fill_in_the_middle_of_nothing_loses_nothing(cuts):
    ids = np.array([10, 11, 12, 13, 14, 1], np.uint32)
    found = rearranged(ids, cuts, MARKS).tolist()
    hole, end = found.index(MARKS.hole), found.index(MARKS.end)
    assert found[0] == MARKS.begin
    assert found[1:hole] + found[end + 1 : -1] + found[hole + 1 : end] == [10, 11, 12, 13, 14]
    assert found[-1] == 1


def test_nothing_is_packed_into_nothing():
    assert best_fit_decreasing([], 8) == []
    assert best_fit_decreasing([8, 8], 8) == [[0], [1]]


def test_fill_in_the_middle_is_prefix_suffix_middle_end():
    ids = np.array([10, 11, 12, 13, 14, 1], np.uint32)
    found = rearranged(ids, (1, 3), FimIds(begin=2, hole=3, end=4))
    assert found.tolist() == [2, 10, 3, 13, 14, 4, 11, 12, 1]
    assert found.dtype == np.uint32


def naive_batch(rows, seq_len, depth, fill):
    """Token by token, from the definition."""
    names = ("input_ids", "labels", "position_ids", "document_ids", "next_ids")
    out: dict[str, list] = {name: [] for name in names}
    for row in rows:
        tokens = [(int(t), i, d, piece) for d, piece in enumerate(row) for i, t in enumerate(piece)]
        line: dict[str, list] = {name: [] for name in names}
        for t in range(seq_len):
            token, i, d, piece = tokens[t] if t < len(tokens) else (fill, t - len(tokens), -1, [])
            later = [int(piece[i + k]) if i + k < len(piece) else -100 for k in range(1, depth + 2)]
            line["input_ids"].append(token)
            line["labels"].append(later[0])
            line["position_ids"].append(i)
            line["document_ids"].append(d)
            line["next_ids"].append(later[1:])
        for name in names:
            out[name].append(line[name])
    return out


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=3), min_size=1, max_size=4
    ),
    st.integers(0, 3),
)
def test_a_batch_equals_a_naive_loop(rows, depth):
    arrays = [[np.array(piece, np.uint32) for piece in row] for row in rows]
    batch = assemble(arrays, seq_len=12, mtp_depth=depth, fill=1)
    expected = naive_batch(rows, 12, depth, 1)
    for name, array in batch.items():
        assert array.dtype == np.int64
        assert array.tolist() == expected[name], name
    assert batch["next_ids"].shape == (len(rows), 12, depth)
