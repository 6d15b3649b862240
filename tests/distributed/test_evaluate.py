"""Validation and the retrieval probe over ranks, and over parts of sequences, equal one rank's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optim.config import OptimConfig
from tests.distributed.ranks import DEVICES, spawn
from tests.tiny import packed_batch, tiny_config, tiny_model
from train.engine import TorchEngine
from train.evaluate import evaluate
from train.needle import GROUPS, find_needles, probe_batches, text_tokens
from train.parallel.context import context_of
from train.parallel.mesh import build_mesh
from train.ranks import Ranks

MODULE = "tests.distributed.test_evaluate"
LENGTH = 192
ROWS = [[192], [100, 7, 80], [64, 63], []]  # the last row is all padding
SOURCES = ("web", "code")
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}


def compare(ranks: Ranks, cp: str) -> None:
    mesh = build_mesh(ranks.rank, ranks.world, cp=int(cp))
    config = tiny_config("sch", 1, compress_rates=RATES, num_nextn_predict_layers=1)
    model = tiny_model(config).to(ranks.device, torch.float64)
    engine = TorchEngine(model, OptimConfig(), torch.float64)
    whole = packed_batch(ROWS, LENGTH, depth=1) | {"sources": torch.tensor([0, 1, 1, -1])}
    each = len(ROWS) // mesh.data_world
    mine = {name: x[mesh.data_rank * each :][:each] for name, x in whole.items()}
    text = torch.randint(2, 96, (text_tokens(2, LENGTH),), generator=torch.Generator().manual_seed(0))

    def found(batch: dict[str, torch.Tensor], alone: bool) -> dict[str, float]:
        place = (0, 1) if alone else (mesh.data_rank, mesh.data_world)
        reduce = (lambda sums: sums) if alone else ranks.sum
        probes = probe_batches(text, 2, LENGTH, 5, 1, *place)
        means = evaluate(engine, [batch], ranks.device, "sparse", reduce, look=False, sources=SOURCES)
        return means | find_needles(engine, probes, ranks.device, "sparse", reduce)

    expected = found(whole, alone=True)
    names = {"lm", "mtp", "lm/web", "lm/code", "lm/at_0", "lm/at_64", "lm/at_128", *GROUPS}
    assert expected.keys() == names | {"accuracy", "mtp_accuracy", "needle_accuracy"}
    engine.model.context = context_of(mesh)
    over_ranks = found(mine, alone=False)
    assert over_ranks == pytest.approx(expected, rel=1e-12)
    assert ranks.share(over_ranks) == over_ranks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cp", ["1", "2"])
def test_two_ranks_equal_one(cp: str, device: str, tmp_path: Path) -> None:
    spawn(2, MODULE, "compare", cp, folder=tmp_path, device=device)
