"""How parameters are cut into pieces that never part, and how pieces are laid out over ranks.

A piece is the unit of ownership (one rank updates it) and of checkpoints (one key, whatever the number of
ranks): one expert's matrix, a block of rows of a vocabulary table, or a whole parameter.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

TABLE_BLOCKS = 64  # at most; V4's vocabulary is a multiple

_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_TABLE = re.compile(r"(embed_tokens|lm_head)\.weight")


class Piece(NamedTuple):
    """`shape` numbers of the flattened parameter `name` from `start` on; `key` names them in checkpoints."""

    key: str
    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def pieces(name: str, shape: Sequence[int], first_expert: int = 0) -> list[Piece]:
    """The pieces of a parameter, in order; together they are the whole of it.

    Experts [E, 2F, D] and [E, D, F]: `NAME.experts.<e>.gate_proj` and `.up_proj` [F, D], `.down_proj` [D, F],
    numbered from `first_expert`. Tables [V, D]: `NAME.rows.<i>`, gcd(V, 64) equal blocks of rows.
    Everything else is one piece with the parameter's own name.
    """
    if experts := _EXPERTS.fullmatch(name):
        parts = ("gate_proj", "up_proj") if experts[2] == "gate_up_proj" else ("down_proj",)
        numbers = range(first_expert, first_expert + shape[0])
        keys = [f"{experts[1]}.{number}.{part}" for number in numbers for part in parts]
        return _equal_pieces(name, keys, (shape[1] // len(parts), shape[2]))
    if _TABLE.fullmatch(name) and (blocks := math.gcd(shape[0], TABLE_BLOCKS)) > 1:
        keys = [f"{name}.rows.{block}" for block in range(blocks)]
        return _equal_pieces(name, keys, (shape[0] // blocks, shape[1]))
    return [Piece(name, name, 0, tuple(shape))]


def _equal_pieces(name: str, keys: list[str], shape: tuple[int, ...]) -> list[Piece]:
    return [Piece(key, name, i * math.prod(shape), shape) for i, key in enumerate(keys)]


class View(NamedTuple):
    """Where a piece lies: from `start` on in the flattened `params[param]` of its group.

    `rows` are those of the logically independent matrices that Muon orthogonalises one by one.
    """

    piece: Piece
    param: int
    start: int
    rows: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The piece's part of tensors that are shaped like the group's `params`; shares their memory."""
        flat = tensors[self.param].view(-1)
        return flat[self.start : self.start + self.piece.numel].view(self.piece.shape)


class Matrices(NamedTuple):
    """Equal matrices [rows, columns], one after another from `start` on in the flattened `params[param]`."""

    param: int
    start: int
    number: int
    rows: int
    columns: int

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """These parts of tensors that are shaped like the group's `params`; they share their memory."""
        end = self.start + self.number * self.rows * self.columns
        return tensors[self.param].view(-1)[self.start : end].view(-1, self.rows, self.columns).unbind()


def matrices_of(views: Sequence[View]) -> list[Matrices]:
    """The independent matrices of pieces, in order, as few runs of equal ones: a view costs as much as the
    launch of a kernel."""
    found: list[Matrices] = []
    for view in views:
        start, columns = view.start, view.piece.shape[-1]
        for rows in view.rows * (view.piece.numel // (sum(view.rows) * columns)):
            run = found[-1] if found else None
            if run and run[:2] + run[3:] == (view.param, start - run.number * rows * columns, rows, columns):
                found[-1] = run._replace(number=run.number + 1)
            else:
                found.append(Matrices(view.param, start, 1, rows, columns))
            start += rows * columns
    return found


def is_expert(name: str) -> bool:
    """Whether the parameter of this full name is a stack of routed experts."""
    return bool(_EXPERTS.fullmatch(name))


def whole_views(group: dict[str, Any], first_expert: int = 0) -> list[View]:
    """The views of a group (`optim.groups.build_groups`) whose params are whole parameters, or stacks of
    experts numbered from `first_expert`."""
    blocks = group.get("blocks", [()] * len(group["params"]))
    views = []
    for index, (name, parameter, rows) in enumerate(
        zip(group["names"], group["params"], blocks, strict=True)
    ):
        parts = pieces(name, parameter.shape, first_expert)
        for piece in parts:
            own_rows = rows if len(parts) == 1 else piece.shape[:1]
            views.append(View(piece, index, piece.start, own_rows))
    return views


class Layout(NamedTuple):
    """A group in one flat buffer of `ranks` equal partitions, none of which cuts a piece.

    order   what stands in the buffer: indices of parameters, and lengths of filler as negative numbers
    size    numbers in one partition
    views   per rank, its pieces with places in its partition
    """

    order: list[int]
    size: int
    views: list[list[View]]

    @property
    def filler(self) -> int:
        return -sum(item for item in self.order if item < 0)


def lay_out(views: Sequence[View], ranks: int) -> Layout:
    """Lay the pieces of a group out over `ranks` partitions of one even size.

    Parameters of equal pieces (stacks of experts, tables) stand one after the other, and borders fall between
    pieces, so that only the end is filled. Other parameters stay whole: the largest first, each to the rank
    with the least so far (longest processing time first), every rank filled up to the fullest.
    """
    per_parameter: dict[int, list[View]] = {}
    for view in views:
        per_parameter.setdefault(view.param, []).append(view)
    equal = len({view.piece.numel for view in views}) == 1
    bins = _runs(list(views), ranks) if equal else _knapsack(list(per_parameter.values()), ranks)
    size = max(sum(view.piece.numel for view in own) for own in bins)
    size += size % 2  # DeepSpeed aligns partitions to two numbers
    return _placed(bins, size, Counter(view.param for view in views))


def _runs(views: list[View], ranks: int) -> list[list[View]]:
    """Equal pieces in order, as many to every rank; an even number where pieces are odd."""
    each = -(-len(views) // ranks)
    each += each * views[0].piece.numel % 2
    return [views[rank * each : (rank + 1) * each] for rank in range(ranks)]


def _knapsack(parameters: list[list[View]], ranks: int) -> list[list[View]]:
    bins: list[list[View]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap: the lightest first
    sizes = [sum(view.piece.numel for view in parameter) for parameter in parameters]
    for number in sorted(range(len(parameters)), key=lambda i: -sizes[i]):
        load, lightest = loads[0]
        bins[lightest] += parameters[number]
        heapq.heapreplace(loads, (load + sizes[number], lightest))
    return bins


def _placed(bins: list[list[View]], size: int, parts: Counter[int]) -> Layout:
    order: list[int] = []
    placed: list[list[View]] = []
    seen: Counter[int] = Counter()
    for own in bins:
        start, mine = 0, []
        for view in own:
            mine.append(view._replace(param=0, start=start))
            start += view.piece.numel
            if not seen[view.param]:
                order.append(view.param)
            seen[view.param] += 1
        placed.append(mine)
        if start < size:
            assert not own or seen[own[-1].param] == parts[own[-1].param], "filler inside a parameter"
            order.append(start - size)
    return Layout(order, size, placed)
