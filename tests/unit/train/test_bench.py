"""The memory bench runs where there is no GPU, and its rows can be printed."""

from __future__ import annotations

import json

import pytest

from tests.bench.memory import cases, measure
from tests.bench.table import recompute_row
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
