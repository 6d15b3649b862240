"""What a run writes about itself: right numbers, whole lines whatever kills it, and a picture of them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tests.tiny import tiny_config, tiny_model
from train import metrics
from train.metrics import JsonLines, Timer, expert_metrics, floats, keep_until, memory, read_lines
from train.plot import plot_run

ROOT = Path(__file__).parents[3]
CUDA = torch.device("cuda")


def test_expert_metrics_against_counting() -> None:
    config = tiny_config("scs", 1, num_nextn_predict_layers=1)
    model = tiny_model(config)
    model.moes()[1].gate.e_score_correction_bias[2] = -5
    generator = torch.Generator().manual_seed(0)
    choices = [(torch.rand(300, generator=generator) ** (i + 1) * 8).long() for i in range(4)]
    loads = [torch.bincount(chosen, minlength=8) for chosen in choices]
    found = floats(expert_metrics(model, loads))
    expected = {}
    for layer, chosen, moe in list(zip(["0", "1", "2", "mtp0"], choices, model.moes(), strict=True))[1:]:
        counts = Counter(chosen.tolist())
        entropy = sum(n / 300 * math.log(300 / n) for n in counts.values())
        expected[f"load_max/{layer}"] = max(counts.values()) / (300 / 8)
        expected[f"load_entropy/{layer}"] = entropy / math.log(8)
        expected[f"router_bias/{layer}"] = max(map(abs, moe.gate.e_score_correction_bias.tolist()))
    expected["max_load"] = max(x for name, x in expected.items() if name.startswith("load_max/"))
    assert found == pytest.approx(expected, rel=1e-12)


def test_expert_metrics_at_their_ends() -> None:
    model = tiny_model(tiny_config("ss", 0))
    even, one, none = torch.full((8,), 5), torch.eye(8, dtype=torch.int64)[3] * 9, torch.zeros(8).long()
    found = floats(expert_metrics(model, [even, one]))
    assert (found["load_max/0"], found["load_max/1"]) == (1, 8)
    assert found["load_entropy/0"] == pytest.approx(1) and found["load_entropy/1"] == pytest.approx(0)
    assert all(map(math.isfinite, floats(expert_metrics(model, [none, none])).values()))
    hashed = tiny_model(tiny_config("ss", 2))
    assert expert_metrics(hashed, [even, one]) == {}


def test_floats_are_the_same_numbers() -> None:
    third = torch.tensor(1 / 3)
    found = floats({"a": third, "count": torch.tensor(7), "step": 3, "lr": 0.1})
    assert found == {"a": float(third), "count": 7.0, "step": 3, "lr": 0.1}
    assert json.dumps(found["step"]) == "3" and not any(isinstance(x, torch.Tensor) for x in found.values())


@pytest.mark.gpu
def test_values_leave_the_gpu_in_one_transfer() -> None:
    model = tiny_model(tiny_config("ss", 1)).to(CUDA)
    loads = [torch.arange(8, device=CUDA)] * 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = {**expert_metrics(model, loads), "lm": torch.ones((), device=CUDA), "cpu": torch.ones(())}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile() as profile:
        found = floats(values)
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1 and found["load_max/1"] == 2.0


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_parts_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = Timer(torch.device("cpu"))
    for _ in range(2):  # the second step knows nothing of the first
        timer.start()
        for part, seconds in (("data", 1), ("forward", 2), ("backward", 4), ("forward", 8)):
            with timer(part):
                clock.now += seconds
        clock.now += 16
        parts = {"seconds/data": 1, "seconds/forward": 10, "seconds/backward": 4, "seconds/other": 16}
        assert timer.stop() == {**parts, "seconds/step": 31}
        clock.now += 1000


@pytest.mark.gpu
def test_parts_on_a_gpu_are_what_the_gpu_took() -> None:
    x = torch.randn(4096, 4096, device=CUDA)
    x @ x
    torch.cuda.synchronize()
    timer = Timer(CUDA)
    with timer("short"):
        x @ x
    began = time.perf_counter()
    with timer("long"):
        for _ in range(200):
            x @ x
    launched = time.perf_counter() - began  # the host is done long before the GPU
    floats({"value": x[0, 0]})
    took = time.perf_counter() - began
    seconds = timer.stop()
    assert launched < 0.5 * took
    assert seconds["seconds/long"] == pytest.approx(took, rel=0.3)
    assert seconds["seconds/short"] < 0.1 * seconds["seconds/long"]
    assert seconds["seconds/step"] >= seconds["seconds/long"] + seconds["seconds/short"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_the_process_in_gib() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert memory(torch.device("cpu"))["memory_rss_gib"] == pytest.approx(kib / 2**20, rel=0.02)


@pytest.mark.gpu
def test_memory_of_the_gpu_is_the_peak_since_the_last_call() -> None:
    memory(CUDA)
    held = torch.cuda.memory_allocated() / 2**30
    del_me = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    del del_me
    peak = memory(CUDA)
    assert peak["memory_allocated_gib"] == pytest.approx(held + 1, abs=0.01)
    assert peak["memory_reserved_gib"] >= peak["memory_allocated_gib"]
    assert memory(CUDA)["memory_allocated_gib"] == pytest.approx(held, abs=0.01)


def write(path: Path, steps: int) -> list[str]:
    lines = JsonLines(path)
    for step in range(steps):
        lines.write(step=step, lm=step / 3, name="é\n", **({"valid_lm": math.nan} if step == 2 else {}))
    return path.read_text().splitlines(keepends=True)


def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 4)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        keep_until(path, 10)
        kept = path.read_text().splitlines(keepends=True)
        finished = whole[:cut].count(b"\n")
        assert kept in (lines[:finished], lines[: finished + 1])  # a line may lack only its end
        assert len(read_lines(path)) == len(kept)
    assert [path] == list(tmp_path.iterdir())


def test_keep_until_keeps_the_bytes_of_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 6)
    keep_until(path, 3)
    assert path.read_text() == "".join(lines[:4])
    keep_until(path, -1)
    assert path.read_text() == ""
    keep_until(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_crash_of_keep_until_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 6)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no more disk")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
            patch.setattr(os, name, crash)
            keep_until(path, 2)
        assert path.read_bytes() == before


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from train.metrics import JsonLines
lines, step = JsonLines(Path({str(path)!r})), 0
while True:
    lines.write(step=step, **{{f"value_{{i}}": i / 7 for i in range(80)}})
    print(step, flush=True)
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told = int(line)
        if told == 300:
            process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [line["step"] for line in read_lines(path)]
    assert steps == list(range(len(steps))) and len(steps) > told  # what was told is there


def test_the_picture_shows_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    logged, timing = JsonLines(tmp_path / "metrics.jsonl"), JsonLines(tmp_path / "timing.jsonl")
    logged.write(step=0, valid_lm=5.0)
    for step in range(1, 5):
        values = {"lm": 4.0, "mtp": 4.5, "lr": 0.1 * step, "grad_norm_model": 2.0, "grad_norm_indexer": 1.0}
        logged.write(step=step, **values, max_load=1.5, **{"load_entropy/2": 0.9, "load_entropy/mtp0": 0.8})
        parts = {"seconds/forward": 1.0, "seconds/backward": 2.0, "seconds/step": 3.0}
        timing.write(step=step, tokens_per_s=100.0, **parts)
    timing.write(step=4, **{"seconds/checkpoint": 9.0})  # of no step
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "lm"')
    assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line for axes in figures[0].axes for line in axes.lines}
    curves = {"lm", "mtp", "lm, validation", "lr", "model", "indexer", "max_load", "tokens_per_s"}
    assert lines.keys() == curves | {"load_entropy/2", "load_entropy/mtp0"}
    assert np.asarray(lines["lr"].get_xdata()).tolist() == [1, 2, 3, 4]
    stacked = {area.get_label() for axes in figures[0].axes for area in axes.collections}
    assert stacked == {"forward", "backward"}


def test_a_picture_of_next_to_nothing(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").write(step=0, valid_lm=5.0)
    JsonLines(tmp_path / "timing.jsonl")
    assert plot_run(tmp_path).exists()
