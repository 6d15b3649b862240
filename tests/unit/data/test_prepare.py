"""`python -m data.prepare`: in this process where that is enough, and as the program that people stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare import main
from data.shards import Shard
from tests.http_server import serve
from tests.unit.data.written import write_file

ROOT = Path(__file__).parents[3]
UNITS = 40


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(UNITS):
        write_file(tmp_path / "in" / f"{i:02d}.jsonl", [f"{i} {j} " + "word text " * j for j in range(20)])
    return tmp_path / "in"


def arguments(files: object, cache: Path, *more: str) -> list[str]:
    """Of a source `own`."""
    own = ["~data.sources.python", f"data.sources.own.files=[{files}]", "data.sources.own.text_column=body"]
    return [*own, f"data.cache_dir={cache}", "data.tokenizer.vocab_size=300", "data.workers=1", *more]


def contents(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((cache / "shards").iterdir()) if p.is_file()}


def sealed(cache: Path) -> set[Path]:
    return set((cache / "shards").glob("*.json"))


# --- In this process --------------------------------------------------------------------------------------


def test_a_table_says_what_there_is_and_a_second_run_verifies(source, tmp_path, capsys):
    command = arguments(source, tmp_path / "cache")
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    row = next(line for line in out.splitlines() if "own" in line).replace("│", " ").split()
    assert row[:3] == ["own", str(UNITS), f"{20 * UNITS:,}"]
    tokens = sum(Shard(path).manifest.tokens for path in (tmp_path / "cache" / "shards").glob("*.arrow"))
    assert row[3] == f"{tokens:,}"
    assert f"{UNITS} shards made, 0 verified in " in out and f"they are in {tmp_path}/cache" in out
    before = contents(tmp_path / "cache")
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"0 shards made, {UNITS} verified in " in out
    assert contents(tmp_path / "cache") == before


def test_every_damage_is_found_and_mended(source, tmp_path, capsys):
    command = arguments(source, tmp_path / "cache")
    assert main(command) == 0
    before = contents(tmp_path / "cache")
    capsys.readouterr()
    paths = sorted((tmp_path / "cache" / "shards").glob("*.arrow"))
    for number, path in enumerate(paths[:20]):  # somewhere else in each
        data = bytearray(path.read_bytes())
        data[number * len(data) // 20] ^= 1 << number % 8
        path.write_bytes(data)
    os.truncate(paths[20], 1000)
    os.truncate(paths[21].with_suffix(".json"), 10)
    paths[22].unlink()
    paths[23].with_suffix(".json").unlink()
    assert main(command) == 0
    _, err = capsys.readouterr()
    assert contents(tmp_path / "cache") == before
    warnings = err.splitlines()
    assert len(warnings) == 21
    for path in paths[:21]:
        assert sum(line.startswith(f"warning: {path} is damaged; it is made anew") for line in warnings) == 1


def test_sources_of_several_kinds_and_one_derived(source, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text of its own. " * 50)
    (tmp_path / "texts" / "b.txt").write_text("another text. " * 50)
    more = ["data.sources.long.of=own", "data.sources.long.min_tokens=100"]
    more.append(f"data.sources.texts.files=[{tmp_path}/texts]")
    assert main(arguments(f"'{source}/0*.jsonl'", tmp_path / "cache", *more)) == 0
    out, _ = capsys.readouterr()
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "│" in line]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("own", "10", "200"),
        ("long", "10", "200"),
        ("texts", "1", "2"),
    ]
    assert "11 shards made" in out  # those of `long` are those of `own`


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["data.max_byte=5"], "data.max_byte"),
        (["data.max_bytes=0"], "data.max_bytes: 0 must be positive"),
        (["data=wikipedia"], "data=wikipedia: there is no configs/data/wikipedia.yaml"),
        (["nonsense"], "nonsense"),
        (["data.path=nowhere"], "data.path: nowhere does not exist"),
        (["data.sources.own.weight=heavy"], "data.sources.own.weight"),
        (["data.sources.own.text_column=title"], "text_column: 'title' is not a column of "),
        (
            ["data.tokenizer.kind=file", "data.tokenizer.path=no.json"],
            "data.tokenizer.path: no.json cannot be read",
        ),
        (["data.cache_dir=/dev/null/cache"], "data.cache_dir: /dev/null/cache cannot be made"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(change, says, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(f"{source}/00.jsonl", tmp_path / "cache"), *change]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {says}")
    assert len(err.splitlines()) == 1


def test_a_broken_source_is_one_line_and_what_is_done_stays(source, tmp_path, capsys):
    (source / "07.jsonl").write_text('{"body": "a"}\n{broken')
    tokenizer = tmp_path / "bpe.json"
    main(arguments(f"{source}/00.jsonl", tmp_path / "first"))
    shutil.copy(next((tmp_path / "first").glob("bpe-*.json")), tokenizer)
    capsys.readouterr()
    command = arguments(
        source, tmp_path / "cache", "data.tokenizer.kind=file", f"data.tokenizer.path={tokenizer}"
    )
    assert main(command) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"error: {source}/07.jsonl cannot be read as json: ")
    assert len(err.splitlines()) == 1
    done = sealed(tmp_path / "cache")
    assert done and len(done) < UNITS
    (source / "07.jsonl").unlink()
    assert main(command) == 0
    assert f"{UNITS - 1 - len(done)} shards made, {len(done)} verified" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["listings", "bpe-"])
def test_a_full_disk_is_one_line(where, source, tmp_path, capsys, monkeypatch):
    def open_full(path, mode, *rest):
        return open("/dev/full" if where in str(path) and "w" in mode else path, mode, *rest)

    command = arguments(source / "00.jsonl", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("data.files.open", open_full, raising=False)
        assert main(command) == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: ") and " is full (No space left on device): free " in err
    assert len(err.splitlines()) == 1
    assert main(command) == 0


def test_a_cache_that_cannot_be_written_is_one_line(source, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").symlink_to("/dev/null/lock")  # root may write everywhere else
    assert main(arguments(source, tmp_path / "cache")) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"error: data.cache_dir: {tmp_path}/cache cannot be made or written: ")
    assert len(err.splitlines()) == 1


def test_help_says_what_to_type(capsys):
    assert main(["--help"]) == 0
    assert "python -m data.prepare data.path=texts" in capsys.readouterr().out


def test_the_arguments_of_a_training_give_its_shards(source, tmp_path, monkeypatch):
    """What a laptop run would use, at its own path: no other shards are made afterwards."""
    from configs.compose import compose
    from data.config import Shape
    from data.opening import open_data

    command = [f"data.path={source}/00.jsonl", f"data.cache_dir={tmp_path}/cache", "data.text_column=body"]
    assert main([*command, "data.workers=1"]) == 0
    monkeypatch.setattr("data.build.build", lambda *_, **__: pytest.fail("another shard"))
    data = open_data(compose(command).data, lambda step: Shape(2, 64), mtp_depth=1, seed=3)
    assert data.summary["shards_ready"] == data.summary["shards"] == 1
    assert data.train.batch()["input_ids"].shape == (2, 64)


# --- As a program -----------------------------------------------------------------------------------------


def program(command: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts it; Ctrl-C works also where the tests ignore it, as
    background jobs do."""
    return subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def living(group: int) -> dict[int, str]:
    """{id: command} of the processes of a process group that are alive."""
    columns = ["ps", "-A", "-ww", "-o", "pid=,pgid=,stat=,args="]
    rows = [line.split(None, 3) for line in subprocess.check_output(columns, text=True).splitlines()]
    return {int(row[0]): row[3] for row in rows if row[1] == str(group) and "Z" not in row[2]}


