"""Any mesh of ranks equals one process: losses, every gradient, and the weights after three steps."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.model import ForCausalLM
from model.precision import Precision
from optim.config import OptimConfig
from tests.distributed.ranks import GPU, spawn
from tests.tiny import packed_batch, relative, tiny_model
from tests.unit.train.test_engine import run_config
from train import recompute
from train.config import RunConfig
from train.engine import Batch, Engine, TorchEngine
from train.loop import train_step
from train.parallel.context import context_of
from train.parallel.mesh import build_mesh
from train.ranks import Ranks
from train.zero import SHARDED, ZeroEngine

MODULE = "tests.distributed.test_zero"
LENGTH = 72
ROWS = [[72], [17, 23, 20], [5], [12, 9, 19, 24], [31, 8, 25], [1, 63, 8], [3, 3], [26, 33]]
LOSSES = ("lm", "mtp", "balance", "indexer")


class Case(NamedTuple):
    """One engine to compare; `mesh`: sizes for `build_mesh`."""

    algorithm: str
    mesh: dict[str, int] = {}  # noqa: RUF012
    stage: int = 2
    dtype: str = "float32"
    dense: bool = False
    recompute: str = "none"
    precision: dict[str, bool] = {}  # noqa: RUF012
    mode: str = "sparse"


def skewed_model(config: ModelConfig) -> ForCausalLM:
    """Everybody chooses the first expert of the last MoE, and nobody its last three.

    With this seed no parameter's gradients of the rows nearly cancel, which would leave their rounding.
    """
    model = tiny_model(config, seed=8)
    bias = model.moes()[-1].gate.e_score_correction_bias
    bias[0], bias[-3:] = 100.0, -100.0
    return model


def config_of(algorithm: str) -> RunConfig:
    """Before the first layer all streams are equal: parts of its mixing have no gradient but rounding. `eps`
    is large enough to keep AdamW from scaling that up."""
    config = run_config(batch_rows=len(ROWS), micro=2, length=LENGTH)
    options: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 0, "eps": 1e-4, "newton_schulz_dtype": "float32"}
    return replace(config, optim=OptimConfig(name=algorithm, **options))


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


class Steps(NamedTuple):
    """What is logged of every step, the gradients of the first, and the state after the last."""

    logged: list[dict[str, float]]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def three_steps(engine: Engine, batch: Batch, config: RunConfig, ranks: Ranks, case: Case) -> Steps:
    seen = watched(engine, case.algorithm == "muon")
    exact = case.dtype == "float32" and not case.precision.keys() - {"fp4_experts"}
    steps = 3 if exact else 1  # later, rounding activations tells the two apart
    engine.use(Precision(**case.precision))
    logged = [train_step(engine, batch, config, step, ranks) for step in range(steps)]
    return Steps(logged, seen[0], engine.state())


def held(state: dict[str, Tensor]) -> Tensor:
    """Numbers of every kind."""
    kinds = ("weight", "momentum", "exp_avg", "exp_avg_sq", "step")
    return torch.tensor(
        [sum(x.numel() for k, x in state.items() if k.startswith(f"{kind}.")) for kind in kinds]
    )


def compare(ranks: Ranks, text: str) -> None:
    """Every case, three steps on this rank's rows, beside the same of TorchEngine on all rows."""
    whole = packed_batch(ROWS, LENGTH, depth=1, vocab=90)
    known: dict[str, Steps] = {}
    for case in (Case(*values) for values in json.loads(text)):
        config, compute = config_of(case.algorithm), getattr(torch, case.dtype)
        config = replace(config, train=replace(config.train, attention_mode=case.mode))
        numbers = f"{case.algorithm} {case.dtype} {case.precision} {case.mode}"
        if numbers not in known:
            model = skewed_model(config.model).to(ranks.device)
            bare = TorchEngine(model, config.optim, compute, fp4_experts=True)
            every = partial(three_steps, bare, whole, config, Ranks(0, 1, ranks.device), case)
            cuda = ranks.device.type == "cuda"
            known[numbers] = every() if cuda else ranks.share(every() if ranks.first else None)
        mesh = build_mesh(ranks.rank, ranks.world, **case.mesh)
        each = len(ROWS) // mesh.data_world  # the same micro-batches as in one process
        mine = {name: x[mesh.data_rank * each :][:each] for name, x in whole.items()}
        model = skewed_model(config.model).to(ranks.device)
        model.context = context_of(mesh)
        recompute.apply(model, case.recompute)
        zero = ZeroEngine(model, config.optim, compute, stage=case.stage, mesh=mesh, shard_dense=case.dense)
        ours, theirs = three_steps(zero, mine, config, ranks, case), known[numbers]
        # bf16 rounds otherwise in products of other rows and in sums of another order; rows of two ranks that
        # meet in one product are rounded once instead of twice.
        narrow = case.dtype == "bfloat16"
        loose = narrow and (mesh.cp_size > 1 or ranks.device.type == "cuda")
        for step, (found, wanted) in enumerate(zip(ours.logged, theirs.logged, strict=True)):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                limit = (1e-6 if name in LOSSES else 1e-5) * (1000 if loose else 1)
                assert found[name] == pytest.approx(value, rel=limit), (case, step, name)
        tensors, reference = ours.gradients | ours.state, theirs.gradients | theirs.state  # no key of both
        limit = 5e-2 if loose else 1e-2 if narrow and mesh.ep_size > 1 else 1e-5
        for key, tensor in tensors.items():
            assert key.startswith("rng") or relative(tensor, reference[key]) < limit, (case, key)
        # Each weight once, and each moment, of sets that rest, too.
        assert torch.equal(ranks.sum(held(ours.state)), held(theirs.state)), case
        assert held(theirs.state)[0] == sum(p.numel() for p in ForCausalLM(config.model).parameters())
    assert "torch._inductor.compile_fx" not in sys.modules  # takes seconds, and nothing is compiled here


