"""The memory bench runs where there is no GPU; its rows can be printed, and those of attention's kernels."""

from __future__ import annotations

import json

import pytest

from tests.bench.memory import cases, measure
from tests.bench.table import attention_rows, indexer_row, recompute_row
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
