"""Pieces cover their parameter, and no partition cuts one, whatever the number of ranks."""

from __future__ import annotations

from math import prod

import pytest
import torch

from optim.partition import View, lay_out, matrices_of, pieces, whole_views

Shapes = dict[str, tuple[int, ...]]
EXPERTS: Shapes = {
    "layers.0.mlp.experts.gate_up_proj": (4, 6, 5),
    "layers.0.mlp.experts.down_proj": (4, 5, 3),
}
TABLES: Shapes = {"embed_tokens.weight": (96, 4), "lm_head.weight": (96, 4)}
WHOLE: Shapes = {
    "norm.weight": (7,),
    "layers.0.self_attn.sinks": (3,),
    "mtp.0.e_proj.weight": (9, 4),
    "a": (2, 5),
}


def views_of(shapes: Shapes) -> tuple[list[torch.Tensor], list[View]]:
    """Parameters with numbers that occur once, and their views."""
    first, params = 0, []
    for shape in shapes.values():
        params.append(torch.arange(first, first + prod(shape)).float().view(shape))
        first += prod(shape)
    return params, whole_views({"params": params, "names": list(shapes)})


def test_experts_are_cut_into_their_matrices() -> None:
    name = "layers.0.mlp.experts.gate_up_proj"
    stack = torch.randn(4, 6, 5)
    found = pieces(name, stack.shape, first_expert=8)
    assert [piece.key for piece in found[:3]] == [
        f"layers.0.mlp.experts.{part}" for part in ("8.gate_proj", "8.up_proj", "9.gate_proj")
    ]
    for number, piece in enumerate(found):
        expert, is_up = divmod(number, 2)
        cut = stack.flatten()[piece.start : piece.start + piece.numel].view(piece.shape)
        assert torch.equal(cut, stack[expert, 3 * is_up : 3 * is_up + 3])


@pytest.mark.parametrize(("rows", "blocks"), [(96, 32), (129_280, 64), (97, 1)])
def test_tables_are_cut_into_equal_blocks_of_rows(rows: int, blocks: int) -> None:
    found = pieces("embed_tokens.weight", (rows, 4))
    assert len(found) == blocks and {piece.shape for piece in found} == {(rows // blocks, 4)}
    assert [piece.start for piece in found] == [i * rows // blocks * 4 for i in range(blocks)]


@pytest.mark.parametrize("shapes", [EXPERTS, TABLES, WHOLE], ids=["experts", "tables", "whole"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 100])
def test_partitions_hold_every_piece_once_and_whole(shapes: Shapes, ranks: int) -> None:
    params, views = views_of(shapes)
    layout = lay_out(views, ranks)
    buffer = torch.cat([torch.full((-i,), -1.0) if i < 0 else params[i].flatten() for i in layout.order])
    assert len(buffer) == ranks * layout.size and layout.size % 2 == 0
    assert len(layout.views) == ranks
    where = {view.piece.key: view for view in views}
    for partition, own in zip(buffer.split(layout.size), layout.views, strict=True):
        for view in own:
            assert torch.equal(view.of([partition]), where.pop(view.piece.key).of(params))
    assert not where
    assert int((buffer < 0).sum()) == layout.filler


def test_work_is_balanced() -> None:
    _, views = views_of({f"p{i}": (i + 1, 10) for i in range(20)})
    layout = lay_out(views, 4)
    assert layout.filler <= 0.1 * 4 * layout.size
    _, stack = views_of(EXPERTS)  # 12 matrices of 15: 4 ranks have 4, 4, 4, 0, since an odd number is filled
    assert [len(own) for own in lay_out(stack, 4).views] == [4, 4, 4, 0]
    assert [len(own) for own in lay_out(stack, 2).views] == [6, 6]


def test_matrices_are_what_the_views_say() -> None:
    """Blocks of rows, of whatever sizes, in order and sharing memory; equal neighbours are one run."""
    names, shapes = ["layers.0.mlp.experts.gate_up_proj", "a", "b"], [(3, 8, 5), (9, 4), (6, 2)]
    params = [torch.arange(float(prod(shape))).view(shape) for shape in shapes]
    group = {"names": names, "params": params, "blocks": [(), (2, 2, 5), (3, 3)]}
    views = whole_views(group)
    wanted = [block for view in views for block in view.of(params).split(view.rows)]
    runs = matrices_of(views)
    assert [run.number for run in runs] == [6, 2, 1, 2]
    found = [matrix for run in runs for matrix in run.of(params)]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert matrices_of([view._replace(start=view.start + 7) for view in views[:1]])[0].start == 7
    assert len(matrices_of([views[0], views[2]])) == 2  # not neighbours
    found[-1].zero_()
    assert not params[2][3:].any()
