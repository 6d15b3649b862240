"""The bench of several GPUs runs on two CPU ranks; what it calls exposed is what nothing else covers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.parallel import BENCHES, communication, options_of
from tests.bench.table import parallel_rows, save_row
from tests.distributed.ranks import spawn
from tests.e2e.runs import SMALL
from train.ranks import Ranks

TINY = [key for key in SMALL if key.startswith("model.") and "experts" not in key]
TINY += [
    "data=python",
    "model.sliding_window=32",
    "model.o_groups=2",
    "model.index_n_heads=4",
    "model.index_head_dim=32",
]
TINY += ["model.qk_rope_head_dim=16", "train.micro_batch=1", "train.seq_len=256", "optim.lr=1e-2"]
TWO = ["model.num_hidden_layers=2", "model.mlp_layer_types=[hash_moe,moe]"]
TWO += ["model.layer_types=[compressed_sparse_attention,heavily_compressed_attention]"]
COMMANDS = [
    ["throughput", *TINY, "--experts", "6"],
    ["context", *TINY, *TWO, "--lengths", "256", "512"],
    ["checkpoint", *TINY, *TWO],
]


def smoke(ranks: Ranks, folder: str) -> None:
    for command in COMMANDS:
        options = options_of([*command, "--folder", folder, "--warmup", "1", "--steps", "2"])
        for result in BENCHES[options.bench](ranks, options):
            print(json.dumps({"bench": options.bench, "world": ranks.world, **result}))


def test_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    outputs = spawn(2, "tests.distributed.test_bench", "smoke", str(folder), folder=tmp_path)
    first, second = ([json.loads(x) for x in out.splitlines() if x.startswith("{")] for out in outputs)
    bf16, fp4, short, long, saved = first
    assert (bf16["precision"], fp4["precision"], bf16["experts"]) == ("bf16", "fp4_qat", 12)
    assert (short["seq_len"], short["batch_tokens"], long["batch_tokens"]) == (256, 256, 512)
    for ours, theirs in zip(first[:4], second[:4], strict=True):
        assert ours["last_loss"] == theirs["last_loss"] < ours["first_loss"]
        assert ours["tokens_per_s_gpu"] == pytest.approx(ours["batch_tokens"] / ours["seconds/step"] / 2)
    printed = [{"case": "", "device": "GPU"} | x for x in first]
    one = printed[0] | {"world": 1, "tokens_per_s_gpu": 2 * bf16["tokens_per_s_gpu"]}
    rows = parallel_rows([one, *printed])
    assert [row[4] for row in rows] == ["1.00", "0.50", "", "", ""] and "512 tokens" in rows[4][0]
    assert save_row(printed[-1])[1].endswith(" GB")
    assert fp4["first_loss"] < bf16["first_loss"]  # it goes on with the same weights
    assert saved["gb"] > 1e-4 and saved["seconds/save"] >= sum(saved["seconds/steps_beside"]) > 0


def test_exposed_communication() -> None:
    kernels = [
        ("product", 0, 10),
        ("ncclDevKernel_SendRecv(args)", 5, 10),
        ("add", 12, 2),
        ("product", 30, 4),
    ]
    kernels += [("ncclDevKernel_Reduce_Sum_f32_RING_LL(args)", 8, 10)]
    events = [{"cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in kernels]
    events.append({"cat": "gpu_user_annotation", "name": "nccl:all_to_all", "ts": 0, "dur": 99})
    found = {key: round(1e6 * value, 3) for key, value in communication(events).items()}
    assert found == {
        "seconds/nccl": 13,
        "seconds/nccl_exposed": 6,  # 10 to 12 and 14 to 18
        "seconds/nccl/SendRecv": 10,
        "seconds/nccl/SendRecv_exposed": 3,
        "seconds/nccl/Reduce": 10,
        "seconds/nccl/Reduce_exposed": 6,
    }
    assert communication([]) == {}
