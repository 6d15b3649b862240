from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from configs.errors import ConfigError
from data.config import DataConfig, Shape, SourceConfig
from data.corpus import Corpus
from data.opening import open_data
from data.order import Cursor
from tests.unit.data.numbered import numbered_corpus, numbered_shards, numbers_in, numbers_of

DRAW = np.random.default_rng(1)
LENGTHS = [DRAW.integers(1, 60, n).tolist() for n in (30, 0, 25, 1, 40, 12)]
TOP = 2**64 - 1


def copied_shards() -> list:
    """Shards whose documents are copies of few texts: equal keys have equal lengths."""
    texts = DRAW.integers(0, 2**64, 45, np.uint64)
    length = {int(key): int(key % np.uint64(50)) + 1 for key in texts}
    keys = [DRAW.choice(texts, n).tolist() for n in (30, 0, 25, 1, 40, 12)]
    return numbered_shards([[length[key] for key in these] for these in keys], keys)


def tokens(corpus: Corpus, units: list[int], *, held_out: bool = False) -> list[int]:
    """The numbers of the tokens that are used, as they are listed."""
    documents = corpus.documents(np.array(units), held_out=held_out)
    assert documents.tokens == sum(documents.lengths.tolist())
    return [n for i in range(len(documents)) for n in documents[i].tolist()]


# What is held out


def test_documents_below_the_threshold_are_held_out():
    shards = numbered_shards(LENGTHS)
    corpus = numbered_corpus(shards, validation_fraction=0.25)
    assert corpus.threshold() == 2**62
    for held_out in (True, False):
        expected = numbers_of(shards, [(shard.keys < 2**62) == held_out for shard in shards])
        assert tokens(corpus, list(range(6)), held_out=held_out) == expected
        assert len(expected) > 100
    some = [(shard.keys >= 2**62) & (n in (2, 4)) for n, shard in enumerate(shards)]
    assert tokens(corpus, [2, 4]) == numbers_of(shards, some)


def test_copies_of_a_text_are_on_one_side():
    shards = copied_shards()
    corpus = numbered_corpus(shards, validation_fraction=0.3)
    keys = {}
    for held_out in (True, False):
        of = {int(n): int(k) for s in shards for n, k in zip(s.first, s.keys, strict=True)}
        keys[held_out] = {of[n] for n in tokens(corpus, list(range(6)), held_out=held_out) if n in of}
    assert min(map(len, keys.values())) > 5
    assert not keys[True] & keys[False]


@pytest.mark.parametrize("fraction", [1e-18, 0.5, 1 - 1e-16])
@pytest.mark.parametrize(
    "keys", [[0, 1], [TOP - 1, TOP], [0, TOP], [5, 5, 9], [TOP, 2**63, TOP, 3, 2**63 + 1]], ids=str
)
def test_a_side_is_never_empty(keys, fraction):
    shards = numbered_shards([[3] * len(keys)], [keys])
    corpus = numbered_corpus(shards, validation_fraction=fraction)
    held_out, train = (tokens(corpus, [0], held_out=side) for side in (True, False))
    assert held_out and train
    assert sorted(held_out + train) == list(range(3 * len(keys)))


@pytest.mark.parametrize("keys", [[], [7], [7, 7, 7]], ids=str)
def test_fewer_than_two_texts_are_refused_in_one_line(keys):
    corpus = numbered_corpus(numbered_shards([[3] * len(keys)], [keys]), "text")
    with pytest.raises(ConfigError, match=r"^data\.path: .* fewer than two different documents") as caught:
        corpus.documents(np.array([0]), held_out=False)
    assert "\n" not in str(caught.value)


