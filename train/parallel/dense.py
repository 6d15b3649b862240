"""Dense weights that no rank holds whole: gathered before a layer, let go after it.

DeepSpeed has no ZeRO-3 beside experts of one's own, and V4-Pro's 25.6 billion dense weights do not fit on one
GPU. Here each layer's matrices lie in one flat buffer, cut into even slices over the ranks of a group:

    forward    all-gather the layer's slices, compute, let go (train.recompute=full keeps inputs only);
               the next layer's slices travel meanwhile
    backward   gather again, compute again, then each rank gets its slice of the gradients of all ranks,
               added up in fp32 in the order of the ranks
    step       matrices are updated whole by the ranks that own them (`optim.partition.lay_out`): slices of
               gradients travel to the owners, slices of new weights back

What is computed with in fp32 (norms, routers, hyper-connections) is small and stays whole everywhere.

Legend: U numbers of a layer's buffer, n ranks that share it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.model import ForCausalLM, stays_fp32
from optim.partition import Layout, is_expert
from train.parallel.mesh import Sharing


def sharded_names(model: ForCausalLM) -> list[str]:
    """Full names of the weights that are sharded: the layers' matrices, apart from experts."""
    return [name for prefix, layer in _layers(model) for name in _own_names(prefix, layer)]


def sum_of_slices(x: Tensor, group: Any) -> Tensor:
    """x [n * k, ...] of every rank of `group` -> this rank's slice [k, ...] of their sum, in fp32 or wider.

    Slices travel in x's dtype and are added up in the order of the ranks: the same result every time.
    """
    arrived = torch.empty_like(x)
    dist.all_to_all_single(arrived, x.contiguous(), group=group)
    wide = torch.promote_types(x.dtype, torch.float32)
    return arrived.unflatten(0, (dist.get_world_size(group), -1)).sum(0, dtype=wide)


class Place(NamedTuple):
    """Where a weight lies in its layer's buffer, and which attribute of a module shows it."""

    name: str
    module: nn.Module
    attribute: str
    shape: torch.Size
    start: int