def wait_until_gone(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := living(group):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_ctrl_c_is_one_line_and_exit_code_130(source, tmp_path):
    """While one worker waits for a server and one for work."""
    command = arguments(source / "00.jsonl", tmp_path / "cache")
    assert main(command) == 0
    (tokenizer,) = (tmp_path / "cache").glob("bpe-*.json")
    with serve(source) as server:
        urls = f"{source}/01.jsonl, '{server.url('02.jsonl')}'"
        more = ["data.tokenizer.kind=file", f"data.tokenizer.path={tokenizer}", "data.workers=2"]
        server.fail("02.jsonl", "hang", times=99, skip=1)
        process = program(arguments(urls, tmp_path / "cache", *more))
        wait_until(lambda: len(server.requests) > 1 and len(sealed(tmp_path / "cache")) == 2, process)
        workers = [pid for pid, command in living(process.pid).items() if "spawn_main" in command]
        assert len(workers) == 2
        for pid in workers:  # they leave it to the program to end them
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert set(workers) < set(living(process.pid))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "stopped; the same command goes on\n"
    wait_until_gone(process.pid, 3.0)


def test_killed_and_started_again_it_makes_the_same_bytes(source, tmp_path, capsys):
    """Two workers, killed with all they hold, and one that goes on make what one makes that is left alone."""
    assert main(arguments(source, tmp_path / "first")) == 0
    (tokenizer,) = (tmp_path / "first").glob("bpe-*.json")
    more = ["data.tokenizer.kind=file", f"data.tokenizer.path={tokenizer}"]
    command = arguments(source, tmp_path / "cache", *more)

    process = program([*command, "data.workers=2"])
    wait_until(lambda: len(sealed(tmp_path / "cache")) >= 5, process)
    process.kill()
    process.communicate(timeout=30)
    wait_until_gone(process.pid, 3.0)
    done = {path: path.stat().st_mtime_ns for path in sealed(tmp_path / "cache")}
    assert 5 <= len(done) < UNITS, "killed too late: nothing was left to do"

    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"{UNITS - len(done)} shards made, {len(done)} verified" in out
    assert contents(tmp_path / "cache") == contents(tmp_path / "first")
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
