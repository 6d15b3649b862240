"""How much device memory a run will need, by category, before anything is allocated.

Weights, masters, gradients and moments are sums over the model's shapes. What a micro-batch and a step of the
optimizer add is measured: model and optimizer run on the meta device, where tensors have shapes and no
numbers, while a `MemTracker` adds up what lives: what kernels allocate, where the device will run them
(`model.kernels.gpu.planned_for_kernels`), else what their torch references do. CUDA is not touched.
`python -m train.plan` prints the table for any number of ranks.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from model.flops import count_parameters
from model.kernels.gpu import BODIES, runs_kernels
from model.model import ForCausalLM, stays_fp32
from optim.groups import build_groups
from optim.muon import adamw_step, muon_step
from optim.partition import View, is_expert, whole_views
from train import recompute
from train.adapter import BUCKET
from train.config import RunConfig
from train.parallel import standins
from train.parallel.dense import sharded_names
from train.parallel.expert import share_experts
from train.parallel.mesh import Mesh
from train.zero import SHARDED, partition

GIB = 2**30
ALONE = Mesh()
WORKSPACES = 2 * 32 * 2**20  # cuBLAS on Hopper: one for the thread of forward, one for that of backward
SATURATED = 2**27  # numbers; more matrices of one shape add nothing to what Muon works on at once


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of `mesh`; `accumulates`: gradients exist beside all that a micro-batch adds.

    weights      as they are computed with, and the routers' buffers
    masters      fp32; under ZeRO this rank's partition of all, else copies of narrower weights and of
                 experts that compute in FP4
    gradients    fp32 sums over the micro-batches of a step
    moments      one number of Muon, two of AdamW, of what rests, too
    activations  the most that one micro-batch adds: what backward needs, and temporaries
    scratch      the most that the optimizer's step adds
    buffers      of ZeRO's reduction and of libraries
    build        before any of these but masters: weights as they are initialised, all in fp32; under ZeRO
                 in their own dtypes, beside what DeepSpeed copies the masters into
    """

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    scratch: int
    buffers: int
    build: int
    mesh: Mesh
    accumulates: bool

    @property
    def states(self) -> int:
        """What no choice of the batch avoids."""
        return self.weights + self.masters + self.gradients + self.moments

    @property
    def total(self) -> int:
        """The peak: of a micro-batch, beside the gradients of those before it, or of the optimizer's step."""
        micro_batch = self.activations + (self.gradients if self.accumulates else 0)
        peak = max(micro_batch, self.gradients + self.scratch)
        return self.masters + max(self.build, self.weights + self.moments + self.buffers + peak)


