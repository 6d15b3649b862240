from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from data import order
from data.config import DataConfig, TokenizerConfig
from data.loader import Loader, deal, open_data
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
S = 64


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_TOKENS", 3000)
    monkeypatch.setattr(order, "WINDOW_ROWS", 1)


def train(config: DataConfig, seed: int = 3, rank: int = 0, world: int = 1, depth: int = 1) -> Loader:
    return open_data(config, seq_len=S, mtp_depth=depth, seed=seed, rank=rank, world=world).train


def pieces(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The documents (or parts of long ones) of a batch, read from input_ids and document_ids alone."""
    found = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        found += [tuple(ids[documents == d].tolist()) for d in range(int(documents.max()) + 1)]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Every row of a batch, all tensors of it, without rows that are padding alone."""
    real = (batch["document_ids"] >= 0).any(1)
    return [
        b"".join(batch[k][i].numpy().tobytes() for k in sorted(batch)) for i in torch.nonzero(real).flatten()
    ]


def test_batch_has_the_promised_tensors(config):
    batch = train(config, depth=2).batch(5)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (5, S),
        "labels": (5, S),
        "position_ids": (5, S),
        "document_ids": (5, S),
        "next_ids": (5, S, 2),
    }
    assert all(v.dtype == torch.int64 for v in batch.values())


