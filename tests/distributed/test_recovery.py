"""On a mesh of ranks: routing by the same parameters, and a step undone after NaN, change no bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from tests.distributed.ranks import spawn
from tests.distributed.test_zero import LENGTH, ROWS, Case, config_of, gradients, skewed_model
from tests.tiny import packed_batch
from tests.unit.train.test_engine import load
from tests.unit.train.test_recovery import kept, same
from train import recompute
from train.engine import Batch
from train.loop import train_step
from train.parallel.context import context_of
from train.parallel.mesh import Mesh, build_mesh
from train.ranks import Ranks
from train.recovery import choose_experts
from train.zero import ZeroEngine


def engine_of(case: Case, mesh: Mesh) -> ZeroEngine:
    config = config_of(case.algorithm)
    model = skewed_model(config.model)
    model.context = context_of(mesh)
    recompute.apply(model, case.recompute)
    dtype = getattr(torch, case.dtype)
    return ZeroEngine(model, config.optim, dtype, stage=case.stage, mesh=mesh, shard_dense=case.dense)


def undone(engine: ZeroEngine, batch: Batch, config, step: int, ranks: Ranks) -> None:
    """A step whose gradients become NaN on the first rank, and back to the state before it."""
    before, clip = kept(engine.state()), engine._clip

    def poisoned():
        if ranks.first:
            next(iter(gradients(engine).values())).fill_(math.nan)
        return clip()

    engine._clip = poisoned  # type: ignore[method-assign]
    logged = train_step(engine, batch, config, step, ranks)
    assert not math.isfinite(logged["grad_norm_model"])
    assert same({k: x for k, x in before.items() if "bias" not in k}, kept_but_bias(engine))
    engine._clip = clip  # type: ignore[method-assign]
    load(engine, before)
    assert same(before, engine.state())


def kept_but_bias(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """A step that updates no weight has moved the routers' bias all the same."""
    return {key: x for key, x in engine.state().items() if "bias" not in key}


def rehearse(ranks: Ranks, text: str) -> None:
    whole = packed_batch(ROWS, LENGTH, depth=1, vocab=90)
    for case in (Case(*values) for values in json.loads(text)):
        config = config_of(case.algorithm)
        config = replace(config, train=replace(config.train, micro_batch=2))
        mesh = build_mesh(ranks.rank, ranks.world, **case.mesh)
        each = len(ROWS) // mesh.data_world
        batch = {name: x[mesh.data_rank * each :][:each] for name, x in whole.items()}
        plain, tried = engine_of(case, mesh), engine_of(case, mesh)
        for step in range(2):
            if step == 1:
                undone(tried, batch, config, step, ranks)
            as_compiled = replace(config.train, compile=step == 1)  # with gradients
            routing = choose_experts(tried, batch, replace(config, train=as_compiled), ranks)
            wanted = train_step(plain, batch, config, step, ranks)
            found = train_step(tried, batch, config, step, ranks, routing=routing)
            assert found == wanted, (case, step)
            assert same(plain.state(), tried.state()), (case, step)


def test_routing_and_rollback_on_a_mesh(tmp_path: Path) -> None:
    cases = [Case("muon", {"ep": 2}, recompute="selective")]
    cases += [Case("adamw", {"cp": 2}, stage=1, dtype="bfloat16", dense=True)]
    spawn(2, "tests.distributed.test_recovery", "rehearse", json.dumps(cases), folder=tmp_path)
