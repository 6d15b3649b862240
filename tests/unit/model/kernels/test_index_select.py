"""The indexer's scores and selection: indices beside masks, and kernels beside fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.kernels import index_select as kernels
from model.kernels.index_select import write_best, write_scores
from model.kernels.indexer import index_scores, keep_best, mask_of, select_indices
from tests.unit.model.kernels.cases import DEVICES, operand_dtype, packed_layout

# Documents of one token, without an entry, of few and of many; odd lengths; a row without any entry.
BATCHES = [([[1, 3, 17, 2, 40], [61, 3]], 73), ([[20, 1], [3]], 22), ([[90], [50, 39]], 90), ([[4]], 4)]


def spans(rows: list[list[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """first, end [B, S] int32 and the mask [B, S, T] of what queries see."""
    slots = packed_layout("c", rows, length).slots["compressed_sparse_attention"]
    return slots.first.int(), slots.end.int(), slots.visible()


def exact_operands(length: int, slots: int, heads: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, weights of two rows whose scores are integers of few values, so that most choices are ties."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randint(-1, 2, (2, length, heads, channels), generator=generator).float()
    k = torch.randint(-1, 2, (2, slots, channels), generator=generator).float()
    keep = torch.rand(2, length, heads, 1, generator=generator) < 0.1
    return q * keep, k, torch.randint(-2, 3, (2, length, heads), generator=generator).float()


@pytest.mark.parametrize("topk", [1, 3, 8, 100])
@pytest.mark.parametrize(("rows", "length"), BATCHES)
def test_indices_are_those_of_the_mask(rows: list[list[int]], length: int, topk: int) -> None:
    """In ascending order, -1 after them; also where there is nothing to choose and nothing to see."""
    first, end, visible = spans(rows, length)
    slots = visible.shape[2]
    q, k, weights = (x[: len(rows)] for x in exact_operands(length, slots, 4, 8))
    indices = select_indices(q, k, weights, first, end, topk)
    wanted = keep_best(index_scores(q, k, weights), visible, topk)
    assert indices.dtype == torch.int32 and indices.shape == (*q.shape[:2], min(topk, slots))
    assert torch.equal(mask_of(indices, slots), wanted)
    for found, mask in zip(indices.flatten(0, 1), wanted.flatten(0, 1), strict=True):
        kept = mask.nonzero().flatten().tolist()
        assert found.tolist() == kept + [-1] * (len(found) - len(kept))


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        q, k, weights = torch.empty(2, 9, 16, 32), torch.empty(2, 7, 32), torch.empty(2, 9, 16)
        span = torch.empty(2, 9, dtype=torch.int32)
        for topk in (3, 20):
            found = torch.ops.fourfold.index_select(q, k, weights, span, span, topk, torch.bfloat16)
            assert found.shape == (2, 9, min(topk, 7)) and found.dtype == torch.int32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranked_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "topk"), [(1, 1), (5, 4), (100, 7), (700, 512)])
def test_best_of_equal_scores(slots: int, topk: int, ranked_in: torch.dtype, device: str) -> None:
    """Ties, zeros of both signs, infinity, denormals; every span; nothing outside of it is looked at."""
    generator = torch.Generator().manual_seed(slots)
    scores = torch.randn(2, 12, slots, generator=generator)
    scores[:, 1::2] = torch.randint(-2, 3, (2, 6, slots), generator=generator).float()
    scores[:, 2] = torch.where(torch.rand(slots, generator=generator) < 0.5, 0.0, -0.0)
    scores[:, 4, ::3], scores[:, 4, 1::3], scores[:, 6] = float("inf"), -1e38, scores[:, 6] * 1e-41
    first = torch.randint(0, slots, (2, 12), generator=generator, dtype=torch.int32)
    first[:, :8] = 0
    end = torch.full_like(first, slots)
    end[:, 5] = end[:, 11] = first[:, 11]
    slot = torch.arange(slots)
    visible = (slot >= first.unsqueeze(-1)) & (slot < end.unsqueeze(-1))
    scores = scores.to(ranked_in)
    wanted = torch.where(keep_best(scores, visible, topk), slot, slots).sort(-1).values[..., :topk]
    wanted = torch.where(wanted < slots, wanted, -1)
    wanted[:, 0] = -1  # from the second query on
    given = scores.masked_fill(~visible, float("nan"))[:, 1:].contiguous()
    indices = torch.full((2, 12, topk), -1, dtype=torch.int32, device=device)
    write_best(indices, 1, given.to(device), first.to(device), end.to(device))
    assert torch.equal(indices.cpu(), wanted.int())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "length"), BATCHES)
def test_scores(rows: list[list[int]], length: int, device: str) -> None:
    """As near to fp64 as the reference; from any query on, of those that see more than so many."""
    first, end, visible = spans(rows, length)
    generator, dtype = torch.Generator().manual_seed(0), operand_dtype(device)
    q = 30 * torch.randn(len(rows), length, 16, 32, generator=generator)
    k, weights = torch.randn(len(rows), visible.shape[2], 32, generator=generator), q[..., 0].clone()
    q, k, weights = q.to(dtype), k.to(dtype), weights.to(dtype)
    exact = index_scores(q.double(), k.double(), weights.double())
    start, more_than = length // 3, 1
    scores = torch.full_like(exact[:, start:], torch.nan, dtype=torch.float32, device=device)
    operands = (x.to(device) for x in (q, k, weights, first, end))
    write_scores(scores, *operands, start=start, more_than=more_than)
    needed = (visible & (visible.sum(-1, keepdim=True) > more_than))[:, start:]
    ours, wanted = scores.cpu()[needed].double(), exact[:, start:][needed]
    reference = index_scores(q, k, weights)[:, start:][needed].double()
    assert (ours - wanted).norm() <= (reference - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.gpu
def test_sizes_of_v4() -> None:
    first, end, visible = (x.cuda() for x in spans([[500, 1, 522], [1023]], 1023))
    q, k, weights = (x.cuda() for x in exact_operands(1023, visible.shape[2], 64, 128))
    for ranked_in in (torch.float32, torch.bfloat16):
        wanted = select_indices(q, k, weights, first, end, 100, ranked_in)  # in fp32 by the reference
        found = select_indices(q.bfloat16(), k.bfloat16(), weights.bfloat16(), first, end, 100, ranked_in)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 1 << 26])
@pytest.mark.parametrize("topk", [1, 6])
def test_selection(topk: int, at_once: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entries as the reference's, in chunks of queries or not."""
    first, end, visible = spans([[1, 3, 11, 2, 30], [41, 3]], 49)
    q, k, weights = exact_operands(49, visible.shape[2], 16, 32)
    wanted = select_indices(q, k, weights, first, end, topk)
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", at_once * 2 * visible.shape[2] * 17)
    dtype = operand_dtype(device)
    operands = (x.to(device) for x in (q.to(dtype), k.to(dtype), weights.to(dtype), first, end))
    found = torch.ops.fourfold.index_select(*operands, topk, torch.float32)
    assert torch.equal(found.cpu(), wanted)