class MemTracker(TorchDispatchMode):
    """Counts the bytes of storages made on `device` while entered, in blocks of 512 like CUDA's allocator.

    What one of torch's operations takes and returns within itself is not seen; on the meta device, what one
    of Fourfold's does is. A storage from before counts as soon as an operation returns a view of it.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:  # takes one dtype only there
            a, b, offsets = args[:3]
            groups = () if b.dim() == 3 else (len(offsets),)
            out = a.new_empty(*groups, a.shape[0], b.shape[-1])
        elif func in BODIES and self.device == "meta":
            with self:
                out = BODIES[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == self.device:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self._storages:
            return

        def free(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> int:
        """Forget the peak; returns what lives now."""
        self.peak = self.live
        return self.live


def predict(config: RunConfig, mesh: Mesh = ALONE, buckets: int = 0) -> Memory:
    """The memory of each rank of a run on `mesh` whose engine reduces in `buckets` bytes."""
    apart = _apart_from_activations(config, mesh, buckets)
    return Memory(**apart, activations=_activations(config, mesh))


def bucket_bytes(config: RunConfig, mesh: Mesh, device: torch.device) -> int:
    """What DeepSpeed reduces gradients in; the bare engine has none."""
    if config.parallel.engine == "torch":
        return 0
    count = count_parameters(config.model)
    numbers = min(BUCKET, count.total + count.mtp)
    overlapping = mesh.world > 1 and device.type == "cuda"  # one fills while the other travels
    return 4 * numbers * (2 if overlapping else 1)


def _apart_from_activations(config: RunConfig, mesh: Mesh, buckets: int) -> dict[str, Any]:
    """All other fields of `Memory`."""
    with torch.device("meta"):
        model = ForCausalLM(config.model)
    states = _zero_states if config.parallel.engine == "deepspeed" else _torch_states
    found = states(model, config, mesh)
    found["weights"] += sum(b.nbytes for b in model.buffers())
    found["buffers"] += WORKSPACES + buckets
    return found | {"mesh": mesh, "accumulates": _accumulates(config, mesh)}


def _torch_states(model: ForCausalLM, config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Of `TorchEngine`."""
    dtype = getattr(torch, config.precision.compute_dtype)
    every = sum(p.numel() for p in model.parameters())
    narrow = sum(p.numel() for name, p in model.named_parameters() if not stays_fp32(name))
    experts = sum(p.numel() for name, p in model.named_parameters() if is_expert(name))
    apart = narrow if dtype.itemsize < 4 else experts * config.fp4_experts
    groups = build_groups(model.named_parameters(), model.config, config.optim)
    trained = [group for group in groups if group["set"] in config.trained_sets]
    sizes = {id(group): sum(p.numel() for p in group["params"]) for group in groups}
    return {
        "weights": 4 * (every - narrow) + dtype.itemsize * narrow,
        "masters": 4 * apart,
        "gradients": 4 * sum(sizes[id(group)] for group in trained),
        "moments": sum(_moments(group) * sizes[id(group)] for group in groups),
        "scratch": max(_scratch(group, whole_views(group)) for group in trained),
        "buffers": 0,
        "build": 4 * every,
    }


