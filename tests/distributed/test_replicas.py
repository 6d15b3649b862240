"""Whatever ranks hold alike is compared: a bit that differs anywhere ends all ranks, and is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from tests.distributed.ranks import GPU, spawn
from tests.distributed.test_zero import LENGTH, ROWS, config_of
from tests.tiny import packed_batch, tiny_model
from train.loop import train_step
from train.parallel.mesh import build_mesh
from train.ranks import Ranks
from train.replicas import compare
from train.watch import FailedHere
from train.zero import ZeroEngine

MODULE = "tests.distributed.test_replicas"


@pytest.mark.parametrize(("world", "device"), [(4, "cpu"), pytest.param(2, "cuda", marks=GPU)])
def test_a_bit_that_differs_is_found(world: int, device: str, tmp_path: Path) -> None:
    outputs = spawn(world, MODULE, "rank_flips_bits", folder=tmp_path, device=device)
    found = [line for output in outputs for line in output.splitlines() if line.startswith("step 7: ")]
    flipped = [line.split()[1] for line in outputs[-1].splitlines() if line.startswith("flipped ")]
    assert len(found) == len(flipped) == 11
    for name, line in zip(flipped, sorted(found, key=lambda line: int(line.split("#")[1]))):
        assert f" {name} is not the same on rank" in line and f"rank {world - 1}" in line


def rank_flips_bits(ranks: Ranks) -> None:
    """A step on meshes whose updates are repeated; then one bit at a time on the last rank."""
    config, number, half = config_of("muon"), 0, ranks.world // 2
    last = ranks.rank == ranks.world - 1
    for sizes, dense in (({"ep": half, "zero": half}, False), ({"zero": half}, True)):
        mesh = build_mesh(ranks.rank, ranks.world, **sizes)
        model = tiny_model(config.model).to(ranks.device)
        engine = ZeroEngine(model, config.optim, torch.float32, mesh=mesh, shard_dense=dense)
        batch = packed_batch(ROWS, LENGTH, depth=config.model.num_nextn_predict_layers)
        mine = {name: x[mesh.data_rank :: mesh.data_world] for name, x in batch.items()}
        train_step(engine, mine, config, 0, ranks)
        compare(engine.replicas(), ranks, 1)
        held = {replica.name: replica.tensor for replica in engine.replicas()}
        for name in chosen(list(held), dense):
            if last:
                print("flipped", name)
                flip(held[name])
            with pytest.raises(ConfigError) as error:
                compare(engine.replicas(), ranks, 7)
            if isinstance(error.value, FailedHere):
                print(f"{error.value} #{number}")
            if last:
                flip(held[name])
            compare(engine.replicas(), ranks, 7)
            number += 1


def chosen(names: list[str], dense: bool) -> list[str]:
    """One tensor of each kind; masters and moments differ from rank to rank."""
    kinds = [r"\.experts\.", "e_score_correction_bias", "^lm_head", "^weight", "^momentum"]
    kinds += ["^slice"] if dense else []
    return [next(name for name in names if re.search(kind, name)) for kind in kinds]


def flip(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1).view(torch.int32)[-1] ^= 1
