from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from configs.errors import ConfigError
from data import shards, sources
from data.files import checksum, sealed
from data.shards import Damaged, Documents, Shard, build, document_key, read_manifest, shard_path
from data.sources import Unit, find_units
from data.tokenizer import Tokenizer, train_bpe
from tests.unit.data.written import write_file

WORDS = ["abc abd acb bca cab bac abcd dcba abab acdc "] * 9
SMALL = [f"{i} " + "abc bca " * (i % 4) for i in range(11)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    path.write_text(train_bpe(iter(WORDS), 280))
    return Tokenizer(path)


@pytest.fixture
def units(config, monkeypatch) -> list[Unit]:
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    units = find_units("text", config.chosen()["text"], config, print).units
    assert len(units) > 5
    return units


@pytest.fixture
def small(tmp_path, tokenizer, monkeypatch) -> Path:
    """A shard of SMALL in two batches, of which `unit_of` is the unit."""
    monkeypatch.setattr(shards, "DOCUMENTS_PER_BATCH", 6)
    write_file(tmp_path / "in" / "small.jsonl", SMALL)
    path = shard_path(unit_of(tmp_path), tokenizer, tmp_path)
    path.parent.mkdir()
    build(unit_of(tmp_path), tokenizer, path)
    return path


def unit_of(folder: Path) -> Unit:
    return Unit((str(folder / "in" / "small.jsonl"),), "json", "body", 1, None, None, (), "small")


def tokens_of(shard: Shard) -> list[list[int]]:
    return [shard.tokens(row).tolist() for row in range(len(shard))]


def opened(units: list[Unit], tokenizer: Tokenizer, folder: Path) -> list[Shard]:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    paths = [shard_path(unit, tokenizer, folder) for unit in units]
    for unit, path in zip(units, paths, strict=True):
        build(unit, tokenizer, path)
    return [Shard(path) for path in paths]


# --- What a shard holds -----------------------------------------------------------------------------------


def test_shards_hold_every_document_with_its_end_mark(units, tokenizer, texts, tmp_path):
    oracle = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    total = 0
    for unit, shard in zip(units, opened(units, tokenizer, tmp_path), strict=True):
        expected = [texts[os.path.basename(file)] for file in unit.files]
        ids = [[*oracle.encode(text).ids, 1] for text in expected]
        assert tokens_of(shard) == ids
        assert shard.lengths.tolist() == [len(i) for i in ids]
        assert shard.keys.tolist() == [document_key(text) for text in expected]
        manifest = shard.manifest
        assert (manifest.documents, manifest.tokens) == (len(ids), sum(map(len, ids)))
        assert manifest.bytes == sum(len(text.encode()) for text in expected)
        assert manifest.files == list(unit.files)
        assert manifest.checksum == checksum(shard.path)
        total += len(shard)
    assert total == len(texts)


def test_keys_are_spread_over_64_bits_and_equal_for_equal_texts():
    keys = np.array([document_key(f"text {i}") for i in range(4000)], np.uint64)
    assert len(np.unique(keys)) == 4000
    assert np.allclose(np.histogram(keys / 2.0**64, 10, (0, 1))[0], 400, atol=90)
    assert document_key("a") == document_key("a") != document_key("a ")


def test_the_same_unit_gives_the_same_bytes(small, tokenizer, tmp_path):
    again = tmp_path / "again.arrow"
    build(unit_of(tmp_path), tokenizer, again)
    assert again.read_bytes() == small.read_bytes()
    assert again.with_suffix(".json").read_bytes() == small.with_suffix(".json").read_bytes()


def test_a_shard_is_named_by_its_unit_the_tokenizer_and_the_format(tokenizer, tmp_path, monkeypatch):
    unit = unit_of(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(train_bpe(iter(WORDS), 270))
    paths = [shard_path(unit, tokenizer, tmp_path), shard_path(unit, Tokenizer(other), tmp_path)]
    paths.append(shard_path(replace(unit, fingerprint="changed"), tokenizer, tmp_path))
    assert shard_path(replace(unit, files=("elsewhere",)), tokenizer, tmp_path) == paths[0]
    monkeypatch.setattr(shards, "FORMAT", -1)
    assert len({*paths, shard_path(unit, tokenizer, tmp_path)}) == 4


def test_documents_are_views_of_the_file(small):
    shard = Shard(small)
    ids = shard.tokens(7)
    assert ids.dtype == np.uint32
    assert not ids.flags.owndata and not ids.flags.writeable
    assert np.shares_memory(ids, shard._values[1])
    whole = np.fromfile(small, np.uint8)
    assert ids.tobytes() in whole.tobytes()


def test_a_unit_without_documents(tmp_path, tokenizer):
    write_file(tmp_path / "in" / "small.jsonl", ["", None])
    path = tmp_path / "empty.arrow"
    build(unit_of(tmp_path), tokenizer, path)
    shard = Shard(path)
    assert len(shard) == 0 and shard.keys.tolist() == [] and shard.lengths.dtype == np.uint32
    assert read_manifest(path, whole=True) == shard.manifest


def test_progress_is_told_in_bytes_of_text(small, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("data.reading.BATCH_CHARACTERS", 50)
    sizes: list[int] = []
    build(unit_of(tmp_path), tokenizer, tmp_path / "x.arrow", advance=sizes.append)
    assert len(sizes) > 2
    assert sum(sizes) == sum(len(text.encode()) for text in SMALL)


# --- Documents of several shards --------------------------------------------------------------------------


def test_chosen_documents_of_several_shards(units, tokenizer, tmp_path):
    chosen = opened(units, tokenizer, tmp_path)
    rows = [np.arange(n % 3, len(shard), 2, dtype=np.uint32) for n, shard in enumerate(chosen)]
    rows[2] = rows[2][:0]  # of which there is none
    documents = Documents(chosen, rows, order=(3, 1))
    expected = [shard.tokens(r).tolist() for shard, rs in zip(chosen, rows, strict=True) for r in rs.tolist()]
    assert [documents[i].tolist() for i in range(len(documents))] == expected
    assert documents.lengths.tolist() == [len(ids) for ids in expected]
    assert documents.lengths.dtype == np.uint32
    assert documents.tokens == sum(map(len, expected))
    again = documents.again((4, 0))
    assert (documents.order, again.order) == ((3, 1), (4, 0))
    assert again.lengths is documents.lengths
    assert again[7].tolist() == expected[7]


def test_no_documents():
    documents = Documents([], [])
    assert len(documents) == documents.tokens == 0


# --- Damage -----------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_no_flipped_bit_of_a_shard_is_ever_returned(small, tmp_path):
    """Be it in tokens, offsets, keys, checksums or what Arrow says about them. Some are in padding."""
    good, keys, tokens = small.read_bytes(), Shard(small).keys.tolist(), tokens_of(Shard(small))
    found = 0
    for at in range(len(good)):
        small.write_bytes(flipped(good, at, at % 8))
        assert read_manifest(small) and (at % 50 or read_manifest(small, whole=True) is None)
        try:
            shard = Shard(small)
            result = (shard.keys.tolist(), shard.lengths.tolist(), tokens_of(shard))
        except ConfigError as error:
            assert str(error).startswith(f"{small}: ") and "\n" not in str(error)
            found += 1
        else:
            assert result == (keys, [len(ids) for ids in tokens], tokens), f"byte {at}"
            assert (shard.keys.dtype, shard.tokens(0).dtype) == (np.uint64, np.uint32)
    assert found > 0.7 * len(good)


@pytest.mark.parametrize("column", ["input_ids", "lengths", "key", "crc"])
def test_every_bit_of_content_counts(column, small):
    """The buffers themselves, found by what they hold."""
    shard, good = Shard(small), small.read_bytes()
    held = {
        "input_ids": shard._values[1],
        "lengths": shard._offsets[1],
        "key": shard._keys[1],
        "crc": shard._crcs[1],
    }[column].tobytes()
    start = good.index(held)
    for at in range(start, start + len(held)):
        draft = small.with_name("draft")
        draft.write_bytes(flipped(good, at, 7 - at % 8))
        os.replace(draft, small)
        with pytest.raises(ConfigError, match=f"^{small}: "):
            tokens_of(Shard(small))


def test_no_flipped_bit_of_a_manifest_is_ever_believed(small):
    path = small.with_suffix(".json")
    good, manifest = path.read_bytes(), read_manifest(small)
    assert manifest
    for at in range(len(good)):
        for bit in (0, at % 8):
            path.write_bytes(flipped(good, at, bit))
            assert read_manifest(small) in (None, manifest), f"byte {at}"
    for field, value in asdict(manifest).items():  # a change that is no damage
        path.write_text(json.dumps(json.loads(good) | {field: value * 2}))
        assert read_manifest(small) is None, field


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("{}"),
        lambda path: path.with_suffix(".json").write_text("[1]"),
        lambda path: path.with_suffix(".json").write_text("7"),
        lambda path: path.with_suffix(".json").write_bytes(b"\xff"),
    ],
    ids=["no shard", "no manifest", "torn", "empty", "list", "number", "bytes"],
)
def test_a_shard_without_its_manifest_is_not_there(damage, small):
    damage(small)
    assert read_manifest(small) is None
    with pytest.raises(Damaged, match=rf"^{small}: the shard or its manifest is missing or cannot be read$"):
        Shard(small)


@pytest.mark.parametrize("size", [0, 1, 8, 0.3, 0.5, 0.9])
def test_a_torn_shard_is_noticed(size, small):
    os.truncate(small, size if isinstance(size, int) else int(size * small.stat().st_size))
    assert read_manifest(small) is not None and read_manifest(small, whole=True) is None
    with pytest.raises(Damaged, match=rf"^{small}: \S"):
        Shard(small)


@pytest.mark.parametrize("column", ["key", "crc"])
def test_the_same_bytes_of_another_type_are_noticed(column, small):
    """A single bit tells signed numbers from unsigned ones; keys are compared."""
    with pa.OSFile(str(small)) as file:
        table = pa.ipc.open_stream(file).read_all()
    at = table.column_names.index(column)
    other = {pa.uint64(): pa.int64(), pa.uint32(): pa.int32()}[table.schema.field(at).type]
    table = table.set_column(at, column, pa.chunked_array([c.view(other) for c in table[column].chunks]))
    small.unlink()
    with pa.ipc.new_stream(str(small), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(Damaged, match="schema"):
        Shard(small)


def break_tokens(path: Path) -> None:
    """A document's tokens, not what is verified when the shard is opened."""
    shard, good = Shard(path), path.read_bytes()
    at = good.index(shard._values[1].tobytes()) + 4 * int(shard._offsets[1][2])
    draft = path.with_name("draft")
    draft.write_bytes(flipped(good, at, 1))
    os.replace(draft, path)


def test_damaged_tokens_are_repaired_once_and_read_again(small, tmp_path):
    good = tokens_of(Shard(small))
    shutil.copy(small, tmp_path / "good")
    break_tokens(small)
    repaired: list[Path] = []

    def repair(path: Path) -> None:
        repaired.append(path)
        shutil.copy(tmp_path / "good", tmp_path / "copy")
        os.replace(tmp_path / "copy", path)

    shard = Shard(small, repair)
    assert tokens_of(shard) == good
    assert repaired == [small]


@pytest.mark.parametrize("repair", [None, lambda path: None])
def test_damage_beyond_repair_is_refused_by_name(repair: Callable | None, small):
    break_tokens(small)
    shard = Shard(small, repair)
    assert len(shard.tokens(5))  # others are still good
    with pytest.raises(
        ConfigError, match=rf"^{small}: document 8 is damaged; restore the file, or remove it"
    ):
        shard.tokens(8)


# --- Making one anew --------------------------------------------------------------------------------------


def test_a_damaged_shard_is_made_anew_only_of_the_same_text(small, tokenizer, tmp_path):
    good = small.read_bytes()
    small.write_bytes(b"damaged")
    build(unit_of(tmp_path), tokenizer, small)
    assert small.read_bytes() == good
    small.write_bytes(b"damaged")
    write_file(tmp_path / "in" / "small.jsonl", [*SMALL, "and more"])
    with pytest.raises(
        ConfigError, match=rf"^{small}: is damaged, and \S*small.jsonl gives other tokens now; "
    ):
        build(unit_of(tmp_path), tokenizer, small)
    assert small.read_bytes() == b"damaged"
    assert not list(small.parent.glob(".*"))
    small.unlink()
    build(unit_of(tmp_path), tokenizer, small)
    assert len(Shard(small)) == len(SMALL) + 1


def test_a_build_that_fails_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    write_file(tmp_path / "in" / "small.jsonl", SMALL)
    with (tmp_path / "in" / "small.jsonl").open("a") as file:
        file.write("{broken")
    path = tmp_path / "x.arrow"
    with pytest.raises(ConfigError, match=r"small.jsonl cannot be read as json"):
        build(unit_of(tmp_path), tokenizer, path)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_manifest_is_written_after_its_shard(tokenizer, tmp_path, monkeypatch):
    write_file(tmp_path / "in" / "small.jsonl", SMALL)
    written: list[str] = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(Path(b).suffix) or replace_file(a, b))
    build(unit_of(tmp_path), tokenizer, tmp_path / "x.arrow")
    assert written == [".arrow", ".json"]


def test_sealed_files_are_whole_or_unchanged(tmp_path):
    path = tmp_path / "file"
    with sealed(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), sealed(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_are_arrow_streams_that_others_can_read(small):
    with pa.memory_map(str(small)) as source:
        table = pa.ipc.open_stream(source).read_all()
    assert table.column_names == ["input_ids", "key", "crc"]
    assert table["input_ids"].to_pylist() == tokens_of(Shard(small))
