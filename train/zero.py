"""The DeepSpeed engine: ZeRO over partitions that hold whole matrices.

DeepSpeed owns the flat buffers, the reduction of gradients, their fp32 accumulation and the gathering of
updated weights. Ours are the order of parameters and filler in these buffers (`optim.partition`), the
optimizer over the flat fp32 partition, and clipping, which is by set of parameters and before any update.

Stage 1 accumulates the fp32 gradients of all parameters on every rank and reduces them once a step; stage 2
reduces every micro-batch and keeps the gradients of its own partition only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.model import ForCausalLM, ModelOutput, stays_fp32
from optim.config import OptimConfig
from optim.groups import build_groups, set_active
from optim.muon import HybridOptimizer, clip_grad_norm_per_set
from optim.partition import Layout, View, lay_out, whole_views
from train.engine import Batch, Engine, compile_hot_parts

BUCKET = 2**27  # most numbers that are reduced at once


class ZeroEngine(Engine):
    """Trains `model` in `compute_dtype` on all ranks; masters and moments are partitioned (ZeRO 1 or 2)."""

    def __init__(
        self,
        model: ForCausalLM,
        config: OptimConfig,
        compute_dtype: torch.dtype,
        compiled: bool = False,
        stage: int = 2,
    ):
        self.rank, world = dist.get_rank(), dist.get_world_size()
        groups = _split(build_groups(model.named_parameters(), model.config, config), compute_dtype, stage)
        layouts = [lay_out(group["views"], world) for group in groups]
        masters = [
            _own_pieces(group, layout, self.rank) for group, layout in zip(groups, layouts, strict=True)
        ]
        wrapped = _LossesOnly(model.cast(compute_dtype))
        for group, layout in zip(groups, layouts, strict=True):
            group["params"] = [
                wrapped.fill(-i, group["params"][0]) if i < 0 else group["params"][i] for i in layout.order
            ]
            group["views"] = layout.views[self.rank]
        self.model, self.clip_norm = model, config.clip_norm
        self.optimizer = HybridOptimizer(groups)
        self.deepspeed, self.zero = _initialize(wrapped, self.optimizer, stage)
        self._take(masters, [layout.size for layout in layouts])
        if compiled:
            compile_hot_parts(self.model)
        # Selection is not differentiable: without a loss of its own the indexer has nothing to learn from.
        set_active(self.optimizer.param_groups, "indexer", False)

    def __call__(self, batch: Batch, **options: Any) -> ModelOutput:
        if not torch.is_grad_enabled():
            return self.model(**batch, **options)
        self.deepspeed(batch, options)
        return self.deepspeed.module.output

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def _clip(self) -> dict[str, Tensor]:
        grads = [self.zero.averaged_gradients[i] for i in range(len(self.optimizer.param_groups))]
        return clip_grad_norm_per_set(
            self.optimizer.param_groups, self.clip_norm, grads, self._sum_over_ranks
        )

    def _update(self) -> None:
        self.deepspeed.step()

    def _forget_gradients(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)

    def _copy_masters(self) -> None:
        self.zero.update_lp_params()

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    @torch.no_grad()
    def _take(self, masters: list[list[Tensor]], sizes: list[int]) -> None:
        """Check DeepSpeed's flat layout, which it does not document, and replace rounded masters."""
        for group, own, size in zip(self.optimizer.param_groups, masters, sizes, strict=True):
            (flat,) = group["params"]
            if flat.numel() != size or flat.dtype != torch.float32:
                raise RuntimeError(
                    f"DeepSpeed's partition is {flat.numel()} {flat.dtype}, not {size} float32"
                )
            for view, exact in zip(group["views"], own, strict=True):
                master = view.of([flat])
                if not torch.equal(master, exact.to(group["dtype"]).float()):
                    raise RuntimeError(
                        f"DeepSpeed's partition does not hold {view.piece.key} where it should"
                    )
                master.copy_(exact)


class _LossesOnly(nn.Module):
    """What DeepSpeed wraps and hooks into: the loss sums of the model, and filler as parameters."""

    def __init__(self, model: ForCausalLM):
        super().__init__()
        self.model = model
        self.output = ModelOutput()

    def forward(self, batch: Batch, options: Mapping[str, Any]) -> list[Tensor]:
        self.output = self.model(**batch, **options)
        return [loss for loss, _ in self.output.losses.values()]

    def fill(self, numbers: int, like: Tensor) -> nn.Parameter:
        filler = nn.Parameter(torch.zeros(numbers, dtype=like.dtype, device=like.device))
        self.register_parameter(f"filler_{len(self._parameters)}", filler)
        return filler


def _split(groups: list[dict[str, Any]], compute_dtype: torch.dtype, stage: int) -> list[dict[str, Any]]:
    """Groups of one dtype each, stacks of equal pieces apart from whole parameters.

    DeepSpeed sizes its buckets by the first group's dtype: fp32 keeps stage 2 from rounding fp32 gradients,
    and the narrow one has stage 1 accumulate in fp32 beside it.
    """
    split: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        for view in whole_views(group):
            name = view.piece.name
            dtype = torch.float32 if stays_fp32(name) else compute_dtype
            unit = view.piece.numel if view.piece.key != name else 0
            key = (group["algorithm"], group["set"], dtype, unit)
            if key not in split:
                split[key] = {**group, "params": [], "names": [], "views": [], "dtype": dtype}
                split[key].pop("blocks", None)
            target = split[key]
            if not target["names"] or target["names"][-1] != name:
                target["names"].append(name)
                target["params"].append(group["params"][view.param])
            target["views"].append(view._replace(param=len(target["params"]) - 1))
    wide_first = stage == 2
    return sorted(split.values(), key=lambda group: (group["dtype"] == torch.float32) != wide_first)


def _own_pieces(group: dict[str, Any], layout: Layout, rank: int) -> list[Tensor]:
    """This rank's pieces in fp32, in the order of its views."""
    where: dict[str, View] = {view.piece.key: view for view in group["views"]}
    params = [parameter.detach() for parameter in group["params"]]
    return [where[view.piece.key].of(params).clone() for view in layout.views[rank]]


def _initialize(wrapped: nn.Module, optimizer: HybridOptimizer, stage: int) -> tuple[Any, Any]:
    """DeepSpeed's engine and its ZeRO optimizer around ours."""
    cuda = next(wrapped.parameters()).is_cuda
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++ for most of a minute
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
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