def round_experts(ranks: Ranks) -> None:
    """Experts' gradients that travelled as rounded bf16 are as far off as bf16 is, all others exact."""
    config, case = config_of("adamw"), Case("adamw")
    whole = packed_batch(ROWS, LENGTH, depth=1, vocab=90)
    exact = three_steps(
        TorchEngine(skewed_model(config.model).to(ranks.device), config.optim, torch.float32),
        whole,
        config,
        Ranks(0, 1, ranks.device),
        case,
    )
    each = len(ROWS) // ranks.world
    mine = {name: x[ranks.rank * each :][:each] for name, x in whole.items()}
    for ep in {1, ranks.world // 2}:
        mesh = build_mesh(ranks.rank, ranks.world, ep=ep)
        model = skewed_model(config.model).to(ranks.device)
        engine = ZeroEngine(model, config.optim, torch.float32, mesh=mesh, rounded=True)
        errors = []
        for key, grad in three_steps(engine, mine, config, ranks, case).gradients.items():
            error = relative(grad, exact.gradients[key])
            assert error < (4e-3 if ".experts." in key else 1e-5), (ep, key, error)
            errors += [error] if ".experts." in key and exact.gradients[key].any() else []
        assert min(errors) > 1e-4 and max(errors) > 1e-3, (ep, errors)  # it was rounded


@pytest.mark.parametrize(("world", "device"), [(4, "cpu"), pytest.param(2, "cuda", marks=GPU)])
def test_rounded_gradients_of_experts(world: int, device: str, tmp_path: Path) -> None:
    spawn(world, MODULE, "round_experts", folder=tmp_path, device=device)


def run(cases: list[Case], world: int, folder: Path, device: str = "cpu") -> None:
    spawn(world, MODULE, "compare", json.dumps(cases), folder=folder, device=device)


@pytest.mark.parametrize("world", [1, 2])
def test_stages_equal_one_process(world: int, tmp_path: Path) -> None:
    run([Case("adamw"), Case("muon"), Case("muon", stage=1)], world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_equals_one_process(world: int, tmp_path: Path) -> None:
    """All sizes of the groups that share experts and sequences; neither borders of documents nor of experts
    lie where those of ranks do."""
    sizes = [size for size in (1, 2, 4) if size <= world]
    meshes = [{"ep": ep, "cp": cp} for ep in sizes for cp in sizes]
    cases = [Case("muon", mesh) for mesh in meshes]
    cases += [
        Case("adamw", mesh) for mesh in meshes if world in mesh.values()
    ]  # whose partitions differ most
    run(cases, world, tmp_path)


def test_repeated_updates_and_sharded_dense_weights(tmp_path: Path) -> None:
    meshes: list[dict[str, int]] = [
        {"zero": 2},
        {"zero": 1, "ep": 2},
        {"zero": 2, "ep": 4},
        {"zero": 2, "cp": 2},
    ]
    cases = [Case("muon", mesh) for mesh in meshes]
    cases += [Case("adamw", mesh, stage=1) for mesh in meshes[:2]]
    cases += [Case("muon", mesh, dense=True) for mesh in ({}, {"zero": 2, "ep": 2, "cp": 2}, {"zero": 1})]
    run([*cases, Case("adamw", {"ep": 4}, dense=True, stage=1)], 4, tmp_path)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_on_a_mesh(how: str, tmp_path: Path) -> None:
    """Experts' rows and parts of sequences travel again, in the same order on every rank."""
    run([Case("adamw", mesh, recompute=how) for mesh in ({"ep": 2}, {"ep": 2, "cp": 2})], 2, tmp_path)


def test_only_the_indexer_warms_up(tmp_path: Path) -> None:
    """Of a layer's gathered weights some get no gradient; what rests has none on any rank."""
    cases = [Case("muon", {"zero": 1}), Case("adamw", {"ep": 2, "cp": 2}, stage=1, recompute="selective")]
    cases += [Case("muon", dense=True), Case("adamw", {"cp": 2}, dense=True, recompute="full")]
    run([case._replace(mode="warmup") for case in cases], 2, tmp_path)


def test_narrow_weights_have_exact_masters(tmp_path: Path) -> None:
    cases = [Case("adamw", stage=stage, dtype="bfloat16") for stage in (1, 2)]
    cases += [Case("adamw", mesh, dtype="bfloat16", dense=True) for mesh in ({}, {"ep": 2})]
    cases += [Case("adamw", {"ep": 2, "cp": 2}, dtype="bfloat16")]
    run(cases, 2, tmp_path)


FP4 = {"fp4_experts": True}
QAT = {"fp8": True, "fp4_experts": True, "fp4_indexer": True, "fp8_kv": True}


@pytest.mark.parametrize("world", [1, 2])
def test_fp4_experts_equal_one_process(world: int, tmp_path: Path) -> None:
    """Owners round their masters before the weights are gathered; nobody rounds what is rounded already."""
    meshes: list[dict[str, int]] = [{}, {"ep": world}, {"cp": world}, {"zero": 1}]
    cases = [Case("muon", mesh, precision=FP4) for mesh in meshes]
    cases += [Case("adamw", stage=1, precision=FP4), Case("adamw", dense=world > 1, precision=FP4)]
    cases += [Case("adamw", dtype=dtype, precision=QAT) for dtype in ("float32", "bfloat16")]
    run(cases, world, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_mesh_of_gpus_equals_one(world: int, tmp_path: Path) -> None:
    """Over NCCL, one process a GPU."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world]
    meshes = [{"ep": ep, "cp": cp} for ep in sizes for cp in sizes if cp <= 4]  # 18 tokens a part, window 16
    cases = [Case("muon", mesh) for mesh in meshes] + [Case("adamw", mesh, stage=1) for mesh in meshes]
    cases += [Case("muon", {"zero": size}, dense=True) for size in sizes]
    run(cases, world, tmp_path, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4, 8])
def test_other_ways_to_compute_on_gpus(world: int, tmp_path: Path) -> None:
    """bf16, FP4 and FP8 on a mesh, what backward computes again there, and the indexer alone."""
    meshes: list[dict[str, int]] = [{}, {"ep": world}, {"cp": min(world, 4)}, {"ep": world, "cp": 2}]
    cases = [Case("adamw", mesh, dtype="bfloat16") for mesh in meshes]
    cases += [Case("adamw", mesh, stage=1, dtype="bfloat16") for mesh in meshes[:2]]
    cases += [Case("adamw", mesh, recompute=how) for mesh in meshes[1:] for how in ("selective", "full")]
    cases += [Case("muon", mesh, mode="warmup") for mesh in ({"zero": 1}, meshes[-1])]
    cases += [Case("muon", mesh, precision=FP4) for mesh in meshes[:3]]
    run([*cases, Case("adamw", dtype="bfloat16", precision=QAT)], world, tmp_path, "cuda")
