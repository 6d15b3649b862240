"""Mixture of experts: hash and top-k routers, grouped experts, a shared expert, balance.

Legend: B batch, S sequence, n = B * S tokens, D hidden, E experts, K experts per token, F expert width,
R = n * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.swiglu import clamped_swiglu
from model.layout import Layout
from model.linear import Linear, grouped_linear
from model.norm import widen


@dataclass(frozen=True)
class Routing:
    """What a router chose for n tokens."""

    affinities: Tensor  # [n, E] fp32, before any bias
    indices: Tensor  # [n, K] int64
    weights: Tensor  # [n, K] fp32, normalised over the K and scaled


class Router(nn.Module):
    """Affinity sqrt(softplus(x . w)); weights are the chosen affinities, normalised, times a factor.

    "moe" chooses the K highest by affinity plus `e_score_correction_bias`, which no gradient trains
    (`update_bias`). "hash_moe" looks the experts up by token id in `tid2eid`. Computed in fp32.
    """

    tid2eid: Tensor  # [V, K] int64, "hash_moe" only
    e_score_correction_bias: Tensor  # [E] fp32, "moe" only

    def __init__(self, config: ModelConfig, mlp_type: str):
        super().__init__()
        experts, k = config.n_routed_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.k, self.scaling = k, config.routed_scaling_factor
        self.is_hash = mlp_type == "hash_moe"
        if self.is_hash:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, k, dtype=torch.int64))
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x: Tensor, input_ids: Tensor, replay: Tensor | None = None) -> Routing:
        """x [n, D], input_ids [n]; `replay` [n, K] prescribes the experts, weights stay today's."""
        affinities = F.softplus(F.linear(widen(x), self.weight)).sqrt()
        if replay is not None:
            indices = replay
        elif self.is_hash:
            indices = self.tid2eid[input_ids]
        else:
            indices = (affinities + self.e_score_correction_bias).topk(self.k, dim=-1).indices
        weights = affinities.gather(-1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
        return Routing(affinities, indices, weights)


class Permute(torch.autograd.Function):
    """Rows x[source] for a `source` in which every row of x stands K times; backward gathers too.

    inverse [n, K] are the positions of row i's copies, so that its gradient is a sum of K gathered rows:
    no atomics, the same result every time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return _gather_sum(grad, inverse), None, None


class _Combine(torch.autograd.Function):
    """The transpose of `Permute`: y_i = sum of the K rows at inverse[i]."""

    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(source)
        return _gather_sum(rows, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None


def _gather_sum(rows: Tensor, inverse: Tensor) -> Tensor:
    return rows.index_select(0, inverse.flatten()).unflatten(0, inverse.shape).sum(1)


@dataclass(frozen=True)
class Dispatched:
    """Rows brought to their experts, sorted by expert, and what brings them back."""

    rows: Tensor  # [R, D]
    weights: Tensor  # [R] fp32
    offsets: Tensor  # [E] int32, end row of each expert
    source: Tensor  # [R] token of each row
    inverse: Tensor  # [n, K] row of each choice


class Dispatcher(Protocol):
    """Brings tokens to their experts and back. `send` starts what `receive` ends; rows travel meanwhile."""

    def send(self, x: Tensor, routing: Routing) -> Dispatched: ...

    def receive(self, sent: Any) -> Dispatched: ...

    def combine(self, rows: Tensor, sent: Any) -> Tensor: ...


class LocalDispatcher:
    """All experts on this rank: sort the choices by expert, no host synchronisation, no token dropped."""

    def __init__(self, experts: int):
        self.experts = experts

    def send(self, x: Tensor, routing: Routing) -> Dispatched:
        """Tokens x [n, D] to the experts that `routing` chose."""
        choices = routing.indices.flatten()  # [R]
        by_expert, order = choices.sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        inverse = inverse.view_as(routing.indices)
        bounds = torch.arange(self.experts, device=choices.device, dtype=choices.dtype)
        source = order // routing.indices.shape[1]
        return Dispatched(
            rows=Permute.apply(x, source, inverse),
            weights=routing.weights.flatten().index_select(0, order),
            offsets=torch.searchsorted(by_expert, bounds, right=True, out_int32=True),
            source=source,
            inverse=inverse,
        )

    def receive(self, sent: Dispatched) -> Dispatched:
        """What this rank's experts work on."""
        return sent

    def combine(self, rows: Tensor, sent: Dispatched) -> Tensor:
        """Expert outputs [R, D], already weighted -> sums per token [n, D]."""
        return _Combine.apply(rows, sent.source, sent.inverse)


def expert_mlp(
    rows: Tensor, weights: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor, limit: float
) -> Tensor:
    """Rows [R, D] sorted by expert -> outputs [R, D], weighted by `weights` [R] before the down projection.

    gate_up [E, 2F, D], gate rows before up rows, down [E, D, F]; `offsets` [E] int32: end row of each expert.
    """
    gate, up = grouped_linear(rows, gate_up, offsets).chunk(2, dim=-1)
    hidden = clamped_swiglu(gate, up, limit) * weights.unsqueeze(-1)
    return grouped_linear(hidden.to(gate.dtype), down, offsets)


class Experts(nn.Module):
    """E routed SwiGLU experts as stacked matrices, gate rows before up rows.

    Under expert parallelism the stacks hold some of the model's experts only, numbered from `first` on.
    """

    mlp = staticmethod(expert_mlp)  # a precision policy replaces it
    first = 0

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))
        self.limit = config.swiglu_limit

    def forward(self, sent: Dispatched) -> Tensor:
        """Rows [R, D] sorted by expert -> outputs [R, D]."""
        stacks = self.gate_up_proj, self.down_proj
        return self.mlp(sent.rows, sent.weights, sent.offsets, *stacks, self.limit)