def test_the_first_group_alone_decides_the_threshold():
    """Training may begin when it is there; what comes later falls on the side that its text says."""
    shards = numbered_shards([[1, 1], [1] * 9], [[2**63, TOP], list(range(9))])
    opened = []
    corpus = numbered_corpus(shards, shuffle_shards=1, validation_fraction=0.1)
    shard = corpus._shard
    corpus._shard = lambda unit: opened.append(unit.n) or shard(unit)  # type: ignore[attr-defined,func-returns-value]
    assert corpus.threshold() == 2**63 + 1
    assert opened == [0]
    assert len(tokens(corpus, [1], held_out=True)) == 9


def test_groups_are_of_shuffle_shards_units_and_begin_alike_for_every_seed():
    corpus = numbered_corpus(numbered_shards([[1]] * 7), shuffle_shards=3)
    for seed in (1, 2):
        assert [g.tolist() for g in corpus.groups(seed, 0)] == [[0, 1, 2], [3, 4, 5], [6]]
    later = [np.concatenate(corpus.groups(seed, epoch)).tolist() for seed in (1, 2) for epoch in (1, 2)]
    assert len(set(map(tuple, later))) == 4
    assert all(sorted(order) == list(range(7)) for order in later)
    assert [len(g) for g in corpus.groups(1, 5)] == [3, 3, 1]
    whole = numbered_corpus(numbered_shards([[1]] * 7))
    assert [g.tolist() for g in whole.groups(1, 4)] == [list(range(7))]


# Filters


@pytest.mark.parametrize(
    ("shortest", "longest"), [(0, None), (1, None), (20, 20), (20, 40), (0, 0 + 1), (58, None)]
)
def test_length_filters_count_without_the_end_mark(shortest, longest):
    shards = numbered_shards(LENGTHS)
    corpus = numbered_corpus(shards, min_tokens=shortest, max_tokens=longest)
    for held_out in (True, False):
        inside = [
            ((s.keys < corpus.threshold()) == held_out)
            & (s.lengths - 1 >= shortest)
            & ((s.lengths - 1 <= longest) if longest is not None else True)
            for s in shards
        ]
        assert tokens(corpus, list(range(6)), held_out=held_out) == numbers_of(shards, inside)
    assert corpus.threshold() == numbered_corpus(shards).threshold()


def firsts(shards: list, threshold: np.uint64) -> list[np.ndarray]:
    """Masks of the documents that training uses when every text counts once."""
    seen: set[int] = set()
    masks = []
    for shard in shards:
        new = [key not in seen and not seen.add(key) for key in shard.keys.tolist()]  # type: ignore[func-returns-value]
        masks.append(np.array(new, bool) & (shard.keys >= threshold))
    return masks