class Unit:
    """One layer's sharded weights: this rank's slice of them and of their gradients' sum, each [U / n]."""

    def __init__(self, prefix: str, layer: nn.Module, ranks: int):
        self.places: list[Place] = []
        end = 0
        for name in _own_names(prefix, layer):
            owner, _, attribute = name.removeprefix(prefix).rpartition(".")
            module = layer.get_submodule(owner)
            shape = module.get_parameter(attribute).shape
            self.places.append(Place(name, module, attribute, shape, end))
            end += shape.numel()
        self.length = -(-end // ranks)  # of a slice
        self.weights = self.gradients = torch.empty(0)

    def take(self, place: Place, exact: Tensor, rank: int) -> None:
        """Keep this rank's slice of a weight, and show no weight any more."""
        own = slice(rank * self.length, (rank + 1) * self.length)
        start, stop = max(place.start, own.start), min(place.start + exact.numel(), own.stop)
        if start < stop:
            self.weights[start - own.start : stop - own.start] = exact.view(-1)[
                start - place.start : stop - place.start
            ]
        place.module._parameters.pop(place.attribute, None)

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The weights in the layer's buffer [U]."""
        return tuple(flat[p.start : p.start + p.shape.numel()].view(p.shape) for p in self.places)


class Segment(NamedTuple):
    """A run of numbers that one rank holds in its slice of a unit, and one rank owns in a flat partition."""

    unit: Unit
    held: int
    group: int
    owned: int
    length: int


class _Gather(torch.autograd.Function):
    """A layer's weights from all slices; backward leaves this rank's slice of the gradients' sum."""

    @staticmethod
    def forward(ctx, begin: Tensor, shards: DenseShards, number: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.shards, ctx.number = shards, number
        return shards.units[number].views(shards.fetch(number))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        ctx.shards.add(ctx.number, grads)
        return None, None, None


class DenseShards:
    """All layers' sharded weights on this rank. `units` in the order in which forward uses them."""

    def __init__(self, model: ForCausalLM, sharing: Sharing, dtype: torch.dtype, device: torch.device):
        self.sharing = sharing
        self.units = [Unit(prefix, layer, sharing.size) for prefix, layer in _layers(model)]
        self.of = {place.name: (unit, place) for unit in self.units for place in unit.places}
        for unit in self.units:
            unit.weights = torch.zeros(unit.length, dtype=dtype, device=device)
            unit.gradients = torch.zeros(unit.length, dtype=torch.float32, device=device)
        self._begin = torch.zeros((), device=device, requires_grad=True)  # has autograd call backward
        self._coming: dict[int, tuple[Any, Tensor]] = {}
        self._last = -1
        for number, (_, layer) in enumerate(_layers(model)):
            layer.forward = self._around(layer, number)  # type: ignore[method-assign]

    def take(self, name: str, exact: Tensor) -> None:
        """Keep this rank's slice of the weight of this name."""
        unit, place = self.of[name]
        unit.take(place, exact, self.sharing.rank)

    def fetch(self, number: int) -> Tensor:
        """The whole buffer [U] of a unit; begins to fetch the one that is likely to be wanted next."""
        forward = number > self._last
        self._last = number
        work, flat = self._coming.pop(number) if number in self._coming else self._start(number)
        following = number + (1 if forward else -1)
        if 0 <= following < len(self.units) and following not in self._coming:
            self._coming[following] = self._start(following)
        work.wait()
        return flat

    def add(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a unit's weights, of all ranks, to this rank's slice."""
        unit = self.units[number]
        dtype, length = unit.weights.dtype, unit.length * self.sharing.size
        flat = torch.zeros(length, dtype=dtype, device=unit.weights.device)
        for view, grad in zip(unit.views(flat), grads, strict=True):
            if grad is not None:
                view.copy_(grad)
        unit.gradients += sum_of_slices(flat, self.sharing.group)

    def _start(self, number: int) -> tuple[Any, Tensor]:
        own = self.units[number].weights
        flat = own.new_empty(len(own) * self.sharing.size)
        return dist.all_gather_into_tensor(flat, own, group=self.sharing.group, async_op=True), flat

    def _around(self, layer: nn.Module, number: int) -> Any:
        compute, unit = layer.forward, self.units[number]

        def forward(*args: Any, **options: Any) -> Any:
            for place, weight in zip(unit.places, _Gather.apply(self._begin, self, number), strict=True):
                setattr(place.module, place.attribute, weight)
            try:
                return compute(*args, **options)
            finally:
                for place in unit.places:
                    delattr(place.module, place.attribute)

        return forward

    # ---- between slices and owners, once a step ----

    def connect(self, layouts: Sequence[Layout]) -> None:
        """Remember which parts of slices belong to which owner; `layouts` of all groups that are sharded."""
        me, ranks = self.sharing.rank, range(self.sharing.size)
        self._out = [self._segments(layouts, me, owner) for owner in ranks]
        self._in = [self._segments(layouts, holder, me) for holder in ranks]

    def _segments(self, layouts: Sequence[Layout], holder: int, owner: int) -> list[Segment]:
        found = []
        for number, layout in enumerate(layouts):
            for view in layout.views[owner]:
                unit, place = self.of[view.piece.name]
                slice_start = holder * unit.length
                start = max(place.start, slice_start)
                length = min(place.start + view.piece.numel, slice_start + unit.length) - start
                if length > 0:
                    owned = view.start + start - place.start
                    found.append(Segment(unit, start - slice_start, number, owned, length))
        return found

    def gradients_to_owners(self, partitions: Sequence[Tensor]) -> None:
        """Fill the owners' flat partitions, one a group, with the gradients from all slices; forget these."""
        parts = [[s.unit.gradients[s.held : s.held + s.length] for s in to] for to in self._out]
        for segment, part in self._exchanged(parts, self._in):
            partitions[segment.group][segment.owned : segment.owned + segment.length] = part
        self.forget_gradients()

    def weights_to_holders(self, partitions: Sequence[Tensor]) -> None:
        """Renew all slices from the owners' flat partitions."""
        for work, _ in self._coming.values():
            work.wait()
        self._coming.clear()
        dtype = self.units[0].weights.dtype
        parts = [[partitions[s.group][s.owned : s.owned + s.length].to(dtype) for s in to] for to in self._in]
        for segment, part in self._exchanged(parts, self._out):
            segment.unit.weights[segment.held : segment.held + segment.length] = part

    def forget_gradients(self) -> None:
        """Begin new sums."""
        for unit in self.units:
            unit.gradients.zero_()

    def _exchanged(
        self, parts: list[list[Tensor]], arriving: list[list[Segment]]
    ) -> Iterator[tuple[Segment, Tensor]]:
        """Send `parts` to every rank; the `arriving` segments from every rank with what came for them."""
        sent = torch.cat(list(chain.from_iterable(parts)))
        receive = [sum(segment.length for segment in segments) for segments in arriving]
        arrived = sent.new_empty(sum(receive))
        send = [sum(map(len, own)) for own in parts]
        dist.all_to_all_single(arrived, sent, receive, send, group=self.sharing.group)
        segments = list(chain.from_iterable(arriving))
        yield from zip(segments, arrived.split([segment.length for segment in segments]), strict=True)


def _layers(model: ForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    """Layers and MTP blocks with the prefixes of their names, in the order of forward: what is recomputed."""
    for kind in ("layers", "mtp"):
        for number, module in enumerate(model.get_submodule(kind).children()):
            yield f"{kind}.{number}.", module


def _own_names(prefix: str, layer: nn.Module) -> list[str]:
    names = [f"{prefix}{name}" for name, _ in layer.named_parameters()]
    return [name for name in names if not is_expert(name) and not stays_fp32(name)]
