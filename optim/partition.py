"""How parameters are cut into pieces that never part, and how pieces are laid out over ranks.

A piece is the unit of ownership (one rank updates it) and of checkpoints (one key, whatever the number of
ranks): one expert's matrix, a block of rows of a vocabulary table, or a whole parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

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