@pytest.mark.parametrize("shuffle_shards", [None, 1, 2, 4])
def test_every_text_counts_once_within_and_across_groups(shuffle_shards):
    shards = copied_shards()
    corpus = numbered_corpus(shards, shuffle_shards=shuffle_shards, deduplicate=True)
    expected = numbers_of(shards, firsts(shards, corpus.threshold()))
    assert len(expected) < 0.6 * len(numbers_of(shards, [s.keys >= corpus.threshold() for s in shards]))
    found = [n for group in corpus.groups(1, 0) for n in tokens(corpus, group.tolist())]
    assert found == expected
    later = [n for group in corpus.groups(1, 3) for n in tokens(corpus, group.tolist())]
    assert sorted(later) == sorted(expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_counts_does_not_depend_on_the_order_of_loading(size):
    shards = copied_shards()
    expected = None
    for order in permutations(range(0, 6, size)):
        corpus = numbered_corpus(shards, shuffle_shards=size, deduplicate=True)
        found = {at: tokens(corpus, list(range(at, min(6, at + size)))) for at in order}
        expected = expected or found
        assert found == expected
    assert sorted(n for part in expected.values() for n in part) == numbers_of(
        shards, firsts(shards, corpus.threshold())
    )


def test_later_groups_are_not_needed_to_deduplicate_earlier_ones():
    shards = copied_shards()
    corpus = numbered_corpus(shards, shuffle_shards=2, deduplicate=True)
    shard = corpus._shard

    def only_early(unit):
        assert unit.n < 4
        return shard(unit)

    corpus._shard = only_early
    assert tokens(corpus, [2, 3])


# Through files


def write_jsonl(folder, name: str, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def sourced(tmp_path, config) -> DataConfig:
    """A source of three files with copies, and one derived from it."""
    draw = np.random.default_rng(5)
    texts = [f"document {i} " + "some words " * int(draw.integers(1, 40)) for i in range(90)]
    for part in range(3):
        write_jsonl(tmp_path / "web", f"{part}.jsonl", [texts[i] for i in draw.integers(0, 90, 60)])
    web = SourceConfig(files=[str(tmp_path / "web")])
    sources = {"web": web, "long": SourceConfig(of="web", weight=0.5, min_tokens=30, deduplicate=True)}
    return replace(config, path=None, sources=sources)


def trained(config: DataConfig, name: str, seed: int = 1) -> list[str]:
    """The texts of the first epoch of a source in training."""
    data = open_data(config, lambda step: Shape(8, 4096), mtp_depth=0, seed=seed)
    stream, cursor, found = data.train._streams[name], Cursor(), []
    while (cursor := stream.at(cursor, 4096)).epoch == 0:
        pieces, cursor = stream.take(cursor, 4096)
        found += [data.tokenizer.decode(piece.documents[piece.number][:-1]) for piece in pieces]
    return found


def test_a_derived_source_shares_shards_and_split(sourced, tmp_path):
    web, long = trained(sourced, "web"), trained(sourced, "long")
    shards = list((tmp_path / "cache" / "shards").glob("*.arrow"))
    assert len(shards) == 3
    assert len(long) == len(set(long)) and 10 < len(long) < len(set(web)) < len(web)
    assert set(long) < set(web)
    data = open_data(sourced, lambda step: Shape(8, 4096), mtp_depth=0, seed=1)
    assert set(long) == {text for text in web if len(data.tokenizer.encode_batch([text])[0]) >= 30}
    own = [data.train._streams[name].corpus for name in ("web", "long")]
    assert own[0].fingerprint == own[1].fingerprint
    assert own[0]._shard(own[0].units[0]) is own[1]._shard(own[1].units[0])  # opened once
    assert data.summary["shards"] == 3
    assert data.summary["documents"] == 180
    assert data.summary["source_bytes"] == sum(f.stat().st_size for f in (tmp_path / "web").iterdir())


def test_the_split_does_not_depend_on_the_seed_or_on_filters(sourced):
    sets = [set(trained(sourced, "web", seed)) for seed in (1, 2)]
    assert sets[0] == sets[1]
    unique = replace(sourced, sources={"web": replace(sourced.sources["web"], deduplicate=True)})
    assert set(trained(unique, "web")) == sets[0]


def test_numbers_stand_for_what_files_give(sourced):
    """The stand-in of these tests against shards on disk: the same documents of the same group."""
    data = open_data(sourced, lambda step: Shape(8, 4096), mtp_depth=0, seed=1)
    real = data.train._streams["web"].corpus
    opened = [real._shard(unit) for unit in real.units]
    stand_in = numbered_corpus(
        numbered_shards([s.lengths.tolist() for s in opened], [s.keys.tolist() for s in opened]),
        "web",
        shuffle_shards=real.shuffle_shards,
        validation_fraction=real.validation_fraction,
    )
    a, b = (corpus.documents(np.arange(3), held_out=False) for corpus in (real, stand_in))
    assert a.lengths.tolist() == b.lengths.tolist()
    assert all(len(a[i]) == len(b[i]) for i in range(len(a)))
    stream = type(data.train._streams["web"])(stand_in, seed=1)
    pieces, _ = data.train._streams["web"].take(Cursor(), 256)
    assert [(p.number, p.start, p.length) for p in pieces] == [
        (p.number, p.start, p.length) for p in stream.take(Cursor(), 256)[0]
    ]
    assert len(numbers_in(stream.take(Cursor(), 256)[0])) == sum(p.length for p in pieces)
