"""Stand-ins for other ranks where only shapes count, on the meta device: `train.memory` measures with them.

Nothing travels, yet every tensor of a rank is made that the real thing makes. Of a router's choices as many
rows arrive at a rank as leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.model import ForCausalLM
from model.moe import Dispatched, LocalDispatcher, Permute
from train.parallel.context import SequenceParts
from train.parallel.dense import DenseShards, sharded_names
from train.parallel.expert import Arrived, Sent, share_experts
from train.parallel.mesh import Mesh

_functional = torch.ops._c10d_functional


def apart(model: ForCausalLM, mesh: Mesh, shard_dense: bool) -> None:
    """Leave of a model on the meta device what one rank of `mesh` has, which need not exist."""
    share_experts(model, mesh)
    for moe in model.moes() if mesh.ep_size > 1 else ():
        moe.dispatcher = EvenDispatcher(model.config.n_routed_experts, mesh.ep_size)
    if mesh.cp_size > 1:
        model.context = OnePart(mesh)
    if shard_dense:
        weights = {name: model.get_parameter(name).detach() for name in sharded_names(model)}
        shards = OneSlice(model, mesh.dense, next(iter(weights.values())).dtype, torch.device("meta"))
        for name, weight in weights.items():
            shards.take(name, weight)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        return _Exchange.exchanged(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Exchange.exchanged(grad)

    @staticmethod
    def exchanged(rows: Tensor) -> Tensor:
        """The operation that selective recomputation keeps, without a group."""
        arrived = _functional.all_to_all_single(rows.contiguous(), [len(rows)], [len(rows)], "none")
        return _functional.wait_tensor(arrived)


class EvenDispatcher(LocalDispatcher):
    """For `AllToAllDispatcher`."""

    def __init__(self, experts: int, ranks: int):
        super().__init__(experts)
        self.here = experts // ranks

    def receive(self, sent: Dispatched) -> Arrived:
        source, inverse = torch.empty_like(sent.source), torch.empty_like(sent.source).unsqueeze(1)
        home = Sent(**vars(sent), counts=source[:0], sizes=source[:0], ready=None)
        return Arrived(
            rows=Permute.apply(_Exchange.apply(sent.rows), source, inverse),
            weights=_Exchange.apply(sent.weights).index_select(0, source),
            offsets=sent.offsets[: self.here].clone(),
            source=source,
            inverse=inverse,
            home=home,
            send=[],
            receive=[],
        )

    def combine(self, rows: Tensor, sent: Any) -> Tensor:
        rows = Permute.apply(rows, sent.inverse.squeeze(1), sent.source.unsqueeze(1))
        return super().combine(_Exchange.apply(rows), sent.home)


class OnePart(SequenceParts):
    """For `SequenceParts`."""

    def before(self, x: Tensor) -> Tensor:
        return x.clone()

    def every(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size, dim=1)


class _Done:
    def wait(self) -> None:
        """There was nothing to wait for."""


class OneSlice(DenseShards):
    """For `DenseShards`."""

    def _start(self, number: int) -> tuple[Any, Tensor]:
        own = self.units[number].weights
        return _Done(), own.new_empty(len(own) * self.sharing.size)

    def add(self, number: int, grads: Sequence[Tensor | None]) -> None:
        own, ranks = self.units[number], self.sharing.size
        flat = own.weights.new_zeros(own.length * ranks)
        arrived = torch.empty_like(flat)
        own.gradients += arrived.unflatten(0, (ranks, -1)).sum(0, dtype=torch.float32)
