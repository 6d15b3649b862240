"""Expert parallelism: every rank of a group holds some of the experts, and rows travel to them and back.

Three exchanges a layer and direction: how many rows (integers, in forward only), the rows with their weights,
and the outputs. Nothing is padded and nothing dropped. The counts leave before the shared expert is computed
and the host reads them after it was launched: the one place where the host waits for the device.

Legend: n tokens, K experts per token, R = n * K rows sent, A rows that arrive, D hidden, E experts of the
model, e = E / ranks of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

from model.model import ForCausalLM
from model.moe import Dispatched, Experts, LocalDispatcher, Permute, Routing
from train.parallel.mesh import Mesh


class _Exchange(torch.autograd.Function):
    """Rows [sum(send), ...] to the ranks in order of the group -> what they send here [sum(receive), ...].

    Backward is the same exchange the other way round. Functional collectives are seen, and their results
    kept, by selective recomputation.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:  # type: ignore[override]
        ctx.way = (send, receive, group)
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        send, receive, group = ctx.way
        return _exchange(grad, receive, send, group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    arrived = functional.all_to_all_single(rows.contiguous(), receive, send, group)
    return functional.wait_tensor(arrived)


@dataclass(frozen=True)
class Sent(Dispatched):
    """Rows of this rank's tokens, sorted by expert and so by rank, whose counts are on their way."""

    counts: Tensor  # [ranks, e] int64, rows that will arrive from each rank for each expert here
    sizes: Tensor  # [2, ranks] int64 on the host: rows to and from each rank
    ready: Any  # CUDA event after which `sizes` may be read, or None


@dataclass(frozen=True)
class Arrived(Dispatched):
    """Rows at their experts, sorted by expert; `inverse` [A, 1] and `source` [A] undo that sorting."""

    home: Sent
    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank


class AllToAllDispatcher:
    """Experts shared out evenly over the `ranks` of `group`, in its order; see `LocalDispatcher`."""

    def __init__(self, experts: int, group: Any, ranks: int):
        self.group, self.ranks = group, ranks
        self.local = LocalDispatcher(experts)
        self.stream: torch.cuda.Stream | None = None  # on which rows travel beside the shared expert

    def send(self, x: Tensor, routing: Routing) -> Sent:
        """Sort the choices of tokens x [n, D] by expert, and let the other ranks know how many will come."""
        own = self.local.send(x, routing)
        with self._aside(x.device, after_all=True):
            outgoing = own.offsets.long().diff(prepend=own.offsets.new_zeros(1)).view(self.ranks, -1)
            counts = torch.empty_like(outgoing)
            dist.all_to_all_single(counts, outgoing, group=self.group)
            sizes = torch.stack((outgoing.sum(1), counts.sum(1))).to("cpu", non_blocking=True)
            ready = torch.cuda.current_stream().record_event() if x.is_cuda else None
        return Sent(**vars(own), counts=counts, sizes=sizes, ready=ready)

    def receive(self, sent: Sent) -> Arrived:
        """Exchange the rows, and sort those that arrive by expert."""
        if sent.ready is not None:
            sent.ready.synchronize()
        send, receive = sent.sizes.tolist()
        with self._aside(sent.rows.device):
            rows = _Exchange.apply(sent.rows, send, receive, self.group)  # [A, D], by rank, then by expert
            weights = _Exchange.apply(sent.weights, send, receive, self.group)  # [A]
            expert = torch.arange(sent.counts.shape[1], device=rows.device).repeat(self.ranks)
            expert = expert.repeat_interleave(sent.counts.flatten(), output_size=len(rows))
            source = expert.sort(stable=True).indices  # [A]
            inverse = torch.empty_like(source).scatter_(
                0, source, torch.arange(len(rows), device=rows.device)
            )
            inverse = inverse.unsqueeze(1)
            arrived = Arrived(
                rows=Permute.apply(rows, source, inverse),
                weights=weights.index_select(0, source),
                offsets=sent.counts.sum(0).cumsum(0).to(torch.int32),
                source=source,
                inverse=inverse,
                home=sent,
                send=send,
                receive=receive,
            )
        self._join(arrived)
        return arrived

    def combine(self, rows: Tensor, arrived: Arrived) -> Tensor:
        """Expert outputs [A, D], already weighted -> sums per token of this rank [n, D]."""
        rows = Permute.apply(rows, arrived.inverse.squeeze(1), arrived.source.unsqueeze(1))
        rows = _Exchange.apply(rows, arrived.receive, arrived.send, self.group)
        return self.local.combine(rows, arrived.home)

    @contextmanager
    def _aside(self, device: torch.device, after_all: bool = False) -> Iterator[None]:
        """On a GPU: in a stream beside the layer's, after all that has been launched so far or only after
        what was launched before `send`."""
        if device.type != "cuda":
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(device)
        if after_all:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield

    def _join(self, arrived: Arrived) -> None:
        """Have the rest of the layer wait for the rows, and their memory for the rest of the layer."""
        if self.stream is None:
            return
        here = torch.cuda.current_stream()
        here.wait_stream(self.stream)
        for x in (arrived.rows, arrived.weights, arrived.offsets, arrived.source, arrived.inverse):
            x.record_stream(here)


def share_experts(model: ForCausalLM, mesh: Mesh) -> None:
    """Keep this rank's share of the experts of every MoE, and have rows travel. Works on any device."""
    if mesh.ep_size == 1:
        return
    for moe in model.moes():
        _keep_share(moe.experts, mesh)
        moe.dispatcher = AllToAllDispatcher(model.config.n_routed_experts, mesh.ep, mesh.ep_size)


def _keep_share(experts: Experts, mesh: Mesh) -> None:
    each, experts.first = len(experts.down_proj) // mesh.ep_size, mesh.first_expert(len(experts.down_proj))
    for name, stack in experts.named_parameters(recurse=False):
        own = stack.detach()[experts.first : experts.first + each].clone()
        setattr(experts, name, nn.Parameter(own))


def round_stochastically(x: Tensor) -> Tensor:
    """fp32 -> bf16, up or down with the chances that make the mean exact; NaN and Inf stay."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def reduce_rounded(x: Tensor, to: int, group: Any) -> Tensor:
    """The sum of x over `group` on its rank `to`, added up there in fp32 from what travels as rounded bf16.

    Elsewhere x, in fp32, too. V4 report, on the experts' gradients.
    """
    rounded, first = round_stochastically(x.float()), dist.get_rank(group) == to
    parts = [torch.empty_like(rounded) for _ in range(dist.get_world_size(group))] if first else None
    dist.gather(rounded, parts, dst=dist.get_global_rank(group, to), group=group)
    return torch.stack(parts).sum(0, dtype=torch.float32) if parts else x.float()
