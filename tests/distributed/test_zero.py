"""Any mesh of ranks equals one process: losses, every gradient, and the weights after three steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.model import ForCausalLM
from optim.config import OptimConfig
from tests.distributed.ranks import spawn
from tests.tiny import packed_batch, relative, tiny_model
from tests.unit.train.test_engine import run_config
from train.config import RunConfig
from train.engine import Engine, TorchEngine
from train.loop import train_step
from train.parallel.mesh import build_mesh
from train.ranks import Ranks
from train.zero import SHARDED, ZeroEngine

MODULE = "tests.distributed.test_zero"
ROWS = [[40], [17, 23], [5], [12, 9, 19], [31, 8], [40], [3, 3], [26]]
LOSSES = ("lm", "mtp", "balance")
ALONE = Ranks(0, 1, torch.device("cpu"))


def skewed_model(config: ModelConfig) -> ForCausalLM:
    """Everybody chooses the first expert of the last MoE, and nobody its last three."""
    model = tiny_model(config)
    bias = model.moes()[-1].gate.e_score_correction_bias
    bias[0], bias[-3:] = 100.0, -100.0
    return model


def config_of(algorithm: str) -> RunConfig:
    """Before the first layer all streams are equal: parts of its mixing have no gradient but rounding. `eps`
    is large enough to keep AdamW from scaling that up."""
    config = run_config(batch_rows=len(ROWS), micro=2)
    return replace(config, optim=OptimConfig(name=algorithm, lr=1e-3, warmup_steps=0, eps=1e-4))


def gradients(engine: Engine) -> dict[str, Tensor]:
    """This rank's accumulated and reduced gradients by piece, as views that may be written to."""
    found: dict[str, Tensor] = {}
    for number, group in enumerate(engine.optimizer.param_groups):
        if isinstance(engine, ZeroEngine):
            if group["name"] == SHARDED:
                grads = [group["params"][0].grad]
            else:
                grads = [torch.cat([grad.reshape(-1) for grad in engine.zero.averaged_gradients[number]])]
                engine.zero.averaged_gradients[number] = grads
        else:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads = [parameter.grad for parameter in group["params"]]
        found |= {view.piece.key: view.of(grads) for view in group["views"]}
    return found


def watched(engine: Engine, inject: bool) -> list[dict[str, Tensor]]:
    """The gradients of every step to come, before clipping.

    `inject`: they are then replaced by random ones, which have full rank and depend on piece and step alone.
    With gradients of low rank Newton-Schulz makes what rounding left of the other directions as large.
    """
    seen: list[dict[str, Tensor]] = []
    clip = engine._clip

    def recording() -> dict[str, Tensor]:
        grads = gradients(engine)
        seen.append({key: grad.clone() for key, grad in grads.items()})
        for key, grad in grads.items() if inject else ():
            generator = torch.Generator().manual_seed(1000 * sum(key.encode()) + len(seen))
            grad.copy_(torch.randn(grad.shape, generator=generator))
        return clip()

    engine._clip = recording  # type: ignore[method-assign]
    return seen


def compare(ranks: Ranks, algorithm: str, dtype: str, stage: str, mesh: str = "{}", dense: str = "") -> None:
    """Three steps of ZeroEngine on this rank's rows beside three of TorchEngine on all of them."""
    config, compute = config_of(algorithm), getattr(torch, dtype)
    whole = packed_batch(ROWS, 40, depth=1, vocab=90)
    each = len(ROWS) // ranks.world  # the same micro-batches as in one process
    mine = {name: x[ranks.rank * each : (ranks.rank + 1) * each] for name, x in whole.items()}
    zero = ZeroEngine(
        skewed_model(config.model),
        config.optim,
        compute,
        stage=int(stage),
        mesh=build_mesh(ranks.rank, ranks.world, **json.loads(mesh)),
        shard_dense=bool(dense),
    )
    bare = TorchEngine(skewed_model(config.model), config.optim, compute)
    seen, expected = watched(zero, algorithm == "muon"), watched(bare, algorithm == "muon")
    for step in range(3 if dtype == "float32" else 1):  # later, rounding to bf16 tells the two apart
        ours, theirs = (
            train_step(zero, mine, config, step, ranks),
            train_step(bare, whole, config, step, ALONE),
        )
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-6 if name in LOSSES else 1e-5), (step, name)
    for key, grad in seen[0].items():
        assert relative(grad, expected[0][key]) < 1e-5, key
    state, reference = zero.state(), bare.state()
    for key, tensor in state.items():
        assert key.startswith("rng") or relative(tensor, reference[key]) < 1e-5, key
    print(sum(value.numel() for key, value in state.items() if key.startswith("weight.")))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("algorithm", "stage"), [("adamw", "2"), ("muon", "2"), ("muon", "1")])
def test_equals_one_process(world: int, algorithm: str, stage: str, tmp_path: Path) -> None:
    outputs = spawn(world, MODULE, "compare", algorithm, "float32", stage, folder=tmp_path)
    owned = [int(output.split()[-1]) for output in outputs]
    model = tiny_model(config_of(algorithm).model)
    assert sum(owned) == sum(p.numel() for p in model.parameters())  # every weight on one rank
    assert max(owned) < 2 * min(owned)


MESHES = [
    (2, {"ep": 2}, ""),
    (2, {"zero": 1}, ""),
    (2, {}, "dense"),
    (4, {"ep": 4}, ""),
    (4, {"ep": 2, "zero": 2}, "dense"),
]


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize(("world", "mesh", "dense"), MESHES)
def test_meshes_equal_one_process(
    world: int, mesh: dict[str, int], dense: str, algorithm: str, tmp_path: Path
) -> None:
    arguments = (algorithm, "float32", "2", json.dumps(mesh), dense)
    spawn(world, MODULE, "compare", *arguments, folder=tmp_path)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_narrow_weights_have_exact_masters(stage: str, tmp_path: Path) -> None:
    spawn(2, MODULE, "compare", "adamw", "bfloat16", stage, folder=tmp_path)
