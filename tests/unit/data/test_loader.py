from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import ConfigError
from data import order
from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.loader import Batch, Loader, deal
from data.opening import Data, open_data
from data.order import Stream
from data.tokenizer import Tokenizer
from tests.unit.data.mixed import ALPHABETS, made, rows, write_mixed
from tests.unit.data.numbered import MARKS, numbered_corpus, numbered_shards

ROOT = Path(__file__).parents[3]
S = 64
MARKS_OF_BPE = 5  # the first ids; they are spelled with letters of their own
# growing batches, longer and shorter rows, and two other mixtures, one of them of two sources alone
PLAN = [
    *[Shape(3, 64)] * 3,
    *[Shape(5, 32)] * 2,
    Shape(40, 64),
    Shape(1, 128),
    Shape(2, 16),
    *[Shape(7, 64, {"web": 1.0, "code": 2.0})] * 5,
    *[Shape(9, 256, {"web": 1.0, "code": 2.0})] * 2,
    *[Shape(6, 64, {"web": 1.0, "code": 1.0, "long": 3.0})] * 3,
    *[Shape(64, 48)] * 4,
    Shape(1, 1024),
    Shape(12, 64),
]


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_TOKENS", 3000)
        patch.setattr(order, "WINDOW_ROWS", 1)
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> DataConfig:
    return write_mixed(tmp_path_factory.mktemp("mixed"))


def opened(config: DataConfig, seq_len: int = S, seed: int = 3, depth: int = 0) -> Data:
    return open_data(config, lambda step: Shape(4, seq_len), mtp_depth=depth, seed=seed)


def train(
    config: DataConfig,
    plan: list[Shape] | None = None,
    *,
    seed: int = 3,
    rank: int = 0,
    world: int = 1,
    depth: int = 1,
) -> Loader:
    """A loader whose steps are those of `plan`, again and again."""
    shapes = plan or [Shape(4, S)]
    data = open_data(
        config, lambda step: shapes[step % len(shapes)], mtp_depth=depth, seed=seed, rank=rank, world=world
    )
    return data.train


def take(loader: Loader, count: int) -> list[Batch]:
    return [loader.batch() for _ in range(count)]


def pieces(batch: Batch) -> list[tuple[int, ...]]:
    """The documents (or parts of long ones) of a batch, read from input_ids and document_ids alone."""
    found = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        found += [tuple(ids[documents == d].tolist()) for d in range(int(documents.max()) + 1)]
    return found


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a batch is


def test_batch_has_the_promised_tensors(config):
    batch = train(config, [Shape(5, S)], depth=2).batch()
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (5, S),
        "labels": (5, S),
        "position_ids": (5, S),
        "document_ids": (5, S),
        "next_ids": (5, S, 2),
    }
    assert all(v.dtype == torch.int64 for v in batch.values())


def test_an_epoch_is_the_source_exactly(config, texts):
    data = opened(config)
    files = sorted(Path(config.path).iterdir())
    tokens = [
        [*data.tokenizer.encode_batch([f.read_text()])[0].tolist(), data.tokenizer.eos_id] for f in files
    ]
    expected = Counter(tuple(t[i : i + S]) for t in tokens for i in range(0, len(t), S))
    found = Counter()
    for loader in (data.train, data.valid):
        for batch in loader.one_pass(7, S):
            found.update(pieces(batch))
    assert found == expected
    assert data.summary["documents"] == len(texts)
    assert data.summary["tokens"] == sum(map(len, tokens))
    assert data.summary["bytes"] == sum(len(t.encode()) for t in texts.values())
    # the stream itself: as many sequences as the pass had are the same epoch
    n = sum(len(rows(b)) for b in data.train.one_pass(1, S))
    stream = train(config, [Shape(1, S)])
    assert Counter(p for b in take(stream, n) for p in pieces(b)) == Counter(
        p for b in data.train.one_pass(7, S) for p in pieces(b)
    )


