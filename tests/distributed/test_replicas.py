"""Whatever ranks hold alike is compared: a bit that differs anywhere ends all ranks, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from tests.distributed.ranks import spawn
from tests.distributed.test_zero import LENGTH, ROWS, config_of
from tests.tiny import packed_batch, tiny_model
from train.loop import train_step
from train.parallel.mesh import build_mesh
from train.ranks import FailedHere, Ranks
from train.replicas import compare
from train.zero import ZeroEngine

MODULE = "tests.distributed.test_replicas"


@pytest.mark.parametrize("sizes", [{"ep": 2, "zero": 2}, {"zero": 2, "dense": 1}])
def test_a_bit_that_differs_is_found(sizes: dict[str, int], tmp_path: Path) -> None:
    arguments = [f"{key}={value}" for key, value in sizes.items()]
    outputs = spawn(4, MODULE, "rank_flips_bits", *arguments, folder=tmp_path)
    found = [line for output in outputs for line in output.splitlines() if line.startswith("step 7: ")]
    flipped = [line.split()[1] for line in outputs[3].splitlines() if line.startswith("flipped ")]
    assert len(found) == len(flipped) == 5 + sizes.get("dense", 0)
    for name in flipped:
        (line,) = (line for line in found if f" {name} is not the same on rank" in line)
        assert "rank 3" in line


def rank_flips_bits(ranks: Ranks, *sizes: str) -> None:
    """A step of a mesh whose updates are repeated; then one bit at a time on the last rank."""
    given = {key: int(value) for key, value in (size.split("=") for size in sizes)}
    dense, config = bool(given.pop("dense", 0)), config_of("muon")
    mesh = build_mesh(ranks.rank, ranks.world, **given)
    engine = ZeroEngine(tiny_model(config.model), config.optim, torch.float32, mesh=mesh, shard_dense=dense)
    batch = packed_batch(ROWS, LENGTH)
    mine = {name: x[mesh.data_rank :: mesh.data_world] for name, x in batch.items()}
    train_step(engine, mine, config, 0, ranks)
    compare(engine.replicas(), ranks, 1)
    held = {replica.name: replica for replica in engine.replicas()}
    groups = {name: len(torch.distributed.get_process_group_ranks(r.group)) for name, r in held.items()}
    expert = next(name for name in held if "experts" in name)
    assert groups[expert] == (2 if "ep" in given else 4)
    chosen = [expert, "layers.1.mlp.gate.e_score_correction_bias", "lm_head.weight"]
    chosen += [next(name for name in held if name.startswith(kind)) for kind in ("weight.", "momentum.")]
    chosen += ["slice.1.of.layer.1"] if dense else []
    for name in chosen if ranks.rank == 3 else [""] * len(chosen):
        print("flipped", name)
        flip(held[name].tensor if name else None)
        with pytest.raises(ConfigError) as error:
            compare(engine.replicas(), ranks, 7)
        if isinstance(error.value, FailedHere):
            print(error.value)
        flip(held[name].tensor if name else None)
        compare(engine.replicas(), ranks, 7)


def flip(tensor: torch.Tensor | None) -> None:
    if tensor is not None:
        tensor.detach().view(-1).view(torch.int32)[-1] ^= 1
