"""Tracking: what reaches the backend, and that no backend can stop, slow or outlive training."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import ConfigError
from train import tracking
from train.tracking import Tracker, messages, wandb_mode, without_secrets

ROOT = Path(__file__).parents[3]

# Stands in for the package: writes down every call. BODY is put at the start of Run.log.
FAKE = """
import json, os, sys, time
def write(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
class Summary(dict):
    def update(self, values): write("summary", values)
class Artifact:
    def __init__(self, name, type): self.name, self.type = name, type
    def add_dir(self, folder, policy): self.folder = folder
class Run:
    def __init__(self, id): self.id, self.summary = id, Summary()
    def log(self, values, step):
        BODY
        write("log", step, values)
    def log_artifact(self, artifact): write("artifact", artifact.name, artifact.folder)
    def finish(self, exit_code): write("finish", exit_code)
def Settings(**settings): return settings
def teardown(): write("teardown")
def init(**options):
    write("init", options)
    INIT
    return Run(options["id"])
"""


class Backend:
    """A fake W&B in a folder that the child imports from, what was called, and what the tracker warned of."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.warnings = folder / "run", list[str]()
        self.folder.mkdir()
        self._modules, self._calls = folder / "modules", folder / "calls"
        self._modules.mkdir()
        monkeypatch.setenv("CALLS", str(self._calls))
        monkeypatch.setenv("PYTHONPATH", str(self._modules))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(folder / "netrc"))
        self.fake()

    def fake(self, body: str = "pass", init: str = "pass", source: str = FAKE) -> None:
        (self._modules / "wandb.py").write_text(source.replace("BODY", body).replace("INIT", init))

    def start(self, *overrides: str, run_id: str | None = None, step: int = 0) -> tuple[Tracker, str | None]:
        tracker = Tracker(self.warnings.append)
        return tracker, tracker.start(compose(["tracking=wandb", *overrides]), self.folder, run_id, step)

    def calls(self, kind: str = "") -> list[list[Any]]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [call for call in map(json.loads, lines) if call[0] == kind or not kind]


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    yield Backend(tmp_path, monkeypatch)


def wait_for(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_everything_arrives_in_order(backend: Backend) -> None:
    options = ["tracking.project=p", "tracking.tags=[a,b]", "tracking.group=g", "tracking.artifacts=true"]
    tracker, run_id = backend.start(*options, "train.seed=7")
    tracker.log(1, {"lm": 2.5, "load_max/3": 1.25})
    tracker.log(2, {"lm": float("nan")})
    tracker.rollback(1, "step 2: not finite")
    tracker.summary(valid_lm=1.5, sample="text\nof two lines")
    tracker.artifact(backend.folder)
    tracker.close(3)
    tracker.log(3, {"lm": 0.0})  # after the end: nothing
    tracker.close()
    (_, options_of_init), *rest = backend.calls()
    assert rest[0] == ["log", 1, {"lm": 2.5, "load_max/3": 1.25}]
    assert rest[1][:2] == ["log", 2] and rest[1][2]["lm"] != rest[1][2]["lm"]
    assert rest[2:] == [
        ["summary", {"rollback": "to step 1: step 2: not finite"}],
        ["summary", {"valid_lm": 1.5, "sample": "text\nof two lines"}],
        ["artifact", f"model-{run_id}", str(backend.folder)],
        ["finish", 3],
    ]
    wanted = {"project": "p", "entity": None, "name": "run", "group": "g", "tags": ["a", "b"]}
    wanted |= {"id": run_id, "resume": "allow", "mode": "offline", "dir": str(backend.folder)}
    assert {key: options_of_init[key] for key in wanted} == wanted
    assert options_of_init["config"]["train"]["seed"] == 7
    assert not backend.warnings


def test_the_same_run_goes_on(backend: Backend) -> None:
    first, run_id = backend.start()
    first.close()
    second, again = backend.start(run_id=run_id)
    second.close()
    assert [call[1]["id"] for call in backend.calls("init")] == [run_id, again] == [run_id, run_id]
    another, other_id = backend.start()
    another.close()
    assert other_id != run_id


def test_no_backend_no_process(tmp_path: Path) -> None:
    tracker = Tracker(pytest.fail)
    assert tracker.start(compose([]), tmp_path) is None
    tracker.log(1, {"lm": 1.0})
    tracker.artifact(tmp_path)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_a_model_is_sent_only_on_request(backend: Backend) -> None:
    tracker, _ = backend.start()
    tracker.artifact(backend.folder)
    tracker.close()
    assert not backend.calls("artifact") and backend.calls("finish")


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"source": "raise ModuleNotFoundError('no', name='wandb')"}, "wandb is not installed"),
        ({"init": "raise OSError('no\\nserver')"}, "OSError no server"),
        ({"init": "os._exit(5)"}, "exit code 5"),
        ({"body": "raise ValueError('odd value')"}, "ValueError odd value"),
        ({"body": "os._exit(6)"}, "exit code 6"),
    ],
)
def test_whatever_fails_is_one_line(backend: Backend, fake: dict[str, str], words: str) -> None:
    backend.fake(**fake)
    tracker, _ = backend.start()
    child = tracker._child
    assert child is not None
    tracker.log(1, {"lm": 1.0})
    wait_for(lambda: backend.warnings and child.poll() is not None)
    for step in range(2, 3 * tracking.QUEUE):
        tracker.log(step, {"lm": 1.0})
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5
    assert len(backend.warnings) == 1 and words in backend.warnings[0]
    assert "\n" not in backend.warnings[0]