def test_an_epoch_is_the_source_exactly(config, texts):
    data = open_data(config, seq_len=S, mtp_depth=0, seed=3)
    files = sorted(Path(config.path).iterdir())
    tokens = [
        [*data.tokenizer.encode_batch([f.read_text()])[0].tolist(), data.tokenizer.eos_id] for f in files
    ]
    expected = Counter(tuple(t[i : i + S]) for t in tokens for i in range(0, len(t), S))
    found = Counter()
    for loader in (data.train, data.valid):
        for batch in loader.one_pass(7):
            found.update(pieces(batch))
    assert found == expected
    assert data.summary["documents"] == len(texts)
    assert data.summary["tokens"] == sum(map(len, tokens))
    assert data.summary["bytes"] == sum(len(t.encode()) for t in texts.values())
    # the stream itself: as many sequences as the pass had are the same epoch
    n = sum(len(rows(b)) for b in data.train.one_pass(1))
    stream = Counter(p for _ in range(n) for p in pieces(data.train.batch(1)))
    assert stream == Counter(p for b in data.train.one_pass(7) for p in pieces(b))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_world_sees_the_same_stream(config, world):
    reference = train(config)
    ranks = [train(config, rank=r, world=world) for r in range(world)]
    for n in (5, 5, 8, 1, 1, 3, 12):
        batches = [loader.batch(n) for loader in ranks]
        assert {len(b["input_ids"]) for b in batches} == {-(-n // world)}
        assert sorted(r for b in batches for r in rows(b)) == sorted(rows(reference.batch(n)))
    assert all(loader.state_dict() == reference.state_dict() for loader in ranks)


def test_missing_rows_are_padding(config):
    batches = [train(config, rank=r, world=4).batch(2) for r in range(4)]
    assert sorted(len(rows(b)) for b in batches) == [0, 0, 1, 1]
    empty = next(b for b in batches if not rows(b))
    assert empty["input_ids"].eq(1).all()
    assert empty["labels"].eq(-100).all()
    assert empty["next_ids"].eq(-100).all()
    assert empty["document_ids"].eq(-1).all()
    assert torch.equal(empty["position_ids"][0], torch.arange(S))


@pytest.mark.parametrize("stop", [0, 1, 6, 17])
def test_resume_equals_an_uninterrupted_run(config, stop):
    sizes = [3, 3, 3, 40, 1, 1, 7, 7, 150, 2, 2, 2, 64, 64, 64, 5, 5, 5, 9, 9]
    config = replace(config, fim_rate=0.5)
    whole = train(config)
    expected = [whole.batch(n) for n in sizes]
    first = train(config)
    for n in sizes[:stop]:
        first.batch(n)
    text = json.dumps(first.state_dict())
    assert len(text) < 2000
    second = train(config)
    second.batch(11)  # a loader that has been used continues just as well
    second.load_state_dict(json.loads(text))
    assert second.state_dict() == json.loads(text)
    assert all(same(second.batch(n), b) for n, b in zip(sizes[stop:], expected[stop:], strict=True))


def test_resume_in_another_world(config):
    sizes = [6, 6, 6, 10, 10, 10]
    whole = train(config)
    expected = [sorted(rows(whole.batch(n))) for n in sizes]
    state, found = None, []
    for world, part in ((4, sizes[:2]), (3, sizes[2:4]), (1, sizes[4:])):
        loaders = [train(config, rank=r, world=world) for r in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        for n in part:
            found.append(sorted(r for loader in loaders for r in rows(loader.batch(n))))
        state = loaders[0].state_dict()
    assert found == expected


def test_preparing_ahead_does_not_move_the_state(config):
    loader = train(config)
    loader.batch(4)
    time.sleep(0.2)  # the next batch is ready by now
    assert loader.state_dict()["g"] == 4
    list(loader.one_pass(3))
    assert loader.state_dict()["g"] == 4
    other = train(config)
    other.batch(4)
    assert same(loader.batch(2), other.batch(2))


def test_a_checkpoint_of_another_stream_is_refused(config, tmp_path):
    state = train(config).state_dict()
    seeds, short = train(config, seed=4), open_data(config, seq_len=32, mtp_depth=1, seed=3).train
    fim = train(replace(config, fim_rate=0.1))
    vocabulary = train(replace(config, tokenizer=TokenizerConfig(vocab_size=401)))
    (Path(config.path) / "more.txt").write_text("one more\n")
    text = train(config)
    for key, loader in [
        ("seed", seeds),
        ("seq_len", short),
        ("fim_rate", fim),
        ("data", text),
        ("data", vocabulary),
    ]:
        with pytest.raises(
            ConfigError, match=f"^data: the checkpoint was written with another {key} "
        ) as caught:
            loader.load_state_dict(state)
        assert "\n" not in str(caught.value)


def test_validation_is_the_same_always_and_never_trained_on(config):
    a = open_data(config, seq_len=S, mtp_depth=1, seed=1)
    b = open_data(config, seq_len=S, mtp_depth=1, seed=2, rank=0, world=1)
    first = list(a.valid.one_pass(4))
    a.train.batch(9)
    a.valid.batch(9)
    again, other = list(a.valid.one_pass(4)), list(b.valid.one_pass(4))
    assert len(first) == len(again) == len(other) > 1
    assert all(same(x, y) and same(x, z) for x, y, z in zip(first, again, other, strict=True))
    assert all(batch["input_ids"].shape == (4, S) for batch in first)  # the last one, too
    whole = open_data(config, seq_len=8192, mtp_depth=0, seed=1)  # no document is cut
    held_out = {p for batch in whole.valid.one_pass(4) for p in pieces(batch)}
    trained = {p for batch in whole.train.one_pass(4) for p in pieces(batch)}
    assert held_out and trained and not held_out & trained
    few = list(a.valid.one_pass(4, limit=6))
    assert sum(len(rows(x)) for x in few) == 6
    assert same(few[0], first[0])


def held_out_texts(config: DataConfig) -> set[str]:
    data = open_data(config, seq_len=8192, mtp_depth=0, seed=1)
    return {data.tokenizer.decode(list(p[:-1])) for b in data.valid.one_pass(8) for p in pieces(b)}


def test_the_split_follows_text_not_names_or_company(config, texts):
    before = held_out_texts(config)
    assert 0.02 < len(before) / len(texts) < 0.3
    for i, path in enumerate(sorted(Path(config.path).iterdir())):
        path.rename(path.with_name(f"renamed{i * 7919 % 1000}_{i}.md"))
    (Path(config.path) / "copy.txt").write_text(min(before))
    (Path(config.path) / "new.txt").write_text("something new\n")
    assert before <= held_out_texts(config) <= before | {"something new\n"}


def test_a_side_is_never_empty(config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.txt").write_text(name)
    for fraction in (1e-9, 1 - 1e-9):
        data = open_data(
            replace(config, path=str(tmp_path / "two"), validation_fraction=fraction),
            seq_len=S,
            mtp_depth=0,
            seed=1,
        )
        assert data.summary["train_tokens"] == data.summary["valid_tokens"] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "one.txt"}, "data.path: .* fewer than two different documents"),
        ({"fim_rate": 0.5, "tokenizer": TokenizerConfig("file", "t.json", 400)}, "data.fim_rate: 0.5 needs"),
        ({"cache_dir": "one.txt/cache"}, "data.cache_dir: .* cannot be made"),
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
        open_data(replace(config, **change), seq_len=S, mtp_depth=0, seed=1)
    assert "\n" not in str(caught.value)


def test_a_fault_in_the_background_reaches_the_caller(config, monkeypatch):
    loader = train(config)
    loader.batch(2)
    loader.batch(2)
    monkeypatch.setattr("data.loader.assemble", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for _ in range(3):
            loader.batch(2)


def test_fill_in_the_middle_rearranges_training_alone(config, texts):
    data = open_data(replace(config, fim_rate=1.0), seq_len=512, mtp_depth=0, seed=1)
    begin, hole, end = data.tokenizer.fim
    restored = set()
    for batch in data.train.one_pass(8):
        for p in pieces(batch):
            if p[0] == begin:
                h, e = p.index(hole), p.index(end)
                restored.add(data.tokenizer.decode(list(p[1:h] + p[e + 1 : -1] + p[h + 1 : e])))
                assert p[-1] == data.tokenizer.eos_id
    assert len(restored) > 30
    assert restored <= set(texts.values())
    untouched = [p for batch in data.valid.one_pass(8) for p in pieces(batch)]
    assert len(untouched) > 5
    assert not any(begin in p for p in untouched)


def test_dealing_goes_up_and_down_by_falling_cost():
    assert deal([10, 40, 30, 20, 60, 50, 5], 3) == [[4, 0, 6], [5, 3], [1, 2]]
    costs = [i * i for i in range(1, 17)]
    loads = [sum(costs[i] for i in hand) for hand in deal(costs, 4)]
    assert sorted(i for hand in deal(costs, 4) for i in hand) == list(range(16))
    assert max(loads) / min(loads) < 1.2


def test_a_second_opening_is_warm(config, monkeypatch):
    cold = open_data(config, seq_len=S, mtp_depth=0, seed=1)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenized again"))
    warm = open_data(config, seq_len=S, mtp_depth=0, seed=1)
    assert same(cold.train.batch(4), warm.train.batch(4))
    assert warm.summary["seconds"] < 1


PROGRAM = """
import hashlib, sys
from data.config import DataConfig, TokenizerConfig
from data.loader import open_data
config = DataConfig(max_bytes=300_000, cache_dir=sys.argv[1], tokenizer=TokenizerConfig(vocab_size=512))
data = open_data(config, seq_len=128, mtp_depth=1, seed=5)
digest = hashlib.sha256()
for _ in range(6):
    for name, tensor in sorted(data.train.batch(4).items()):
        digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_built_in_source_is_the_same_in_every_process(tmp_path):
    digests = set()
    for cache, seed in (("a", "1"), ("b", "2")):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / cache)]
        run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1
