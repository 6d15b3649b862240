"""The DeepSpeed engine: ZeRO over partitions that hold whole matrices, on a mesh of ranks.

DeepSpeed owns the flat buffers, the reduction of gradients, their fp32 accumulation and the gathering of
updated weights. Ours are the order of parameters and filler in these buffers (`optim.partition`), the
optimizer over the flat fp32 partition, and clipping, which is by set of parameters and before any update.

Stage 1 accumulates the fp32 gradients of all parameters on every rank and reduces them once a step; stage 2
reduces every micro-batch and keeps the gradients of its own partition only.

Experts are partitioned over the ranks that hold the same ones, all else over `parallel.zero_ranks` ranks;
groups of these repeat each other's updates (`train.parallel.mesh`). DeepSpeed knows both as experts of its
own: that is how it takes a group of ranks for a group of parameters. With `parallel.shard_dense` the layers'
matrices are not DeepSpeed's (`train.parallel.dense`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.init import fill, fill_buffers
from model.kernels.cast import fp4_values
from model.model import ForCausalLM, ModelOutput, stays_fp32
from optim.config import OptimConfig
from optim.groups import build_groups
from optim.muon import HybridOptimizer, clip_grad_norm_per_set
from optim.partition import Layout, is_expert, lay_out, whole_views
from train.adapter import before_gathering, initialize, round_reduction
from train.compiled import compile_layers
from train.engine import Batch, Engine
from train.parallel.dense import DenseShards, sharded_names
from train.parallel.expert import share_experts
from train.parallel.mesh import Mesh, Sharing, build_mesh
from train.replicas import Replica

MOST_FILLER, ONE_HOST = 0.05, 8  # ZeRO goes over so many ranks as leave less filler, or over one host's
SHARDED = "sharded"  # name of groups that are not DeepSpeed's


class ZeroEngine(Engine):
    """Trains `model` in `compute_dtype` on all ranks; masters and moments are partitioned (ZeRO 1 or 2).

    A model on the meta device is made here, weight by weight, on `device` from `seed`: no rank ever holds
    more than its own part. A model with weights is cut up.

    stage           of ZeRO
    mesh            who shares what; None: ZeRO over all ranks
    rounded         experts' gradients travel as bf16, rounded stochastically
    shard_dense     the layers' dense weights are sharded, too
    """

    def __init__(
        self,
        model: ForCausalLM,
        config: OptimConfig,
        compute_dtype: torch.dtype,
        *,
        stage: int = 2,
        mesh: Mesh | None = None,
        compiled: bool = False,
        rounded: bool = False,
        shard_dense: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
    ):
        self.mesh = mesh or build_mesh(dist.get_rank(), dist.get_world_size())
        self.rank, self.clip_norm, self.model = self.mesh.rank, config.clip_norm, model
        device = device or model.lm_head.weight.device
        share_experts(model, self.mesh)
        sharded = set(sharded_names(model)) if shard_dense else set()
        groups, layouts = partition(model, config, compute_dtype, stage, sharded, self.mesh)
        self.shards = DenseShards(model, self.mesh.dense, compute_dtype, device) if sharded else None
        self._build(groups, layouts, seed, device)
        wrapped = _LossesOnly(model)
        own = [group for group in groups if group["name"] == SHARDED]
        groups = groups[: len(groups) - len(own)]
        rounded = rounded and self.mesh.experts.size > 1
        apart = _apart(self.mesh, rounded)
        for group, layout in zip(groups, layouts):
            _place(group, layout, wrapped, apart)
        exact = [group.pop("masters") for group in groups]
        self.optimizer = HybridOptimizer(groups)
        self.deepspeed, self.zero = initialize(wrapped, self.optimizer, stage, apart)
        self._take(exact, [layout.size for layout in layouts[: len(groups)]])
        self.optimizer.param_groups += own
        self.deepspeeds = len(groups)  # the first groups are DeepSpeed's
        if self.shards is not None:
            self.shards.connect(layouts[len(groups) :])
        if rounded:
            round_reduction(self.zero, self.mesh.experts)
        if compiled:
            compile_layers(self.model, whole=self.shards is None and device.type == "cuda")
        self.activate(("model",))

    def __call__(self, batch: Batch, **options: Any) -> ModelOutput:
        if not torch.is_grad_enabled():
            return self.model(**batch, **options)
        self.deepspeed(batch, options)
        return self.deepspeed.module.output

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def replicas(self) -> Iterator[Replica]:
        """The model's weights and buffers, and masters and moments whose updates are repeated."""
        mesh, everyone = self.mesh, dist.group.WORLD
        if mesh.world == 1:
            return
        for name, parameter in self.model.named_parameters():
            if not is_expert(name) or mesh.experts.size > 1:
                yield Replica(name, parameter, mesh.replicas if is_expert(name) else everyone)
        for name, buffer in self.model.named_buffers():
            yield Replica(name, buffer, everyone)
        if mesh.dense.holders == 1:
            return
        for number, unit in enumerate(self.shards.units if self.shards else ()):
            yield Replica(f"slice.{mesh.dense.rank}.of.layer.{number}", unit.weights, mesh.repeats)
        groups = [group for group in self.optimizer.param_groups if group["holders"] > 1]
        repeated = {view.piece.key for group in groups for view in group["views"]}
        for name, tensor in self.optimizer.named_state().items():
            if name.partition(".")[2] in repeated:
                yield Replica(name, tensor, mesh.repeats)

    def _collect(self) -> None:
        averaged = self.zero.averaged_gradients
        for number, group in enumerate(self.optimizer.param_groups[: self.deepspeeds]):
            if group["active"] and group["holders"] > 1:
                flat = torch.cat([grad.reshape(-1) for grad in averaged[number]])
                dist.all_reduce(flat, group=self.mesh.repeats)
                averaged[number] = [flat]
        if self.shards is not None:
            for unit in self.shards.units if self.mesh.dense.holders > 1 else ():
                dist.all_reduce(unit.gradients, group=self.mesh.repeats)
            for partition in self._sharded():
                partition.grad = torch.zeros_like(partition)
            self.shards.gradients_to_owners([p.grad for p in self._sharded() if p.grad is not None])

    def _clip(self) -> dict[str, Tensor]:
        groups = self.optimizer.param_groups
        grads = [self.zero.averaged_gradients[number] for number in range(self.deepspeeds)]
        grads += [[p.grad] for p in self._sharded()]
        return clip_grad_norm_per_set(groups, self.clip_norm, grads, self._sum_over_ranks)

    def _update(self) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = groups[: self.deepspeeds]
        with self._rounding():
            self.deepspeed.step()
        if self.shards is not None:
            self.optimizer.param_groups = groups[self.deepspeeds :]
            self.optimizer.step()
            self.shards.weights_to_holders(self._sharded())
        self.optimizer.param_groups = groups

    def _forget_gradients(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
        for partition in self._sharded():
            partition.grad = None
        if self.shards is not None:
            self.shards.forget_gradients()

    def _copy_masters(self) -> None:
        with self._rounding():
            self.zero.update_lp_params()
        if self.shards is not None:
            self.shards.weights_to_holders(self._sharded())

    def _rounding(self) -> AbstractContextManager[None]:
        """Meanwhile owners round their experts' masters to FP4 before DeepSpeed gathers the weights."""
        return before_gathering(self._round_experts) if self.precision.fp4_experts else nullcontext()

    @torch.no_grad()
    def _round_experts(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups[: self.deepspeeds]):
            weights = self.zero.parallel_partitioned_bit16_groups[number][group["sharing"].rank]
            for view in group["views"]:
                if is_expert(view.piece.name):
                    view.of([weights]).copy_(fp4_values(view.of(group["params"]), weights.dtype))

    def _sharded(self) -> list[Tensor]:
        """Flat partitions of the masters that are not DeepSpeed's."""
        return [group["params"][0] for group in self.optimizer.param_groups if group["name"] == SHARDED]

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def _build(
        self, groups: list[dict[str, Any]], layouts: list[Layout], seed: int, device: torch.device
    ) -> None:
        """Make every weight, keep this rank's exact pieces as `masters` of its group, and narrow it."""
        if self.model.lm_head.weight.is_meta:
            fill_buffers(self.model, device)
        for group, layout in zip(groups, layouts, strict=True):
            own = layout.views[group["sharing"].rank]
            masters: dict[str, Tensor] = {}
            for index, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
                exact = parameter.detach()
                if exact.is_meta:
                    exact = fill(self.model, name, torch.empty_like(exact, device=device), seed)
                for view in own:
                    if view.piece.name == name:
                        masters[view.piece.key] = exact.view(-1)[view.piece.start :][
                            : view.piece.numel
                        ].clone()
                if group["name"] == SHARDED and self.shards is not None:
                    self.shards.take(name, exact)
                else:
                    group["params"][index] = _narrowed(self.model, name, parameter, exact.to(group["dtype"]))
            group["masters"] = [masters[view.piece.key].view(view.piece.shape) for view in own]
            group["views"] = own
            if group["name"] == SHARDED:
                flat = torch.zeros(layout.size, device=device)
                for view, master in zip(own, group.pop("masters"), strict=True):
                    view.of([flat]).copy_(master)
                group["params"] = [nn.Parameter(flat)]

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


def partition(
    model: ForCausalLM,
    config: OptimConfig,
    compute_dtype: torch.dtype,
    stage: int,
    sharded: set[str],
    mesh: Mesh,
) -> tuple[list[dict[str, Any]], list[Layout]]:
    """The engine's groups (`_split`) of a model that holds this rank's experts, and the layout of each."""
    every = build_groups(model.named_parameters(), model.config, config)
    first_expert = mesh.first_expert(model.config.n_routed_experts)
    groups = _split(every, compute_dtype, stage, sharded, mesh, first_expert)
    return groups, [lay_out(group["views"], group["sharing"].size) for group in groups]


def zero_ranks(model: ForCausalLM, config: OptimConfig, world: int) -> int:
    """Over how many of `world` ranks the masters of all but experts are partitioned.

    Matrices stay whole, so that more ranks would have less to hold and more filler; beyond that, groups of
    ranks repeat each other's updates (V4 report, on ZeRO for Muon). `model` may be on the meta device.
    """
    groups = build_groups(model.named_parameters(), model.config, config)
    sizes = [size for size in range(world, 0, -1) if world % size == 0]
    return next(size for size in sizes if size <= ONE_HOST or dense_filler(groups, size) < MOST_FILLER)


def dense_filler(groups: list[dict[str, Any]], ranks: int) -> float:
    """Filler over numbers of `build_groups` without experts, partitioned over so many ranks in bf16."""
    split = _split(groups, torch.bfloat16, 2, set(), Mesh(0, ranks, zero_size=ranks), 0)
    dense = [group["views"] for group in split if group["name"] == "dense"]
    filler = sum(lay_out(views, ranks).filler for views in dense)
    return filler / sum(view.piece.numel for views in dense for view in views)


def _narrowed(model: nn.Module, name: str, parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """The parameter with these values; a new one in its place where it was on the meta device."""
    if not parameter.is_meta:
        parameter.data = values
        return parameter
    owner, _, attribute = name.rpartition(".")
    made = nn.Parameter(values)
    setattr(model.get_submodule(owner), attribute, made)
    return made


def _apart(mesh: Mesh, rounded: bool) -> list[Sharing]:
    """What DeepSpeed has to know as shared among ranks of its own: not all ranks, or in another way."""
    experts_differ = rounded or mesh.experts.size < mesh.world
    return [mesh.dense] * (mesh.dense.size < mesh.world) + [mesh.experts] * experts_differ


def _place(group: dict[str, Any], layout: Layout, wrapped: _LossesOnly, apart: Sequence[Sharing]) -> None:
    """Parameters and filler in the order of the layout; DeepSpeed is told whom they are shared with."""
    params, sharing = group["params"], group["sharing"]
    group["params"] = [wrapped.fill(-i, params[0]) if i < 0 else params[i] for i in layout.order]
    if sharing in apart:
        group["moe"] = True
        for parameter in group["params"]:
            parameter.allreduce, parameter.group_name = False, sharing.name


def _split(
    groups: list[dict[str, Any]],
    compute_dtype: torch.dtype,
    stage: int,
    sharded: set[str],
    mesh: Mesh,
    first_expert: int,
) -> list[dict[str, Any]]:
    """Groups of one dtype and one `sharing` each, stacks of equal pieces apart from whole parameters; those
    of `sharded` names last.

    DeepSpeed sizes its buckets by the first group's dtype: fp32 keeps stage 2 from rounding fp32 gradients,
    and the narrow one has stage 1 accumulate in fp32 beside it.
    """
    split: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        for view in whole_views(group, first_expert):
            name = view.piece.name
            dtype = torch.float32 if stays_fp32(name) else compute_dtype
            unit = view.piece.numel if view.piece.key != name else 0
            sharing = mesh.experts if is_expert(name) else mesh.dense
            kind = SHARDED if name in sharded else sharing.name
            key = (kind, group["algorithm"], group["set"], dtype, unit)
            if key not in split:
                split[key] = {**group, "params": [], "names": [], "views": [], "dtype": dtype}
                split[key] |= {"name": kind, "sharing": sharing}
                split[key] |= {"holders": sharing.holders, "holder": sharing.holder}
                split[key].pop("blocks", None)
            target = split[key]
            if not target["names"] or target["names"][-1] != name:
                target["names"].append(name)
                target["params"].append(group["params"][view.param])
            target["views"].append(view._replace(param=len(target["params"]) - 1))
    wide_first = stage == 2

    def place(group: dict[str, Any]) -> tuple[bool, bool]:
        return group["name"] == SHARDED, (group["dtype"] == torch.float32) != wide_first

    return sorted(split.values(), key=place)
