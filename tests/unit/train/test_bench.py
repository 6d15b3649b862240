"""The memory bench runs without a GPU; rows of benches can be printed; runs are told what they shall do."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from tests.bench import warmup
from tests.bench.memory import cases, measure
from tests.bench.precision import late
from tests.bench.precision import table as table_of_precisions
from tests.bench.recurring import CHARACTERS, documents
from tests.bench.runs import FINISHED, _places, run_all
from tests.bench.table import attention_rows, indexer_row, kernel_row, recompute_row
from tests.bench.warmup import RUNS, chance, phases, table
from train.recompute import HOW

TINY = [
    "parallel=single",
    "train.device=cpu",
    "train.seq_len=64",
    "train.micro_batch=1",
    "train.batch_tokens=64",
    "model.num_hidden_layers=2",
    "model.layer_types=[sliding_attention,compressed_sparse_attention]",
    "model.mlp_layer_types=[hash_moe,moe]",
    "model.hc_sinkhorn_iters=1",
]


def test_every_case_has_each_recomputation() -> None:
    assert [case[-1] for case in cases([], recompute=True)] == [f"train.recompute={how}" for how in HOW] * 2
    assert cases(TINY, recompute=True)[1] == [*TINY, "train.recompute=selective"]


@pytest.mark.parametrize("how", ["none", "full"])
def test_a_case_on_a_cpu(how: str) -> None:
    result = json.loads(json.dumps(measure([*TINY, f"train.recompute={how}"], micros=1, steps=2)))
    assert result["error"] is None and result["seconds"] > 0 and result["measured_total"] > 0
    case, printed, predicted, *_ = recompute_row(result)
    assert (case, printed) == (" ".join(TINY), how) and predicted.endswith("GiB")
    out = recompute_row({**result, "error": "out of memory"})
    assert out[3] == "out of memory" and out[-2:] == ("", "")


def test_rows_of_attention_and_the_indexer() -> None:
    case = {"case": "csa_dense", "length": 4096, "heads": 64}
    times = {"forward_ms": 1.0, "forward_tflops": 400.4, "backward_ms": 2.0, "backward_tflops": 200.4}
    peers = (
        {"peer": "torch", "forward_over": 4.0, "backward_over": 3.0},
        {"peer": "transformers", "error": "none"},
    )
    tuned = {"part": "tune", "case": "FORWARD", "ms": 1.0}
    rows = attention_rows(
        [tuned, case | times, case | {"part": "mass", "ms": 1.0}, *(case | p for p in peers)]
    )
    ours = "1.00 ms, 400 TFLOP/s", "2.00 ms, 200 TFLOP/s"
    assert rows == [("csa dense", "4,096", "64", *ours, "4.0 ×, 3.0 ×", "none")]
    pooled = {"part": "pooling", "case": "CSA", "ms": 0.5, "gb_per_s": 1234.0, "over_floor": 4.0}
    assert indexer_row(pooled) == ("pooling: CSA", "0.500", "1,234 GB/s", "0.25 ×")
    scores = {"part": "scores", "case": "S 4096", "ms": 0.5, "tflops": 99.6}
    assert indexer_row(scores) == ("scores: S 4096", "0.500", "100 TFLOP/s", "")


def test_rows_of_kernels() -> None:
    grouped = {"part": "grouped", "case": "all three", "ms": 4.0, "device": "GPU"}
    speeds = {"tflops": 800.2, "bf16_tflops": 500.4, "over_bf16": 1.6}
    row = ("grouped: all three", "4.000", "800 TFLOP/s", "bf16, 500 TFLOP/s", "1.60 × as fast", "GPU")
    assert kernel_row(grouped | speeds) == row


def test_passages_recur() -> None:
    text = "".join(f"{number:05}\n" for number in range(1000)) + "x" * 3 * CHARACTERS + "\n"
    found = list(documents(text, 2, 3, random.Random(0)))
    length = -(-CHARACTERS // 6)  # lines of a passage
    assert len(found) == 1000 // length // 2
    lines = found[0].splitlines()
    rounds = [lines[start : start + 2 * length] for start in range(0, 6 * length, 2 * length)]
    assert len(lines) == 6 * length and all(sorted(r) == sorted(set(lines)) for r in rounds)
    assert any(r != rounds[0] for r in rounds) and not any("x" in document for document in found)
    assert found == list(documents(text, 2, 3, random.Random(0)))


def test_phases_of_a_warmup_and_its_table() -> None:
    steps = {"dense": 4, "warmup": 2, "sparse": 3}
    with_, without = (
        compose(["experiment=nano", "optim.warmup_steps=1", *phases(steps, *chosen)])
        for chosen in RUNS.values()
    )
    assert [(p.name, p.first, p.stop) for p in with_.timeline] == [
        ("dense", 0, 4),
        ("warmup", 4, 6),
        ("sparse", 6, 9),
    ]
    assert [(p.name, p.first, p.stop) for p in without.timeline] == [("dense", 0, 4), ("sparse", 4, 7)]
    sets = [with_.at(step).trained_sets for step in (0, 4, 6)]
    assert sets == [("model",), ("indexer",), ("model", "indexer")]
    assert chance(4, 2) == pytest.approx((2 / 3 + 2 / 4) / 2)
    rows = [{"model_step": 0, "step": 0, "valid_lm": 5.0}, {"model_step": 7, "step": 9, "valid_lm": 3.0}]
    twin = [{"model_step": 7, "step": 7, "valid_lm": 4.0, "indexer_recall": 0.5}]
    lines = table([{"steps": steps, "chance": 0.1, "valid": rows}, {"steps": steps, "valid": twin}])
    assert lines[3] == "| step 9 | 7 | 3.0000 | 4.0000 |  | 0.500 |  |" and lines[-1] == "chance 0.100"


def test_runs_share_the_gpus_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str | None] = {}

    def run(command: list[str], env: dict[str, str], **_: Any) -> None:
        seen[next(key for key in command if key.startswith("run.name="))[9:]] = env.get(
            "CUDA_VISIBLE_DEVICES"
        )

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "curves.png").touch()
    run_all(tmp_path, {"a": [], "done": [], "b": []}, jobs=1)
    assert seen == {"a": "3", "b": "3"}
    assert [place["CUDA_VISIBLE_DEVICES"] for place in _places(3)] == ["3", "5", "3"]


def test_both_runs_go_on_from_one_dense_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, tuple[str, ...]] = {}

    def run_all(folder: Path, runs: dict[str, list[str]], jobs: int) -> None:
        for name in runs:
            begun[name] = tuple(sorted(path.name for path in (folder / name).glob("*")))
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in ("metrics.jsonl", FINISHED):
                (folder / name / file).write_text("")

    monkeypatch.setattr(warmup, "run_all", run_all)
    monkeypatch.setattr(warmup, "plot", lambda *_: None)
    monkeypatch.setattr(warmup, "table", lambda _: [])
    keys = ["experiment=nano", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["warmup", *keys])
    warmup.main()
    assert begun == {"dense": (), "with": ("metrics.jsonl",), "without": ("metrics.jsonl",)}


def test_precisions_are_compared_on_the_same_batches() -> None:
    plain = {"experiment": "nano", "precision": "bf16", "seed": 0, "steps": 40, "valid_lm": 4.0}
    runs = [plain | {"losses": [8.0, 6.0, 5.0, 4.0]}, plain | {"losses": [8.0, 6.0, 2.0, 3.0], "seed": 1}]
    rounded = plain | {"precision": "fp8", "valid_lm": 4.1, "losses": [9.0, 7.0, 5.1, 4.0]}
    middle, error = late(rounded, runs[0])
    assert middle == pytest.approx(0.01) and error == pytest.approx(0.01)
    lines = table_of_precisions([*runs, rounded, rounded | {"precision": "fp4_qat"}])
    assert lines[3] == "| nano, 40 steps | fp8 | 1 | 4.1000 | +2.50% | +2.50% | +1.00% ± 1.00% |"
