"""A document packed into a row gets exactly what it gets alone: logits, gradients, losses, nothing leaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention import AttentionMode
from model.layout import build_layout
from model.model import ForCausalLM
from model.moe import Routing, balance_loss
from tests.tiny import FLASH, documents, packed_batch, relative, tiny_config, tiny_model

ROWS = [[5, 1, 2, 3, 4, 127, 128, 129, 1, 30], [261, 3, 8, 132, 5]]
SHORT = [[3, 1, 130, 40, 4], [131, 2, 33, 7]]  # padded to another length
CASES = [
    (layers, mode, ROWS, 440)
    for layers, mode in (("s", "sparse"), ("h", "sparse"), ("c", "sparse"), ("c", "dense"))
] + [(FLASH, "sparse", SHORT, 182), (FLASH, "dense", SHORT, 182), ("fs", "sparse", SHORT, 182)]


def alone(batch: dict[str, Tensor], b: int, start: int, size: int) -> dict[str, Tensor]:
    """One document as a batch of its own, without positions or documents."""
    return {key: batch[key][b : b + 1, start : start + size] for key in ("input_ids", "labels", "next_ids")}


def compare_with_alone(
    model: ForCausalLM, rows: list[list[int]], length: int, mode: AttentionMode, tolerance: float
) -> None:
    batch = packed_batch(rows, length, depth=len(model.mtp))
    out = model(**batch, mode=mode, return_logits=True)
    total = sum(out.losses[part][0] for part in out.losses)
    total.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sums = dict.fromkeys(out.losses, 0.0)
    counts = dict.fromkeys(out.losses, 0)
    for b, start, size, _ in documents(rows):
        single = model(**alone(batch, b, start, size), mode=mode, return_logits=True)
        assert relative(out.logits[b, start : start + size], single.logits[0]) <= tolerance, (b, start, size)
        sum(single.losses[part][0] for part in single.losses).backward()
        for part, (loss, count) in single.losses.items():
            sums[part] += loss.item()
            counts[part] += int(count)
    for part, (loss, count) in out.losses.items():
        assert loss.item() == pytest.approx(sums[part], rel=tolerance)
        assert int(count) == counts[part]
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in packed
            continue
        assert relative(packed[name], parameter.grad) <= tolerance, name


@pytest.mark.parametrize(("layers", "mode", "rows", "length"), CASES)
def test_packed_is_alone(layers: str, mode: AttentionMode, rows: list[list[int]], length: int) -> None:
    """In fp64, so that a wrong token anywhere shows."""
    compare_with_alone(tiny_model(tiny_config(layers)).double(), rows, length, mode, 1e-10)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_packed_is_alone_in_fp32_with_mtp(mode: AttentionMode) -> None:
    """Logits and losses in the precision that is trained."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=2))
    rows, length = SHORT, 182
    batch = packed_batch(rows, length, depth=2)
    out = model(**batch, mode=mode, return_logits=True)
    sums = dict.fromkeys(out.losses, 0.0)
    for b, start, size, _ in documents(rows):
        single = model(**alone(batch, b, start, size), mode=mode, return_logits=True)
        assert relative(out.logits[b, start : start + size], single.logits[0]) <= 1e-5, (b, start, size)
        for part, (loss, _) in single.losses.items():
            sums[part] += loss.item()
    for part, (loss, _) in out.losses.items():
        assert loss.item() == pytest.approx(sums[part], rel=1e-5)


def test_packed_gradients_with_mtp() -> None:
    compare_with_alone(
        tiny_model(tiny_config("ch", num_nextn_predict_layers=2)).double(), SHORT, 182, "sparse", 1e-10
    )


def test_positions_are_derived_from_documents() -> None:
    model = tiny_model(tiny_config("sch"))
    batch = packed_batch(SHORT, 182)
    given = model(batch["input_ids"], None, batch["position_ids"], batch["document_ids"]).logits
    assert torch.equal(given, model(batch["input_ids"], document_ids=batch["document_ids"]).logits)
    assert torch.equal(given, model(batch["input_ids"], position_ids=batch["position_ids"]).logits)
    assert not torch.allclose(given, model(batch["input_ids"]).logits)  # one document


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_nothing_leaks(mode: AttentionMode) -> None:
    """Other tokens in one document leave all others alone, and earlier tokens of its own."""
    model = tiny_model(tiny_config("sch"))
    batch = packed_batch(SHORT, 182)
    before = model(**batch, mode=mode, return_logits=True).logits
    for b, start, size, _ in documents(SHORT):
        changed = batch["input_ids"].clone()
        middle = start + size // 2
        changed[b, middle : start + size] = 95 - changed[b, middle : start + size]
        after = model(**{**batch, "input_ids": changed}, mode=mode, return_logits=True).logits
        others = torch.ones_like(changed, dtype=torch.bool)
        others[b, middle : start + size] = False
        assert relative(after[others], before[others]) <= 1e-6
        assert (after - before)[~others].abs().amax(-1).min() > 1e-3