def test_an_error_in_one_call_still_ends_the_run(backend: Backend) -> None:
    backend.fake(body="if step == 2: raise ValueError")
    tracker, _ = backend.start()
    for step in (1, 2):
        tracker.log(step, {"lm": 1.0})
    tracker.close()
    assert [call[0] for call in backend.calls()] == ["init", "log", "finish"]


@pytest.mark.parametrize("fake", [{"init": "time.sleep(600)"}, {"body": "time.sleep(600)"}])
def test_a_hanging_backend_neither_slows_nor_stays(
    backend: Backend, fake: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    backend.fake(**fake)
    tracker, _ = backend.start()
    child = tracker._child
    assert child is not None
    values = {f"metric_{i}": float(i) for i in range(60)}
    longest, sent = 0.0, 2 * tracking.QUEUE
    for step in range(sent):
        began = time.monotonic()
        tracker.log(step, values)
        longest = max(longest, time.monotonic() - began)
    assert longest < 0.5 and tracker.dropped > 0
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5 and child.poll() is not None
    tracker.close()
    first, late, count = backend.warnings
    assert "does not keep up" in first and "not all was sent" in late
    assert f"{tracker.dropped} messages" in count


def test_nobody_waits_for_a_child_that_died(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, _ = backend.start()
    child = tracker._child
    assert child is not None
    child.kill()
    child.wait()
    monkeypatch.setattr(child, "poll", lambda: None)  # a moment ago it was alive
    for step in range(3 * tracking.QUEUE):
        tracker.log(step, {"lm": 1.0})
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5


def test_without_a_server_it_goes_on_offline(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    backend.fake(init="if options['mode'] == 'online': raise OSError('no server')")
    tracker, _ = backend.start()
    tracker.log(1, {"lm": 1.0})
    tracker.close()
    assert [call[1]["mode"] for call in backend.calls("init")] == ["online", "offline"]
    assert backend.calls("log") == [["log", 1, {"lm": 1.0}]] and len(backend.warnings) == 1


def test_a_killed_trainer_loses_nothing(backend: Backend) -> None:
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from configs.compose import compose
from train.tracking import Tracker
tracker = Tracker(print)
tracker.start(compose(["tracking=wandb"]), Path({str(backend.folder)!r}))
for step in range(200):
    tracker.log(step, {{"lm": 1.0}})
while not tracker._queue.empty():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    wait_for(lambda: backend.calls("finish"))
    assert len(backend.calls("log")) in (199, 200)  # the last may have left the queue but not the process
    assert backend.calls("finish") == [["finish", 1]]


def test_wandb_for_real_offline_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = compose(["tracking=wandb", "tracking.mode=offline", "optim.clip_norm=inf"])
    warnings: list[str] = []
    run_id: str | None = None
    for steps in ([1, 2], [3]):
        tracker = Tracker(warnings.append)
        run_id = tracker.start(config, tmp_path, run_id, step=steps[0] - 1)
        for step in steps:
            tracker.log(step, {"lm": step / 4})
            tracker.log(step, {"valid_lm": step / 8})
        tracker.close()
    assert not warnings, (tmp_path / tracking.LOG).read_text()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    records = [record for file in files for record in wandb_records(file)]
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row["lm"], row["valid_lm"]) for row in rows] == [
        (1, 0.25, 0.125), (2, 0.5, 0.25), (3, 0.75, 0.375),
    ]  # fmt: skip
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0, 0]