def test_the_plan_says_what_every_step_is_made_of(mixed):
    loader = train(mixed, PLAN)
    for step, shape in enumerate(PLAN):
        assert loader.step == step
        batch = loader.batch()
        assert tuple(batch["input_ids"].shape) == (shape.sequences, shape.seq_len)
        assert len(rows(batch)) == shape.sequences


def test_fill_in_the_middle_rearranges_training_alone(config, texts):
    data = opened(replace(config, fim_rate=1.0), 512)
    begin, hole, end = data.tokenizer.fim
    restored = set()
    for batch in data.train.one_pass(8, 512):
        for p in pieces(batch):
            if p[0] == begin:
                h, e = p.index(hole), p.index(end)
                restored.add(data.tokenizer.decode(list(p[1:h] + p[e + 1 : -1] + p[h + 1 : e])))
                assert p[-1] == data.tokenizer.eos_id
    assert len(restored) > 30
    assert restored <= set(texts.values())
    untouched = [p for batch in data.valid.one_pass(8, 512) for p in pieces(batch)]
    assert len(untouched) > 5
    assert not any(begin in p for p in untouched)


def source_of(row: torch.Tensor, tokenizer: Tokenizer) -> str:
    """Told by the letters."""
    (name,) = (n for n, letters in ALPHABETS.items() if set(letters) & set(tokenizer.decode(row.tolist())))
    return name


def by_source(batches: list[Batch], tokenizer: Tokenizer) -> dict[str, list[bytes]]:
    """The rows of each source in the order of the stream; for batches of one row."""
    found: dict[str, list[bytes]] = {name: [] for name in ALPHABETS}
    for batch in batches:
        row = batch["input_ids"][0][batch["input_ids"][0] >= MARKS_OF_BPE]
        found[source_of(row, tokenizer)] += rows(batch)
    return found


def test_rows_are_of_one_source_and_shares_are_the_weights(mixed):
    data = opened(mixed)
    loader = train(mixed, [Shape(1, S)])
    counts = {name: len(part) for name, part in by_source(take(loader, 1024), data.tokenizer).items()}
    assert counts == {"web": 559, "code": 279, "long": 186}  # of 3 : 1.5 : 1, exactly in a block of 1024


def test_a_change_of_weights_begins_the_mixture_anew_and_no_source(mixed):
    data = opened(mixed)
    even = Shape(1, S, {"web": 1.0, "code": 1.0})
    plan = [*[Shape(1, S)] * 300, *[even] * 1024]
    loader, unchanged = train(mixed, plan), train(mixed, [Shape(1, S)])
    before = by_source(take(loader, 300), data.tokenizer)
    assert (loader.state_dict()["mixed_from"], loader.state_dict()["g"]) == (0, 300)
    after = by_source(take(loader, 1024), data.tokenizer)
    assert {name: len(part) for name, part in after.items()} == {"web": 512, "code": 512, "long": 0}
    state = loader.state_dict()
    assert (state["mixed_from"], state["g"], state["weights"]) == (300, 1324, even.weights)
    expected = by_source(take(unchanged, 2200), data.tokenizer)
    for name in ("web", "code"):
        found = before[name] + after[name]
        assert found == expected[name][: len(found)]


# Ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_world_sees_the_same_stream(mixed, world):
    reference = train(mixed, PLAN)
    ranks = [train(mixed, PLAN, rank=r, world=world) for r in range(world)]
    for shape in PLAN:
        batches = [loader.batch() for loader in ranks]
        assert {len(b["input_ids"]) for b in batches} == {-(-shape.sequences // world)}
        assert sorted(r for b in batches for r in rows(b)) == sorted(rows(reference.batch()))
        state = reference.state_dict()
        assert all(loader.state_dict() == state for loader in ranks)


def test_missing_rows_are_padding(config):
    batches = [train(config, [Shape(2, S)], rank=r, world=4).batch() for r in range(4)]
    assert sorted(len(rows(b)) for b in batches) == [0, 0, 1, 1]
    empty = next(b for b in batches if not rows(b))
    assert empty["input_ids"].eq(1).all()
    assert empty["labels"].eq(-100).all()
    assert empty["next_ids"].eq(-100).all()
    assert empty["document_ids"].eq(-1).all()
    assert torch.equal(empty["position_ids"][0], torch.arange(S))


def test_dealing_goes_up_and_down_by_falling_cost():
    assert deal([10, 40, 30, 20, 60, 50, 5], 3) == [[4, 0, 6], [5, 3], [1, 2]]
    costs = [i * i for i in range(1, 17)]
    loads = [sum(costs[i] for i in hand) for hand in deal(costs, 4)]
    assert sorted(i for hand in deal(costs, 4) for i in hand) == list(range(16))
    assert max(loads) / min(loads) < 1.2


def test_ranks_have_about_the_same_attention_to_compute(mixed):
    batches = [train(mixed, [Shape(64, 256)], rank=r, world=4).batch() for r in range(4)]
    costs = [sum(len(piece) ** 2 for piece in pieces(batch)) for batch in batches]
    assert max(costs) / min(costs) < 1.2
    assert [len(rows(batch)) for batch in batches] == [16] * 4
    firsts = [sum(len(p) ** 2 for p in pieces({k: v[:1] for k, v in b.items()})) for b in batches]
    assert max(firsts) / min(firsts) < 1.2


# Continuing


def test_resume_at_every_step_equals_an_uninterrupted_run(mixed):
    whole = train(mixed, PLAN)
    states, expected = [], []
    for _ in PLAN:
        states.append(json.dumps(whole.state_dict()))
        expected.append(whole.batch())
    used = train(mixed, PLAN)  # a loader that has been used continues just as well
    for stop in random.Random(1).sample(range(len(PLAN)), len(PLAN)):
        for loader in (used, train(mixed, PLAN)) if stop % 4 == 0 else (used,):
            loader.load_state_dict(json.loads(states[stop]))
            assert loader.step == stop
            assert json.dumps(loader.state_dict()) == states[stop]
            for step in range(stop, min(stop + 9, len(PLAN))):
                assert json.dumps(loader.state_dict()) == states[step]
                assert same(loader.batch(), expected[step])


@pytest.mark.parametrize("worlds", [(4, 3, 1), (8, 1, 2, 3, 8), (1, 4, 2)])
def test_resume_in_another_world(mixed, worlds):
    whole = train(mixed, PLAN)
    expected = [sorted(rows(batch)) for batch in take(whole, len(PLAN))]
    state, found = None, []
    stops = [len(PLAN) * (i + 1) // len(worlds) for i in range(len(worlds))]
    for world, stop in zip(worlds, stops, strict=True):
        loaders = [train(mixed, PLAN, rank=r, world=world) for r in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(state))
        while len(found) < stop:
            found.append(sorted(r for loader in loaders for r in rows(loader.batch())))
        (state,) = {json.dumps(loader.state_dict()) for loader in loaders}
    assert found == expected


def test_preparing_ahead_does_not_move_the_state(config):
    loader = train(config)
    loader.batch()
    time.sleep(0.2)  # the next batches are ready by now
    assert loader.state_dict()["g"] == 4
    list(loader.one_pass(3, S))
    assert (loader.state_dict()["g"], loader.state_dict()["step"], loader.step) == (4, 1, 1)
    other = train(config)
    other.batch()
    assert same(loader.batch(), other.batch())


def test_looking_ahead_changes_neither_order_nor_state(mixed):
    """Over changes of shapes and weights, further ahead than is prepared anyway, and any number of times."""
    expected = take(train(mixed, PLAN), len(PLAN))
    loader = train(mixed, PLAN)
    for step in range(len(PLAN) - 8):
        before = json.dumps(loader.state_dict())
        for later in (step + 7, step, step + 3, step + 7):
            assert same(loader.later(later), expected[later])
        assert json.dumps(loader.state_dict()) == before
        assert same(loader.batch(), expected[step])


@pytest.mark.parametrize("world", [1, 3])
def test_sequences_that_are_passed_over_are_the_only_ones_missing(mixed, world):
    """Batches stay as large: the sequences after those take their places, also after a resume."""
    every = [row for batch in take(train(mixed, [Shape(1, S)]), 60) for row in rows(batch)]
    passed = (range(8, 16), range(18, 19), range(40, 41))
    kept = [row for g, row in enumerate(every) if not any(g in gone for gone in passed)]
    loaders = [train(mixed, [Shape(5, S)], rank=rank, world=world) for rank in range(world)]
    states = []
    for step in range(10):
        if step == 1:  # as after a rollback: the loader has prepared batches without knowing
            for loader in loaders:
                state = loader.state_dict()
                loader.passed_over = passed
                loader.load_state_dict(state)
        states.append([loader.state_dict() for loader in loaders])
        found = [row for loader in loaders for row in rows(loader.batch())]
        assert sorted(found) == sorted(kept[5 * step : 5 * step + 5])
    assert loaders[0].handed_out == 60 == len(kept) + 10
    again = train(mixed, [Shape(5, S)])
    again.passed_over = passed
    again.load_state_dict(json.loads(json.dumps(states[2][0])))
    assert sorted(rows(again.batch())) == sorted(kept[10:15])


def numbered_loader(sources: int, plan: Callable[[int], Shape]) -> Loader:
    names = [f"source_{i:02d}" for i in range(sources)]
    shards = numbered_shards([[20] * 2000] * 3)
    streams = {name: Stream(numbered_corpus(shards, name, shuffle_shards=2), seed=1) for name in names}
    tokenizer = SimpleNamespace(fingerprint="f" * 32, eos_id=1, fim=MARKS)
    return Loader(streams, plan, tokenizer, seed=1, mtp_depth=1)  # type: ignore[arg-type]


def test_the_state_stays_small(monkeypatch):
    """Ten sources, and five changes of the length that fall into one window of every one of them."""
    lengths = [16, 32, 64, 128, 256, 512]
    monkeypatch.setattr(order, "WINDOW_TOKENS", 10_000)
    loader = numbered_loader(10, lambda step: Shape(24, lengths[step // 2]))
    take(loader, 12)
    state = loader.state_dict()
    cursors = [source["cursor"] for source in state["sources"].values()]
    assert sum(json.dumps(cursor).count("[") == 6 for cursor in cursors) >= 8
    assert len(json.dumps(state)) < 4096


# Refusals


def with_source(config: DataConfig, name: str, **changes) -> DataConfig:
    return replace(config, sources=config.sources | {name: replace(config.sources[name], **changes)})


def without(config: DataConfig, name: str) -> DataConfig:
    return replace(config, sources={n: source for n, source in config.sources.items() if n != name})


def another_tokenizer(config: DataConfig) -> DataConfig:
    path = Path(config.cache_dir) / "another.json"
    path.write_text(Path(str(config.tokenizer.path)).read_text() + " ")
    return made(replace(config, tokenizer=replace(config.tokenizer, path=str(path))))


def fewer_files(config: DataConfig) -> DataConfig:
    files = [str(Path(config.sources["code"].files[0]) / f"{part}.jsonl") for part in (0, 1, 3)]
    return made(with_source(config, "code", files=files))


CHANGES = {
    "train.seed": lambda config: config,
    "data.tokenizer": another_tokenizer,
    "data.sources.code.files": fewer_files,
    "data.sources.code.fim_rate": lambda config: with_source(config, "code", fim_rate=0.25),
    "data.sources.web.fim_rate": lambda config: replace(config, fim_rate=0.1),
    "data.sources.web.min_tokens": lambda config: with_source(config, "web", min_tokens=2),
    "data.sources.long.max_tokens": lambda config: with_source(config, "long", max_tokens=2000),
    "data.sources.code.deduplicate": lambda config: with_source(config, "code", deduplicate=True),
    "data.sources.long": lambda config: without(config, "long"),
    "data.shuffle_shards": lambda config: replace(config, shuffle_shards=3),
    "data.validation_fraction": lambda config: replace(config, validation_fraction=0.2),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_checkpoint_of_another_stream_is_refused(mixed, key):
    state = json.loads(json.dumps(train(mixed).state_dict()))
    loader = train(CHANGES[key](mixed), seed=3 + (key == "train.seed"))
    with pytest.raises(ConfigError, match=f"^{key} is not that of the checkpoint ") as caught:
        loader.load_state_dict(state)
    assert "data.on_change=restart" in one_line(caught)
    assert loader.step == 0 and loader.batch()["input_ids"].shape == (4, S)


def test_a_source_more_is_refused(mixed):
    state = train(without(mixed, "web")).state_dict()
    with pytest.raises(ConfigError, match=r"^data\.sources\.web is .*not there, here there") as caught:
        train(mixed).load_state_dict(state)
    one_line(caught)


def test_weights_are_not_refused(mixed):
    loader = train(mixed)
    take(loader, 3)
    other = train(with_source(mixed, "web", weight=0.5))
    other.load_state_dict(loader.state_dict())
    other.batch()
    state = other.state_dict()
    assert (state["mixed_from"], state["g"], state["weights"]["web"]) == (12, 16, 0.5)


@pytest.mark.parametrize("version", [None, 1, 3])
def test_a_checkpoint_of_another_version_is_refused(config, version):
    loader = train(config)
    state = loader.state_dict() | {"version": version}
    if version is None:
        del state["version"]
    with pytest.raises(ConfigError, match=rf"^data: .* version {version or 1}, here 2;") as caught:
        loader.load_state_dict(state)
    one_line(caught)


def restarted(mixed: DataConfig, changed: DataConfig, seed: int = 3) -> tuple[Loader, dict]:
    """A loader of the changed sources that went on after 700 rows, and what the state was."""
    loader = train(mixed, [Shape(1, S)])
    take(loader, 700)
    state = loader.state_dict()
    other = train(replace(changed, on_change="restart"), [Shape(1, S)], seed=seed)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert (other.step, other.state_dict()["g"]) == (700, 700)
    return other, state


@pytest.mark.parametrize("key", ["files", "fim_rate", "deduplicate"])
def test_restart_begins_the_changed_source_alone_anew(mixed, key):
    tokenizer = opened(mixed).tokenizer
    changed = CHANGES[f"data.sources.code.{key}"](mixed)
    loader, state = restarted(mixed, changed)
    found = by_source(take(loader, 500), tokenizer)
    unchanged = by_source(take(train(mixed, [Shape(1, S)]), 1300), tokenizer)
    anew = by_source(take(train(changed, [Shape(1, S)]), 1000), tokenizer)
    done = Counter(order.Mixture(state["weights"], 3).source(n) for n in range(700))
    for name, part in found.items():
        expected = anew[name] if name == "code" else unchanged[name][done[name] :]
        assert len(part) > 50
        assert part == expected[: len(part)]
    assert anew["code"][: len(found["code"])] != unchanged["code"][done["code"] :][: len(found["code"])]


def test_restart_with_a_source_more_or_less_goes_on_with_the_others(mixed):
    tokenizer = opened(mixed).tokenizer
    unchanged = by_source(take(train(mixed, [Shape(1, S)]), 1500), tokenizer)
    loader, state = restarted(mixed, without(mixed, "long"))
    done = Counter(order.Mixture(state["weights"], 3).source(n) for n in range(700))
    found = by_source(take(loader, 300), tokenizer)
    for name in ("web", "code"):
        assert found[name] == unchanged[name][done[name] :][: len(found[name])]
    assert loader.state_dict()["mixed_from"] == 700
    more, _ = restarted(without(mixed, "long"), mixed)
    found = by_source(take(more, 300), tokenizer)
    assert len(found["long"]) > 20
    assert found["long"] == unchanged["long"][: len(found["long"])]


@pytest.mark.parametrize("key", ["train.seed", "data.tokenizer"])
def test_restart_with_another_seed_or_tokenizer_begins_everything_anew(mixed, key):
    seed = 4 if key == "train.seed" else 3
    loader, _ = restarted(mixed, CHANGES[key](mixed), seed)
    cursors = [source["cursor"] for source in loader.state_dict()["sources"].values()]
    assert cursors == [order.Cursor().to_list()] * 3


def test_restart_without_a_change_continues(mixed):
    loader, _ = restarted(mixed, mixed)
    other = train(mixed, [Shape(1, S)])
    take(other, 700)
    assert all(same(a, b) for a, b in zip(take(loader, 5), take(other, 5), strict=True))


# One pass


def test_validation_is_the_same_always_and_never_trained_on(config):
    a, b = opened(config, seed=1, depth=1), opened(config, seed=2, depth=1)
    first = list(a.valid.one_pass(4, S))
    a.train.batch()
    a.valid.batch()
    again, other = list(a.valid.one_pass(4, S)), list(b.valid.one_pass(4, S))
    assert len(first) == len(again) == len(other) > 1
    assert all(same(x, y) and same(x, z) for x, y, z in zip(first, again, other, strict=True))
    assert all(batch["input_ids"].shape == (4, S) for batch in first)  # the last one, too
    whole = opened(config)  # with rows so long that no document is cut
    held_out, trained = (
        {p for batch in loader.one_pass(4, 8192) for p in pieces(batch)}
        for loader in (whole.valid, whole.train)
    )
    assert held_out and trained and not held_out & trained
    few = list(a.valid.one_pass(4, S, limit=6))
    assert sum(len(rows(x)) for x in few) == 6
    assert [len(x["input_ids"]) for x in few] == [4, 4]
    assert same(few[0], first[0])
    assert sum(len(rows(x)) for x in a.valid.one_pass(4, S, limit=10**6)) == sum(map(len, map(rows, first)))


def test_validation_is_shared_by_ranks(mixed):
    data = [
        open_data(mixed, lambda step: Shape(4, S), mtp_depth=1, seed=1, rank=r, world=3) for r in range(3)
    ]
    alone = list(opened(mixed, depth=1).valid.one_pass(5, S))
    parts = list(zip(*(d.valid.one_pass(5, S) for d in data), strict=True))
    assert len(parts) == len(alone) > 1
    for batches, batch in zip(parts, alone, strict=True):
        assert {len(b["input_ids"]) for b in batches} == {2}
        assert sorted(r for b in batches for r in rows(b)) == sorted(rows(batch))


def test_one_pass_ends_with_the_first_source_that_ends(mixed):
    data = opened(mixed)
    stream, cursor, held_out = data.valid._streams["web"], order.Cursor(), 0
    while (cursor := stream.at(cursor, S)).epoch == 0:
        _, cursor = stream.take(cursor, S)
        held_out += 1
    batches = list(data.valid.one_pass(1, S))
    found = by_source(batches, data.tokenizer)
    lengths = {name: len(part) for name, part in found.items()}
    assert lengths["web"] == held_out  # the heaviest ends first
    assert all(len(set(part)) == len(part) for part in found.values())
    wider = list(data.valid.one_pass(6, S))
    assert [r for b in wider for r in sorted(rows(b))] == [
        r
        for at in range(0, len(batches), 6)
        for r in sorted(r for b in batches[at : at + 6] for r in rows(b))
    ]


def test_a_source_without_weight_is_neither_trained_on_nor_held_out(mixed):
    data = opened(with_source(mixed, "long", weight=0.0))
    rows_of = [by_source(list(loader.one_pass(1, S)), data.tokenizer) for loader in (data.train, data.valid)]
    assert [bool(part["long"]) for part in rows_of] == [False, False]
    assert [bool(part["code"]) for part in rows_of] == [True, True]


def test_one_pass_says_which_source_each_row_is_of(mixed):
    data = [
        open_data(mixed, lambda step: Shape(4, S), mtp_depth=0, seed=1, rank=r, world=2).valid
        for r in range(2)
    ]
    tokenizer, seen = opened(mixed).tokenizer, Counter()
    for batch in (batch for loader in data for batch in loader.one_pass(6, S, limit=33)):
        for number, ids, documents in zip(
            batch["sources"].tolist(), batch["input_ids"], batch["document_ids"], strict=True
        ):
            letters = set(tokenizer.decode(ids[(documents >= 0) & (ids != tokenizer.eos_id)]))
            name = data[0].sources[number] if number >= 0 else None
            assert letters - {" "} <= set(ALPHABETS[name] if name else "")
            seen[name] += 1
    assert set(seen) == {*ALPHABETS, None} and sum(seen.values()) == 36 and seen[None] == 3
    assert "sources" not in train(mixed).batch()


def test_text_is_that_of_the_pass_and_of_every_rank(mixed):
    data = [
        open_data(mixed, lambda step: Shape(4, S), mtp_depth=0, seed=r, rank=r, world=2) for r in range(2)
    ]
    eos = data[0].tokenizer.eos_id
    rows_of = list(opened(mixed).valid.one_pass(1, S))
    whole = [i for batch in rows_of for p in pieces(batch) for i in p if i != eos]
    for count in (1, 300, len(whole), 2 * len(whole) + 7):  # more than there is: again from the beginning
        expected = [whole[i % len(whole)] for i in range(count)]
        for one in data:
            before = one.valid.state_dict()
            assert one.valid.text(count, S).tolist() == expected
            assert one.valid.state_dict() == before


def test_one_pass_in_the_midst_of_training_changes_neither(mixed):
    loader = train(mixed, PLAN)
    expected, alone = take(train(mixed, PLAN), len(PLAN)), list(train(mixed, PLAN).one_pass(3, S, limit=30))
    for batch in expected:
        assert same(loader.batch(), batch)
        assert all(same(a, b) for a, b in zip(loader.one_pass(3, S, limit=30), alone, strict=True))


# The split, as files give it


def held_out_texts(config: DataConfig) -> set[str]:
    data = opened(config)
    found = (p for b in data.valid.one_pass(8, 8192) for p in pieces(b))
    return {data.tokenizer.decode(list(p[:-1])) for p in found}


def test_the_split_follows_text_not_names_or_company(config, texts):
    before = held_out_texts(config)
    assert 0.02 < len(before) / len(texts) < 0.3
    for i, path in enumerate(sorted(Path(config.path).iterdir())):
        path.rename(path.with_name(f"renamed{i * 7919 % 1000}_{i}.md"))
    (Path(config.path) / "copy.txt").write_text(min(before))
    (Path(config.path) / "new.txt").write_text("something new\n")
    assert before <= held_out_texts(config) <= before | {"something new\n"}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_side_is_never_empty(config, tmp_path, fraction):
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.txt").write_text(name)
    data = opened(replace(config, path=str(tmp_path / "two"), validation_fraction=fraction))
    found = [[len(p) for b in x.one_pass(2, S) for p in pieces(b)] for x in (data.train, data.valid)]
    assert found == [[2], [2]]  # one letter and its end mark


# Faults


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "one.txt"}, "data.path: .* fewer than two different documents"),
        (
            {"fim_rate": 0.5, "tokenizer": TokenizerConfig("file", "t.json", 400)},
            "data.path: fim_rate 0.5 needs",
        ),
        ({"cache_dir": "one.txt/cache"}, "data.cache_dir: .* cannot be made"),
        ({"path": "missing"}, "data.path: missing does not exist"),
        (
            {"path": None, "sources": {"web": SourceConfig(files=["texts"], min_tokens=10**6)}},
            "data.sources.web: no document is left to train on",
        ),
    ],
)
def test_wrong_input_is_one_line(change, says, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("alone")
    spec = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    spec["added_tokens"] = [
        {"id": 1, "content": "</s>", "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
    ]
    Path("t.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        opened(replace(config, **change))
    one_line(caught)


@pytest.mark.parametrize("where", ["assemble", "tokens_of", "plan"])
def test_a_fault_in_the_background_reaches_the_caller_and_then_all_is_well(mixed, where, monkeypatch):
    """Whatever fails at the fourth step, the batches before and after are those of a run without a fault."""
    expected = take(train(mixed, PLAN), 12)
    broken = threading.Event()

    def plan(step: int) -> Shape:
        if where == "plan" and step >= 4 and broken.is_set():
            raise ZeroDivisionError
        return PLAN[step]

    loader = open_data(mixed, plan, mtp_depth=1, seed=3).train
    broken.set()
    if where != "plan":
        module = sys.modules["data.loader"]
        original = getattr(module, where)

        def fails(*given, **options):
            if broken.is_set() and loader._frontier.step >= 4:
                raise ZeroDivisionError
            return original(*given, **options)

        monkeypatch.setattr(module, where, fails)
    assert all(same(loader.batch(), batch) for batch in expected[:4])
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            loader.batch()
        assert loader.step == 4
    state = loader.state_dict()
    broken.clear()
    assert all(same(loader.batch(), batch) for batch in expected[4:])
    loader.load_state_dict(state)
    assert all(same(loader.batch(), batch) for batch in expected[4:])


def test_a_document_damaged_beyond_repair_is_named(mixed, monkeypatch):
    expected = take(train(mixed), 9)
    loader = train(mixed)
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.crc32", lambda data: -1)
        patch.setattr("data.build.Supply._mend", lambda self, path: None)
        with pytest.raises(ConfigError, match=r"document \d+ is damaged") as caught:
            loader.batch()
        one_line(caught)
    assert all(same(loader.batch(), batch) for batch in expected)


# Opening


def test_a_second_opening_is_warm(config, monkeypatch):
    cold = opened(config)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenized again"))
    warm = opened(config)
    assert same(cold.train.batch(), warm.train.batch())
    assert warm.summary["seconds"] < 1


PROGRAM = """
import hashlib, sys
from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.opening import open_data

def digest(folder, cache):
    sources = {"web": SourceConfig(files=[folder])}
    sources["more"] = SourceConfig(of="web", min_tokens=9, fim_rate=0.5)
    config = DataConfig(sources=sources, cache_dir=cache, tokenizer=TokenizerConfig(vocab_size=400))
    data = open_data(config, lambda step: Shape(4, 128), mtp_depth=1, seed=5)
    found = hashlib.sha256()
    for _ in range(6):
        for name, tensor in sorted(data.train.batch().items()):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()
"""


def test_batches_are_the_same_in_every_process(tmp_path, texts):
    """With other hashes of strings, another number of threads, and shards of its own."""
    known: dict = {}
    exec(PROGRAM, known)
    command = [sys.executable, "-c", PROGRAM + "print(digest(*sys.argv[1:]))"]
    env = os.environ | {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "2"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_TOKENS", 8_000_000)
        patch.setattr(order, "WINDOW_ROWS", 1024)
        here = known["digest"](str(tmp_path / "texts"), str(tmp_path / "a"))
    arguments = [str(tmp_path / "texts"), str(tmp_path / "b")]
    run = subprocess.run([*command, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == here