class SharedExpert(nn.Module):
    """The expert that every token visits: [n, D] -> [n, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, width = config.hidden_size, config.n_shared_experts * config.moe_intermediate_size
        self.gate_proj = Linear(dim, width, "shared_expert")
        self.up_proj = Linear(dim, width, "shared_expert")
        self.down_proj = Linear(width, dim, "shared_expert")
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class MoE(nn.Module):
    """Router, dispatcher (replaced under expert parallelism), routed experts and the shared expert."""

    def __init__(self, config: ModelConfig, mlp_type: str):
        super().__init__()
        self.gate = Router(config, mlp_type)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)

    def forward(self, x: Tensor, input_ids: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [B, S, D], input_ids [B, S] -> [B, S, D] and what was chosen."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens, input_ids.flatten(), replay)
        sent = self.dispatcher.send(tokens, routing)
        shared = self.shared_experts(tokens)
        arrived = self.dispatcher.receive(sent)
        routed = self.dispatcher.combine(self.experts(arrived), arrived)
        return (routed + shared).view_as(x), routing


def balance_loss(routing: Routing, layout: Layout) -> Tensor:
    """Sequence-wise balance loss summed over real tokens (DeepSeek-V3 report, eqs. 17-20).

    Per document of T tokens: f_i = E / (K T) * (times i was chosen), P_i = mean of the affinities normalised
    over experts, loss = sum_i f_i P_i; documents are weighted by their length, so the returned scalar over
    the number of real tokens is their mean. Counts are integers: the same in whatever order.
    """
    experts, k = routing.affinities.shape[-1], routing.indices.shape[-1]
    chosen = routing.indices.view(*layout.positions.shape, k)
    length = (layout.last - layout.first + 1).unsqueeze(-1)  # [B, S, 1] of each token's document
    frequency = _document_counts(chosen, experts, layout) * (experts / k) / length  # f_i
    share = routing.affinities / routing.affinities.sum(-1, keepdim=True)
    return ((frequency * share.view_as(frequency)).sum(-1) * layout.real).sum()


def _document_counts(chosen: Tensor, experts: int, layout: Layout) -> Tensor:
    """chosen [B, S, K] by each token -> times [B, S, E] by all tokens of its document, in other parts too."""
    context, (batch, length, _) = layout.context, chosen.shape
    document = (layout.first - context.rank * length).clamp(min=0).unsqueeze(-1)  # where it begins here
    table = chosen.new_zeros(batch, length * experts)  # by document and expert
    place = (document * experts + chosen).flatten(1)
    table.scatter_add_(1, place, torch.ones_like(place))
    count = table.view(batch, length, experts).gather(1, document.expand(-1, -1, experts))
    if context.size == 1:
        return count
    # Only the documents of a part's first and last token can reach into others.
    edge, mine = (torch.stack((x[:, 0], x[:, -1]), dim=1) for x in (layout.first.unsqueeze(-1), count))
    mine[:, 1] *= edge[:, 1] != edge[:, 0]  # one document, counted once
    edges, counts = context.gather(torch.cat((edge, mine), dim=-1)).split([1, experts], dim=-1)
    for document in edge.unbind(1):  # [B, 1]
        total = (counts * (edges == document.unsqueeze(1))).sum(1, keepdim=True)  # [B, 1, E]
        count = torch.where((layout.first == document).unsqueeze(-1), total, count)
    return count


def expert_loads(indices: Tensor, experts: int, real: Tensor) -> Tensor:
    """How many real tokens chose each expert: indices [B, S, K], real [B, S] -> [E] int64."""
    ones = real.unsqueeze(-1).expand_as(indices).to(torch.int64)
    loads = torch.zeros(experts, dtype=torch.int64, device=indices.device)
    return loads.scatter_add_(0, indices.flatten(), ones.flatten())


@torch.no_grad()
def update_bias(bias: Tensor, loads: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), in place (V4 report, section 2.1). bias, loads [E]."""
    loads = loads.double()
    bias += rate * (loads.mean() - loads).sign().to(bias.dtype)


def hash_table(vocab: int, experts: int, k: int, seed: int) -> Tensor:
    """Token id -> K distinct experts, [vocab, K] int64.

    The rule: token ids are shuffled and cut into runs of E; in each run the experts are shuffled anew and
    the i-th token takes the K that follow position i cyclically. So every full run gives each expert K
    tokens exactly. One generator seeded with `seed`; the same table on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = -(-vocab // experts)
    with torch.device("cpu"):
        shuffled = torch.stack(
            [torch.randperm(experts, generator=generator) for _ in range(runs)]
        )  # [runs, E]
        place = torch.arange(experts).unsqueeze(-1) + torch.arange(k)  # [E, K]
        table = shuffled[:, place % experts].flatten(0, 1)[:vocab]  # [vocab, K]
        return table[torch.randperm(vocab, generator=generator)]