def _zero_states(model: ForCausalLM, config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Of `ZeroEngine`, on the rank that holds most of each group."""
    share_experts(model, mesh)
    dtype, stage = getattr(torch, config.precision.compute_dtype), config.zero_stage(mesh.world)
    sharded = set(sharded_names(model)) if config.parallel.shard_dense else set()
    groups, layouts = partition(model, config.optim, dtype, stage, sharded, mesh)
    found = dict.fromkeys(("weights", "masters", "gradients", "moments", "buffers"), 0)
    scratch = slices = owned = 0
    for group, layout in zip(groups, layouts, strict=True):
        own, whole = layout.size, layout.size * group["sharing"].size
        trains = group["set"] in config.trained_sets
        found["masters"] += 4 * own
        if group["name"] == SHARDED:
            part = -(-(whole - layout.filler) // mesh.zero_size)
            found["weights"] += dtype.itemsize * part
            slices, owned = slices + part, owned + own
        else:
            found["weights"] += group["dtype"].itemsize * whole
            numbers = own if stage == 2 else (whole - layout.filler) * trains
            found["gradients"] += 4 * numbers
            if stage == 2:  # each micro-batch's, then added to the sums
                found["buffers"] += 4 * numbers
            if group["holders"] > 1:  # added up over those who repeat the update
                scratch = max(scratch, 4 * own)
        most = max(layout.views, key=lambda views: sum(view.piece.numel for view in views))
        found["moments"] += _moments(group) * own
        if trains:
            scratch = max(scratch, _scratch(group, most))
    found["gradients"] += 4 * slices
    found["scratch"] = 4 * owned + max(scratch, 4 * (slices + owned) if slices else 0)  # to the owners
    found["build"] = found["weights"] + found["masters"]  # once more; weights flatten on the host at need
    return found


def _moments(group: dict[str, Any]) -> int:
    """Bytes for a number."""
    return 4 if group["algorithm"] == "muon" else 8


def _accumulates(config: RunConfig, mesh: Mesh) -> bool:
    """Whether gradients exist beside all of a micro-batch's activations: of those before it, as they do where
    dense weights are sharded, or of its later layers, for which ZeRO has no order of its own."""
    again = config.parallel.engine == "deepspeed" and config.recompute != "none"
    return again or _micro_batches(config, mesh) > 1


def _micro_batches(config: RunConfig, mesh: Mesh) -> int:
    return config.train.batch_tokens // (config.train.seq_len * config.train.micro_batch * mesh.data_world)


def _activations(config: RunConfig, mesh: Mesh) -> int:
    """Of the whole model, or where that is less work by kinds of layers: memory is linear in their numbers.

    Then the first layer, into which one stream comes, and the last of each kind stand for all: what others
    keep lies under the peak, which is at the end of forward or soon after. (A peak in the last CSA layer's
    backward lies under less where several layers of one kind follow it: this errs on the safe side.) Where
    little is kept, a first micro-batch's gradients may grow faster than that shrinks: then there is no way
    around the whole.
    """
    kinds = list(zip(config.model.layer_types, config.model.mlp_layer_types, strict=True))
    last = {kind: index for index, kind in enumerate(kinds)}
    first, *rest = (kinds[index] for index in sorted({0, *last.values()}))
    more = Counter(kinds) - Counter([first, *rest])
    grows = config.recompute != "none" and not _accumulates(config, mesh)
    if grows or (1 + len(rest)) * (1 + len(more)) >= len(kinds):
        return micro_batch_peak(config, kinds, mesh, grows)
    base = micro_batch_peak(config, [first, *rest], mesh)
    added = {kind: micro_batch_peak(config, [first, kind, *rest], mesh) - base for kind in more}
    return base + sum(count * added[kind] for kind, count in more.items())


def micro_batch_peak(
    config: RunConfig, kinds: Sequence[tuple[str, str]], mesh: Mesh = ALONE, grows: bool = False
) -> int:
    """Most bytes that one micro-batch adds in a model of layers of these (layer type, MLP layer type).

    Gradients are freed once made, as if added to sums that exist; if it `grows`, these sums are made. Without
    a kernel of Sinkhorn's iterations, compiled hyper-connections keep no more for backward than eager ones do
    of the first; layers that are compiled whole keep less than is counted. What is measured for the log lies
    under the peak (`train.quantisation.AT_ONCE`).
    """
    layer_types, mlp_layer_types = map(list, zip(*kinds, strict=True))
    changes: dict[str, Any] = {"layer_types": layer_types, "mlp_layer_types": mlp_layer_types}
    if config.train.compile and not runs_kernels(torch.empty(0, device="meta")):
        changes["hc_sinkhorn_iters"] = 1
    model_config = replace(config.model, num_hidden_layers=len(kinds), **changes)
    shape = (config.train.micro_batch, config.train.seq_len)
    sums: list[Tensor] = []

    def take(parameter: Tensor) -> None:
        if grows and parameter.grad is not None:
            sums.append(parameter.grad.float())
        parameter.grad = None

    with MemTracker() as tracker:
        with torch.device("meta"):
            model = ForCausalLM(model_config).cast(getattr(torch, config.precision.compute_dtype))
            model.use(config.precision.at(config.precision.qat_start))
            recompute.apply(model, config.recompute)
            standins.apart(model, mesh, config.parallel.shard_dense)
            ids = torch.zeros(shape, dtype=torch.int64)
            further = torch.zeros(*shape, model_config.num_nextn_predict_layers, dtype=torch.int64)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(take)
        before = tracker.restart()
        options: dict[str, Any] = {"mode": config.attention_mode, "indexer_loss": config.indexer_loss}
        losses = model(ids, ids, ids, ids, further, **options).losses
        trained = losses if "model" in config.trained_sets else ("indexer",)
        torch.stack([losses[part][0] for part in trained]).sum().backward()
    return tracker.peak - before


def _scratch(group: dict[str, Any], views: Sequence[View]) -> int:
    """Most bytes that a step of a group of parameters adds where it updates these pieces of them."""
    muon = group["algorithm"] == "muon"
    matrices = Counter((rows, view.piece.shape[-1]) for view in views for rows in view.rows if muon)
    shapes = [
        shape
        for shape, count in matrices.items()
        for _ in range(min(count, max(1, SATURATED // math.prod(shape))))
    ] or [(1, sum(view.piece.numel for view in views))]
    with torch.no_grad(), MemTracker() as tracker, torch.device("meta"):
        a, b, c, d = ([torch.empty(shape) for shape in shapes] for _ in range(4))
        before = tracker.restart()
        if muon:
            dtype = torch.float32 if group["newton_schulz_dtype"] == "float32" else torch.bfloat16
            muon_step(a, b, c, lr=1, momentum=1, weight_decay=1, update_rms=1, dtype=dtype, measure=True)
        else:
            adamw_step(a, b, c, d, step=1, lr=1, betas=(0, 0), eps=1, weight_decay=1, measure=True)
    return tracker.peak - before


def table(memory: Memory, available: int) -> Table:
    """The prediction by category beside what the device has, in GiB."""
    rows = Table("memory", "GiB", title="on each rank, predicted", title_justify="left")
    for name in ("weights", "masters", "gradients", "moments", "activations", "scratch", "buffers", "build"):
        rows.add_row(name, f"{getattr(memory, name) / GIB:,.2f}")
    rows.add_section()
    rows.add_row("at the peak", f"{memory.total / GIB:,.2f}")
    rows.add_row("on the device", f"{available / GIB:,.2f}")
    return rows


def refuse_if_too_large(memory: Memory, available: int, config: RunConfig, states_only: bool = False) -> None:
    """Raise ConfigError, with what would fit, when `memory` of `config` is more than `available` bytes.

    `states_only`: for CPUs, where the peak is a mere estimate and ranks share what there is.
    """
    need = memory.states if states_only else memory.total
    if need <= available:
        return
    remedies = [] if states_only else _remedies(memory, available, config)
    raise ConfigError(
        f"memory: the run needs about {need / GIB:,.1f} GiB on each rank, the device has"
        f" {available / GIB:,.1f}; use {' or '.join([*remedies, 'a smaller model'][:4])}"
    )


def _remedies(memory: Memory, available: int, config: RunConfig) -> Iterator[str]:
    """The least change of each key that makes the run fit, where there is one; then of the ranks."""
    for key in ("recompute", "micro_batch", "seq_len"):
        least = replace(memory, activations=0, accumulates=memory.accumulates or key != "recompute")
        for less in _less(config, key) if least.total <= available else ():
            with suppress(ConfigError):  # sequences that the model cannot have
                change: dict[str, Any] = {key: less}
                changed = replace(config, train=replace(config.train, **change))
                if replace(least, activations=_activations(changed, memory.mesh)).total <= available:
                    yield f"train.{key}={less}"
                    break
    if config.parallel.engine == "torch":
        return
    mesh = memory.mesh
    buckets = memory.buffers - _apart_from_activations(config, mesh, 0)["buffers"]
    for times in _divisors(_micro_batches(config, mesh))[1:]:
        zero = mesh.zero_size * (times if mesh.zero_size == mesh.world else 1)
        larger = replace(mesh, world=mesh.world * times, zero_size=zero)
        if replace(memory, **_apart_from_activations(config, larger, buckets)).total <= available:
            yield f"{larger.world} ranks"
            break


def _less(config: RunConfig, key: str) -> Sequence[Any]:
    """Values of `train.KEY` that need less memory than today's, the nearest first."""
    now = getattr(config.train, key)
    if key == "recompute":
        return recompute.HOW[recompute.HOW.index(now) + 1 :]
    return _divisors(now)[:-1][::-1]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
