"""Positions, windows and slots of packed rows, against loops over tokens."""

from __future__ import annotations

import random

import pytest
import torch

from model.layout import Layout, build_layout, positions_from_documents
from model.rope import inverse_frequencies
from tests.tiny import documents, packed_batch, tiny_config
from train.parallel.context import SequenceParts
from train.parallel.mesh import Mesh

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


def random_rows(seed: int) -> tuple[list[list[int]], int]:
    """Documents of 1 to 9, of about 128 and of longer lengths, and a row length that leaves some padding."""
    pick = random.Random(seed)
    rows = [[pick.choice([1, 2, 3, 4, 5, 8, 9, 127, 128, 129, 256, 260]) for _ in range(9)] for _ in range(2)]
    return rows, max(map(sum, rows)) + pick.randrange(6)


@pytest.mark.parametrize("seed", range(5))
def test_layout(seed: int) -> None:
    rows, length = random_rows(seed)
    batch = packed_batch(rows, length)
    layout = build_layout(tiny_config("sch"), batch["position_ids"], batch["document_ids"])
    assert torch.equal(layout.positions, batch["position_ids"])
    assert torch.equal(layout.real, batch["document_ids"] >= 0)
    for b, start, size, _ in documents(rows):
        assert (layout.last[b, start : start + size] == start + size - 1).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "rate"), [(CSA, 4), (HCA, 128)])
def test_slots(seed: int, kind: str, rate: int) -> None:
    rows, length = random_rows(seed)
    batch = packed_batch(rows, length)
    config = tiny_config("sch")
    slots = build_layout(config, batch["position_ids"], batch["document_ids"]).slots[kind]
    assert slots.tokens.shape == (2, length // rate, rate)  # whatever the documents are
    assert int(slots.tokens.min()) >= 0 and int(slots.tokens.max()) < length
    frequencies = inverse_frequencies(config.rope_parameters["compress"], config.qk_rope_head_dim)
    visible, used = slots.visible(), [0, 0]
    expected = torch.zeros_like(visible)
    for b, start, size, _ in documents(rows):
        for window in range(size // rate):
            slot, first = used[b], start + window * rate
            assert slots.tokens[b, slot].tolist() == list(range(first, first + rate))
            assert bool(slots.chained[b, slot]) == (window > 0)
            angle = window * rate * frequencies
            assert torch.allclose(slots.rotation[0][b, slot], angle.cos())
            assert torch.allclose(slots.rotation[1][b, slot], angle.sin())
            expected[b, first + rate - 1 : start + size, slot] = True  # complete at its own last token
            used[b] += 1
    real = batch["document_ids"] >= 0
    assert torch.equal(visible[real], expected[real])
    for b in range(2):
        assert not (visible[b][~real[b]] & expected[b].any(0)).any()  # padding sees no document


def test_without_documents_a_row_is_one() -> None:
    layout = build_layout(tiny_config("sch"), torch.arange(10).expand(2, -1))
    assert layout.real.all() and (layout.last == 9).all()
    assert layout.slots[CSA].visible()[0].int().sum(-1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert layout.slots[HCA].visible().shape == (2, 10, 0)


def test_only_the_slots_in_use_are_built() -> None:
    assert set(build_layout(tiny_config("ss"), torch.arange(9).unsqueeze(0)).slots) == set()
    assert set(build_layout(tiny_config("sc"), torch.arange(9).unsqueeze(0)).slots) == {CSA}


def test_positions_from_documents() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [5, 3, 3, 3, 0, -1, -1, -1]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 0, 0, 1, 2]]
    assert positions_from_documents(ids).tolist() == expected


RATES = {CSA: 4, HCA: 16}
CUT = 192  # tokens of a row that is cut: HCA's rate divides no part of 8


def cut_rows(seed: int) -> list[list[int]]:
    """One document; one over all borders between short ones; documents that end at borders; random ones."""
    pick = random.Random(seed)
    sizes: list[int] = []
    while (room := CUT - sum(sizes) - pick.randrange(9)) > 0:
        sizes.append(min(pick.choice([1, 1, 2, 3, 4, 5, 15, 16, 17, 33, 100]), room))
    return [[CUT], [1, 1, CUT - 5, 1], [48, 47, 1, 49], sizes]


def parts_of(seed: int, size: int) -> tuple[Layout, list[Layout]]:
    """The layout of whole rows, and those of their parts."""
    config = tiny_config("sch", compress_rates=RATES)
    batch = packed_batch(cut_rows(seed), CUT)
    contexts = [SequenceParts(Mesh(rank=rank, world=size, cp_size=size)) for rank in range(size)]
    arguments = (config, batch["position_ids"], batch["document_ids"])
    return build_layout(*arguments), [build_layout(*arguments, context) for context in contexts]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_parts_are_what_whole_rows_are(seed: int, size: int) -> None:
    whole, parts = parts_of(seed, size)
    for name in ("positions", "real", "first", "last"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name)), name
    for kind, (cos, _) in whole.rotations.items():
        assert torch.equal(torch.cat([part.rotations[kind][0] for part in parts], 1), cos)
    for kind, slots in whole.slots.items():
        visible = torch.cat([part.slots[kind].visible() for part in parts], 1)
        assert torch.equal(visible, slots.visible())


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [CSA, HCA])
def test_parts_make_every_entry(seed: int, size: int, kind: str) -> None:
    """Each from its own tokens, with its predecessor's a slot before where it has one."""
    whole, parts = parts_of(seed, size)
    wanted, each = whole.slots[kind], [part.slots[kind] for part in parts]
    here, rate = CUT // size, RATES[kind]
    own = [s.tokens[:, s.lead :] + rank * here - s.halo for rank, s in enumerate(each)]  # numbered in rows
    count = -(-here // rate)
    assert [tokens.shape[1] for tokens in own] == [count] * size  # whatever the documents are
    made = wanted.visible().any(1)  # [B, T]
    order = each[0].order
    assert all(torch.equal(s.order, order) for s in each)
    assert int(order.min()) >= 0 and int(order.max()) < size * count

    def gathered(xs: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(xs, dim=1)
        return joined[torch.arange(len(joined)).unsqueeze(1), order]

    assert torch.equal(gathered(own)[made], wanted.tokens[made])
    cos = gathered([s.rotation[0] for s in each])
    assert torch.equal(cos[made], wanted.rotation[0][made])
    chained = gathered([s.chained[:, s.lead :] for s in each])
    assert torch.equal(chained[made], wanted.chained[made])
    for s in each:
        assert int(s.tokens.min()) >= 0 and int(s.tokens.max()) < s.halo + here
    if kind == CSA:
        before = gathered([s.tokens[:, :-1] + rank * here - s.halo for rank, s in enumerate(each)])
        assert torch.equal((before + rate)[made & chained], wanted.tokens[made & chained])
