"""DeepSpeed as we use it: what it is told, and the two places where it does something of ours.

It documents none of the inner names used here; pyproject.toml pins its version.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from optim.muon import HybridOptimizer
from train.parallel.expert import reduce_rounded
from train.parallel.mesh import Sharing

warnings.filterwarnings("ignore", ".torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls

BUCKET = 2**27  # most numbers that are reduced at once


@contextmanager
def before_gathering(work: Callable[[], None]) -> Iterator[None]:
    """Meanwhile `work` is done whenever the owners' weights are up to date and the others' not yet."""
    from deepspeed.runtime.zero import stage_1_and_2

    gather = stage_1_and_2.all_gather_dp_groups

    def work_and_gather(**options: Any) -> None:
        work()
        gather(**options)

    stage_1_and_2.all_gather_dp_groups = work_and_gather
    try:
        yield
    finally:
        stage_1_and_2.all_gather_dp_groups = gather


class _Marker(nn.Module):
    """By it DeepSpeed sees that groups of parameters have groups of ranks of their own."""

    num_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The mesh has made the groups already."""


def _share(wrapped: nn.Module, apart: Sequence[Sharing]) -> None:
    """Hand groups of ranks to DeepSpeed."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    for sharing in apart:
        for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
            known[sharing.name] = sharing.group
    if apart:
        marker = type("Marker", (_Marker, MoE), {"__init__": nn.Module.__init__})
        wrapped.add_module("shares", marker())


def round_reduction(zero: Any, sharing: Sharing) -> None:
    """Have DeepSpeed's reduction of the experts' gradients travel rounded."""
    exact, experts = zero.allreduce_bucket, zero.expert_dp_process_group[sharing.name]

    def reduce(bucket: Sequence[Tensor], *args: Any, rank: int, process_group: Any, **options: Any) -> Tensor:
        if process_group is not experts:
            return exact(bucket, *args, rank=rank, process_group=process_group, **options)
        return reduce_rounded(zero.flatten(bucket), rank, experts)

    zero.allreduce_bucket = reduce


def initialize(
    wrapped: nn.Module, optimizer: HybridOptimizer, stage: int, apart: Sequence[Sharing]
) -> tuple[Any, Any]:
    """DeepSpeed's engine and its ZeRO optimizer around ours."""
    cuda = next(wrapped.parameters()).is_cuda
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++ for most of a minute
    compiler.compile = lambda: compiler.dummy_decorator  # else its Muon loads TorchInductor, for seconds
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    _share(wrapped, apart)
    options = {
        "stage": stage,
        "overlap_comm": cuda and dist.get_world_size() > 1,
        "contiguous_gradients": True,
        "use_multi_rank_bucket_allreduce": False,  # else the reduce-scatter is an all-reduce
        "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in wrapped.parameters())),
        "compute_grad_norm": False,  # ours is by set
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "gradient_accumulation_steps": 1,  # we say which micro-batch is the last
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum",  # losses are scaled by the counts of all ranks
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": options,
        "steps_per_print": None,
    }
    engine, zero, _, _ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config)
    return engine, zero
