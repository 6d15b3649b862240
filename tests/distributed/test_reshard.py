"""A checkpoint of any mesh goes on at any other: the next step's losses and norms are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import DEVICES, spawn
from tests.distributed.test_zero import LENGTH, LOSSES, ROWS, config_of, skewed_model
from tests.tiny import packed_batch
from train import checkpoint
from train.loop import train_step
from train.parallel.context import context_of
from train.parallel.mesh import build_mesh
from train.ranks import Ranks
from train.saving import Saver
from train.zero import ZeroEngine

MODULE = "tests.distributed.test_reshard"
MESHES: list[tuple[int, dict[str, int], bool]] = [  # ranks, sizes of groups, dense weights sharded
    (1, {}, False),
    (2, {"ep": 2}, True),
    (4, {"ep": 2, "cp": 2, "zero": 2}, False),
    (4, {"ep": 4, "cp": 4, "zero": 4}, True),
]


class Part:
    """An engine on mesh `number` and this rank's rows."""

    def __init__(self, ranks: Ranks, number: int):
        _, sizes, dense = MESHES[number]
        self.ranks, self.config = ranks, config_of("muon")
        mesh = build_mesh(ranks.rank, ranks.world, **sizes)
        model = skewed_model(self.config.model).to(ranks.device)
        model.context = context_of(mesh)
        self.engine = ZeroEngine(model, self.config.optim, torch.float32, mesh=mesh, shard_dense=dense)
        each = len(ROWS) // mesh.data_world
        whole = packed_batch(ROWS, LENGTH, depth=1, vocab=90)
        self.rows = {name: x[mesh.data_rank * each :][:each] for name, x in whole.items()}

    def step(self, number: int) -> dict[str, float]:
        return train_step(self.engine, self.rows, self.config, number, self.ranks)


def of_world(world: int) -> list[int]:
    return [number for number, (ranks, _, _) in enumerate(MESHES) if ranks == world]


def save(ranks: Ranks, folder: str) -> None:
    """A checkpoint of every mesh of so many ranks."""
    for number in of_world(ranks.world):
        part = Part(ranks, number)
        for step in range(2):
            part.step(step)
        saver = Saver(Path(folder) / str(number), keep_last=1)
        saver.save(2, part.engine.state(), {"world": ranks.world})
        saver.wait()


def load(ranks: Ranks, folder: str) -> None:
    """Print the next step of every checkpoint, and one more, for every mesh of so many ranks."""
    print(json.dumps([next_steps(ranks, number, folder) for number in of_world(ranks.world)]))


def next_steps(ranks: Ranks, number: int, folder: str) -> list[Any]:
    found, part = [], Part(ranks, number)
    for saved in sorted(Path(folder).iterdir()):
        path = saved / "step-00000002"
        with checkpoint.open_tensors(path) as stored:
            targets = part.engine.state_to_load({key: stored.shape(key) for key in stored})
        checkpoint.load(path, targets)
        part.engine.state_was_loaded(targets)
        found.append([part.step(2), part.step(3)])
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_every_mesh_loads_every_other(device: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    most = torch.cuda.device_count() if device == "cuda" else 4
    worlds = sorted({world for world, _, _ in MESHES if world <= most})
    for world in worlds:
        spawn(world, MODULE, "save", str(folder), folder=tmp_path, device=device)
    outputs = [
        spawn(world, MODULE, "load", str(folder), folder=tmp_path, device=device)[0] for world in worlds
    ]
    found = [steps for output in outputs for steps in json.loads(output.splitlines()[-1])]
    for number, steps in enumerate(found[1:], start=1):
        assert_same(steps, found[0], f"loaded on {MESHES[number]}")


def assert_same(found: Any, expected: Any, where: str) -> None:
    for saved, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            for name, value in other.items():
                limit = 1e-6 if name in LOSSES and step == 0 else 1e-4  # by then Newton-Schulz has rounded
                assert one[name] == pytest.approx(value, rel=limit), (MESHES[saved], where, step, name)