def test_padding_reaches_nothing() -> None:
    """What stands in the padding changes no loss and gets no gradient."""
    model = tiny_model(tiny_config("sch", hash_layers=0, num_nextn_predict_layers=1)).double()
    batch = packed_batch([[3, 40], [6]], 60, depth=1)
    losses = model(**batch).losses
    batch["input_ids"] = torch.where(batch["document_ids"] < 0, 77, batch["input_ids"])
    batch["position_ids"] = torch.where(batch["document_ids"] < 0, 0, batch["position_ids"])
    again = model(**batch).losses
    for part in losses:
        assert again[part][0].item() == pytest.approx(losses[part][0].item(), rel=1e-12)
        assert again[part][1] == losses[part][1]
    real = batch["document_ids"] >= 0
    batch["input_ids"] = torch.where(real, batch["input_ids"].clamp(max=76), 77)
    sum(loss for loss, _ in model(**batch).losses.values()).backward()
    gradient = model.embed_tokens.weight.grad
    assert gradient is not None and not gradient[77].any()
    assert gradient[batch["input_ids"][real]].any(-1).all()


def test_balance_loss_of_each_document() -> None:
    """Against the definition (V3 report, eqs. 17-20), document by document, gradient included."""
    rows, length, experts, k = [[5, 1, 12], [17, 2]], 22, 8, 3
    batch = packed_batch(rows, length)
    layout = build_layout(tiny_config(), batch["position_ids"], batch["document_ids"])
    generator = torch.Generator().manual_seed(1)
    affinities = torch.rand(2 * length, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(2 * length, experts, generator=generator).topk(k).indices
    routing = Routing(affinities, indices, affinities.gather(1, indices))
    expected = torch.zeros((), dtype=torch.float64)
    for b, start, size, _ in documents(rows):
        tokens = range(b * length + start, b * length + start + size)
        for expert in range(experts):
            chosen = sum(int(expert in indices[t]) for t in tokens)
            frequency = experts / (k * size) * chosen
            share = sum(affinities[t, expert] / affinities[t].sum() for t in tokens) / size
            expected = expected + size * frequency * share
    found = balance_loss(routing, layout)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # the frequencies are fp32
    (ours,) = torch.autograd.grad(found, affinities)
    (wanted,) = torch.autograd.grad(expected, affinities)
    assert relative(ours, wanted) <= 1e-6
    assert int(layout.real.sum()) == sum(map(sum, rows))


def test_balance_loss_is_one_when_even() -> None:
    """Every expert chosen alike and equally likely: the lowest value, 1 per token."""
    layout = build_layout(tiny_config(), torch.arange(8).unsqueeze(0))
    indices = torch.tensor([[i, (i + 1) % 8, (i + 2) % 8] for i in range(8)])
    even = Routing(torch.ones(8, 8), indices, torch.ones(8, 3))
    assert balance_loss(even, layout).item() == pytest.approx(8.0)
    skewed = Routing(
        torch.eye(8)[0].expand(8, 8) + 0.1, torch.zeros_like(indices) + torch.arange(3), even.weights
    )
    assert balance_loss(skewed, layout).item() > 12


def test_model_sums_the_balance_of_learned_routers_only() -> None:
    """Two top-k layers and MTP's count, the hash layer does not."""
    model = tiny_model(tiny_config("ssh", hash_layers=1, num_nextn_predict_layers=1))
    batch = packed_batch([[9, 20]], 32, depth=1)
    routings: list[Routing] = []
    for moe in model.moes():
        moe.gate.register_forward_hook(lambda module, args, out: routings.append(out))
    out = model(**batch)
    layout = build_layout(model.config, batch["position_ids"], batch["document_ids"])
    each = [balance_loss(routing, layout).item() for routing in routings]
    assert len(each) == 4
    assert out.losses["balance"][0].item() == pytest.approx(sum(each[1:]), rel=1e-6)
    assert out.losses["balance"][1].item() == 29
