"""Datasets of the hub, as a stand-in on this machine serves them. One program asks for everything, since each
would take seconds to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub_server import REVISION, serve_hub
from tests.unit.data.written import ROW_GROUP, write_file

ROOT = Path(__file__).parents[3]
TEXTS = [f"text {i} é中 " * (i % 30 + 1) for i in range(150)]
README = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: first/*.parquet}
  - {split: test, path: first-test/*.parquet}
- config_name: second
  data_files: second/*.parquet
---
"""
TRIES = 8  # more than the hub's own library makes
PROGRAM = """
import json, sys, time
from data import remote, sources
from data.config import DataConfig, SourceConfig
from data.reading import read
from data.sources import find_units

sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # its own tries, too
sources.ROW_GROUPS_BYTES = 8000
asked, config = json.loads(sys.argv[1]), DataConfig(cache_dir=sys.argv[2], patience_minutes=0.2)
for name, fields in asked.items():
    said = []
    try:
        units = find_units("web", SourceConfig(**fields), config, said.append).units
        texts = [[t for b in read(u, minutes=0.2, say=said.append) for t in b] for u in units]
        found = {"units": [[u.files[0], u.builder, u.row_groups, u.size, u.limit] for u in units]}
        found["texts"] = texts
    except ValueError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps({"name": name, "said": said} | found), flush=True)
"""
ASKED: dict[str, dict] = {
    "first": {"dataset": "org/parquet", "subset": "first", "text_column": "body"},
    "again": {"dataset": "org/parquet", "subset": "first", "text_column": "body"},
    "test": {"dataset": "org/parquet", "subset": "first", "split": "test", "text_column": "body"},
    "pinned": {"dataset": "org/parquet", "subset": "second", "revision": REVISION, "text_column": "body"},
    "lines": {"dataset": "org/lines", "text_column": "body"},
    "no split": {"dataset": "org/parquet", "subset": "first", "split": "valid"},
    "no subset": {"dataset": "org/parquet", "subset": "third"},
    "which subset": {"dataset": "org/parquet"},
    "no dataset": {"dataset": "org/none"},
    "no revision": {"dataset": "org/parquet", "subset": "first", "revision": "f" * 40},
    "no column": {"dataset": "org/parquet", "subset": "second"},
    "no text": {"dataset": "org/pictures"},
    "closed": {"dataset": "org/closed"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> SimpleNamespace:
    """answers: what the program found, by name; requests: made by it, of which `unknown`."""
    home = tmp_path_factory.mktemp("hub")
    data = home / "repositories" / "org"
    for part in range(3):
        write_file(data / "parquet" / "first" / f"{part}.parquet", TEXTS[part * 50 : part * 50 + 50])
    write_file(data / "parquet" / "first-test" / "0.parquet", ["held out"])
    write_file(data / "parquet" / "second" / "0.parquet", TEXTS)
    (data / "parquet" / "README.md").write_text(README)
    write_file(data / "lines" / "data" / "train-0.jsonl.gz", TEXTS[:70])
    write_file(data / "lines" / "data" / "train-1.jsonl.gz", TEXTS[70:])
    (data / "pictures").mkdir()
    (data / "pictures" / "a.png").write_bytes(b"\x89PNG")
    (data / "closed").mkdir()
    with serve_hub(home / "repositories") as served:
        served.failures = {
            "parquet/resolve/main/README.md": [503] * TRIES,  # of the first that is asked for
            "first/1.parquet": [502] * TRIES,
            "train-1.jsonl.gz": [500] * TRIES,
            "org/closed/resolve/main/README.md": [403] * 99,
            "datasets/org/closed": [403] * 99,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
        env |= {"HF_ENDPOINT": served.url, "HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PROGRAM, json.dumps(ASKED), str(home / "cache")]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answers = {(found := json.loads(line)).pop("name"): found for line in done.stdout.splitlines()}
        return SimpleNamespace(answers=answers, requests=served.requests, unknown=served.unknown, home=home)


def test_every_document_of_a_split(hub):
    first = hub.answers["first"]
    files = sorted({unit[0] for unit in first["units"]})
    assert files == [f"hf://datasets/org/parquet@{REVISION}/first/{i}.parquet" for i in range(3)]
    assert sorted(text for texts in first["texts"] for text in texts) == sorted(TEXTS)
    for (file, _, ranges, *_), texts in zip(first["units"], first["texts"], strict=True):
        part = TEXTS[50 * int(file[-len("0.parquet")]) :][:50]
        assert texts == part[slice(*(ROW_GROUP * i for i in ranges))]
    assert hub.answers["test"]["texts"] == [["held out"]]


def test_a_large_file_is_ranges_of_row_groups(hub):
    pinned = hub.answers["pinned"]
    ranges = {tuple(unit[2]): texts for unit, texts in zip(pinned["units"], pinned["texts"], strict=True)}
    assert len(ranges) > 2
    assert [text for at in sorted(ranges) for text in ranges[at]] == TEXTS
    for (start, stop), texts in ranges.items():
        assert texts == TEXTS[start * ROW_GROUP : stop * ROW_GROUP]


def test_compressed_lines_without_a_configuration(hub):
    lines = hub.answers["lines"]
    assert {unit[1] for unit in lines["units"]} == {"json"}
    assert sorted(text for texts in lines["texts"] for text in texts) == sorted(TEXTS)


def test_failures_are_waited_for_and_told(hub):
    said = hub.answers["first"]["said"]
    assert any("org/parquet" in line and "503" in line for line in said)
    assert any("1.parquet" in line and "next try in" in line for line in said)
    assert any("train-1.jsonl.gz" in line for line in hub.answers["lines"]["said"])


def test_a_dataset_is_looked_up_once(hub):
    assert hub.answers["again"]["units"] == hub.answers["first"]["units"]
    assert hub.answers["again"]["texts"] == hub.answers["first"]["texts"]
    listings = [request for request in hub.requests if "/tree/" in request and request.endswith("/first")]
    assert len(listings) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no split", "data.sources.web.split: 'valid' is not a split; it has train, test"),
        ("no subset", "data.sources.web.dataset: org/parquet: BuilderConfig 'third' not found. Available: "),
        ("which subset", "data.sources.web.dataset: org/parquet: Config name is missing. Please pick one"),
        ("no dataset", "data.sources.web.dataset: org/none cannot be read: "),
        ("no revision", "data.sources.web.dataset: org/parquet cannot be read: "),
        ("no column", "text_column: 'text' is not a column of hf://datasets/org/parquet@"),
        ("no text", "data.sources.web.dataset: org/pictures: "),
        ("closed", "data.sources.web.dataset: org/closed"),
    ],
)
def test_a_wrong_name_is_one_line(name, says, hub):
    answer = hub.answers[name]
    assert answer.get("kind") == "ConfigError", answer
    assert answer["error"].startswith(says)
    assert "\n" not in answer["error"]


def test_nothing_else_is_asked_or_sent(hub):
    assert not any(request.startswith("POST") for request in hub.requests)
    assert {request for request in hub.unknown if "agent-harnesses" not in request} == set()
