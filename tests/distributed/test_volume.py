"""What a step sends is what `train.parallel.volume` says, to the byte, on any mesh."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.ranks import spawn
from tests.distributed.test_context import RATES
from tests.tiny import packed_batch, tiny_config
from tests.unit.train.test_engine import run_config
from train.build import build_engine, mesh_of
from train.config import RunConfig
from train.loop import train_step
from train.parallel.mesh import build_mesh
from train.parallel.volume import volume
from train.ranks import Ranks
from train.sections import ParallelConfig

MODULE = "tests.distributed.test_volume"
LENGTH = 64
INPUTS = {"allreduce_": 0, "reduce_": 0, "all_to_all_single": 0}  # which argument is put in
INPUTS |= {"_allgather_base_": 1, "alltoall_base_": 1, "gather_": 1}
NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")
CALLERS = {  # the innermost of these functions says what for
    "_exchange": "expert rows",
    "AllToAllDispatcher.send": "expert counts",
    "SequenceParts.shift": "context halos",
    "_Every.forward": "context gathers",
    "_Every.backward": "context gathers",
    "DenseShards._start": "layers",
    "sum_of_slices": "layers' gradients",
    "DenseShards._exchanged": "layers' owners",
    "ZeroEngine._collect": "repeats",
    "reduce_rounded": "gradients",
    "DeepSpeedZeroOptimizer.allreduce_bucket": "gradients",
    "all_gather_dp_groups": "weights",
    "ZeroEngine._sum_over_ranks": "other",
    "Ranks.sum": "other",
}
TRAIN = ("recompute", "attention_mode", "indexer_loss_weight")
Case = dict[str, Any]  # keys of `parallel`, these of `train`, and those of others below
CASES: dict[int, list[Case]] = {
    2: [
        {"zero_stage": 1, "micro_batch": 1},
        {"zero_stage": 2, "micro_batch": 4},
        {"ep": 2, "recompute": "selective"},
        {"cp": 2, "recompute": "full"},
        {"cp": 2, "ep": 2, "zero_stage": 1, "attention_mode": "dense"},
        {"cp": 2, "attention_mode": "dense", "indexer_loss_weight": 0.0},
        {"cp": 2, "ep": 2, "attention_mode": "warmup"},
        {"shard_dense": True, "recompute": "full"},
        {"cp": 2, "ep": 2, "compute_dtype": "bfloat16", "recompute": "selective"},
    ],
    4: [
        {"zero_ranks": 2},
        {"ep": 2, "expert_gradients": "bfloat16", "zero_stage": 1, "indexer_loss_weight": 0.0},
        {"ep": 4, "recompute": "full"},
        {"cp": 2, "ep": 2, "zero_ranks": 1},
        {"zero_ranks": 2, "zero_stage": 1, "attention_mode": "warmup"},
        {"cp": 4, "layers": "scf"},
        {"ep": 2, "zero_ranks": 2, "shard_dense": True, "recompute": "full", "compute_dtype": "bfloat16"},
    ],
}


class Traffic(TorchDispatchMode):
    """Purpose -> bytes that this rank puts into collectives of more than one rank while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in NO_TRAFFIC:
            put = args[INPUTS[name]]
            tensors = [put] if isinstance(put, Tensor) else put
            if _group_size(args) > 1:
                self.found[_purpose(tensors[0])] += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def _group_size(args: tuple[Any, ...]) -> int:
    (group,) = (arg for arg in args if _is_group(arg))
    named = isinstance(group, str)
    return (_resolve_process_group(GroupName(group)) if named else dist.ProcessGroup.unbox(group)).size()


def _is_group(arg: Any) -> bool:
    script = isinstance(arg, torch.ScriptObject)
    return isinstance(arg, str) or (script and "ProcessGroup" in str(arg._type()))


def _purpose(put: Tensor) -> str:
    purpose = next(CALLERS[name] for name in _callers() if name in CALLERS)
    if purpose == "expert rows" and put.dim() == 1:
        return "expert weights"
    return "context counts" if purpose == "context gathers" and put.dtype == torch.int64 else purpose


def _callers() -> Iterator[str]:
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        yield frame.f_code.co_qualname


def config_of(case: Case, world: int) -> RunConfig:
    """Two micro-batches of two sequences on a rank, or as the case says; some only fill up where four ranks
    take their share."""
    case = dict(case)
    layers, dtype = case.pop("layers", "schf"), case.pop("compute_dtype", "float32")
    train = {key: case.pop(key) for key in TRAIN if key in case}
    micro = case.pop("micro_batch", 2)
    sequences = {1: 4, 2: 8, 4: 12 + 2 * (micro == 2)}[world // case.get("cp", 1)]
    base = run_config(batch_rows=sequences, micro=micro, length=LENGTH)
    return replace(
        base,
        model=tiny_config(layers, 1, compress_rates=RATES, num_nextn_predict_layers=1, hc_sinkhorn_iters=1),
        precision=replace(base.precision, compute_dtype=dtype),
        train=replace(base.train, log_every=1, **train),
        parallel=ParallelConfig(**case),
    )


def compare(ranks: Ranks) -> None:
    """One step of every case, counted on all ranks."""
    wrong = []
    for case in CASES[ranks.world]:
        config = config_of(case, ranks.world)
        config.check_ranks(ranks.world)
        sizes = mesh_of(config, ranks.world)
        mesh = build_mesh(ranks.rank, ranks.world, sizes.ep_size, sizes.cp_size, sizes.zero_size)
        engine = build_engine(config, ranks.device, mesh)
        rows = -(-config.train.batch_tokens // (LENGTH * mesh.data_world))
        batch = packed_batch([[LENGTH], [17, 23], [5], [30, 34]][:rows], LENGTH, depth=1, vocab=90)
        with Traffic() as traffic:
            train_step(engine, batch, config, 0, ranks)
        every: list[Any] = [None] * ranks.world
        dist.all_gather_object(every, traffic.found)
        expected: Counter[str] = Counter()
        for purpose, count in volume(config, sizes).items():
            expected[purpose.partition(",")[0]] += count
        found: Counter[str] = sum(every, Counter())
        wrong += [
            (case, key, found[key], expected[key]) for key in found | expected if found[key] != expected[key]
        ]
    assert not wrong, wrong


@pytest.mark.parametrize("world", sorted(CASES))
def test_step_sends_what_the_formula_says(world: int, tmp_path: Path) -> None:
    spawn(world, MODULE, "compare", folder=tmp_path)