def wandb_records(file: Path) -> Iterator[Any]:
    """The protobuf records of W&B's file: a LevelDB log in blocks of 32 KiB after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2 as protobuf

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = protobuf.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_tensorboard_for_real_hides_what_is_done_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, warnings = compose(["tracking=tensorboard"]), list[str]()
    for after, last in ((0, 4), (2, 5)):
        tracker = Tracker(warnings.append)
        assert tracker.start(config, tmp_path, step=after) is None
        for step in range(after + 1, last + 1):
            tracker.log(step, {"lm": after + step / 4})
        tracker.close()
    assert not warnings, (tmp_path / tracking.LOG).read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("lm")
    assert [(e.step, e.value) for e in events] == [(1, 0.25), (2, 0.5), (3, 2.75), (4, 3.0), (5, 3.25)]


def test_tensorboard_for_real_goes_back(tmp_path: Path) -> None:
    """A rollback hides what came after it, as a start from there would, and is written down."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings: list[str] = []
    tracker = Tracker(warnings.append)
    tracker.start(compose(["tracking=tensorboard"]), tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        tracker.log(step, {"lm": loss})
    tracker.rollback(1, "step 3: high")
    for step, loss in ((2, 2.0), (3, 1.0)):
        tracker.log(step, {"lm": loss})
    tracker.close()
    assert not warnings, (tmp_path / tracking.LOG).read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("lm")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    (text,) = events.Tensors("rollback/text_summary")
    assert text.tensor_proto.string_val == [b"to step 1: step 3: high"]


def test_secrets_stay_here() -> None:
    tree = {"hf_token": "t", "key": "k", "nested": [{"API_KEY": "a", "url": "s3://me:word@host/x", "n": 1}]}
    nested = {"API_KEY": "***", "url": "s3://***@host/x", "n": 1}
    assert without_secrets(tree) == {"hf_token": "***", "key": "***", "nested": [nested]}
    plain = {"tokenizer": {"kind": "bpe"}, "batch_tokens": 4, "monkey": 1, "key": None, "at": "a@b"}
    assert without_secrets(plain) == plain


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert wandb_mode() == "offline"
    file.write_text("machine api.wandb.ai login user password word\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_torn_last_message_is_left_out() -> None:
    assert list(messages(['["log", 1]\n', '["lo'])) == [["log", 1]]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracking=mlflow", "none, tensorboard, wandb"),
        ("tracking.backend=mlflow", "none, wandb or tensorboard"),
        ("tracking.mode=on", "auto, online or offline"),
        ("tracking.artifacts=true", "tracking=wandb"),
        ("tracking.project=''", "tracking.project"),
        ("tracking.tags=x", "tracking.tags"),
    ],
)
def test_wrong_keys_are_one_line(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert words in str(caught.value) and "\n" not in str(caught.value)
