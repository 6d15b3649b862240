from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import assemble, best_fit_decreasing, rearranged, split_long
from data.tokenizer import FimIds

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
