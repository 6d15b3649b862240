"""The indexer's loss against loops over the equations, value and gradient; what it moves; that it teaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import model.kernels.attention
import model.kernels.indexer
from model.attention import AttentionMode
from model.kernels.indexer import index_loss
from model.layout import Layout, build_layout, entry_readers
from model.precision import Precision
from optim.config import OptimConfig
from tests.tiny import documents, packed_batch, relative, tiny_config, tiny_model
from tests.unit.model import naive
from train.engine import TorchEngine
from train.evaluate import evaluate

# Documents without an entry, with few, with more than top-k; padding; 73 is no multiple of the rate.
ROWS, LENGTH = [[1, 3, 17, 2, 40], [61, 3]], 73
MODES: tuple[AttentionMode, ...] = ("sparse", "dense", "warmup")


def attention_of(rows: list[list[int]], length: int, **changes: Any) -> tuple[Any, Layout, Tensor]:
    """A CSA layer's attention in fp64, the layout of a batch, and inputs x."""
    config = tiny_config("c", 0, **changes)
    attention = tiny_model(config).double().get_submodule("layers.0.self_attn")
    batch = packed_batch(rows, length)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(rows), length, config.hidden_size, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    return attention, build_layout(config, batch["position_ids"], batch["document_ids"]), x


@pytest.mark.parametrize("slots", [5, 6, 7, 8])
def test_no_more_than_topk_are_selected(slots: int) -> None:
    """Where there are as many slots, or fewer, all that are visible: nothing is compared."""
    attention, layout, x = attention_of([[4 * slots]], 4 * slots, index_topk=6)
    _, seen, _ = attention._far(x, x[..., : attention.q_a_proj.weight.shape[0]], x, layout, "sparse")
    assert (seen.chosen is None) == (slots <= 6)
    assert torch.equal(
        seen.mask(slots).sum(-1), layout.slots[attention.layer_type].visible().sum(-1).clamp(max=6)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rows", "length", "topk"), [(ROWS, LENGTH, 6), (ROWS, LENGTH, 1), ([[20, 1], [3]], 22, 6), ([[3]], 3, 6)]
)
def test_loss_and_gradients_are_those_of_loops(
    mode: AttentionMode, rows: list[list[int]], length: int, topk: int
) -> None:
    """Nothing but the indexer gets a gradient, and all of it does."""
    attention, layout, x = attention_of(rows, length, index_topk=topk)
    config, weights = tiny_config("c", 0, index_topk=topk), dict(attention.named_parameters())
    _, loss = attention(x, layout, mode, indexer_loss=True)
    wanted, queries = torch.zeros((), dtype=torch.float64), 0
    for b, start, size, _ in documents(rows):
        document = x[b, start : start + size].detach()
        part, count = naive.indexer_loss(weights, config, document, mode == "sparse")
        wanted, queries = wanted + part, queries + count
    assert queries == entry_readers(config, layout.positions, layout.real)
    if not queries:
        assert loss == 0
        return
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)  # rotations are fp32
    own = {name: p for name, p in weights.items() if name.startswith("indexer.")}
    expected = dict(zip(own, torch.autograd.grad(wanted, list(own.values()), allow_unused=True), strict=True))
    loss.backward()
    assert x.grad is None and all(p.grad is None for name, p in weights.items() if name not in own)
    assert len(own) == 6
    for name, p in own.items():
        assert expected[name] is not None and (expected[name].any() or topk == 1), name
        assert (p.grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_selecting_all_is_dense() -> None:
    attention, layout, x = attention_of(ROWS, LENGTH, index_topk=LENGTH // 4)
    losses = [attention(x, layout, mode, indexer_loss=True)[1] for mode in MODES]
    assert losses[0] == losses[1] == losses[2] > 0


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("budget", [1, 20_000])
def test_chunks_change_nothing(mode: AttentionMode, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries in the loss, and of blocks in attention, whose mass it takes; backward recomputes both."""
    found = []
    for budgets in (1 << 26, budget):
        monkeypatch.setattr(model.kernels.indexer, "SCORE_BUDGET", budgets)
        monkeypatch.setattr(model.kernels.attention, "LOGIT_BUDGET", budgets)
        torch.manual_seed(0)
        attention, layout, x = attention_of(ROWS, LENGTH)
        out, loss = attention(x, layout, mode, indexer_loss=True)
        (out.sum() + loss).backward()
        found.append([loss.detach(), out.detach(), x.grad, *(p.grad for p in attention.parameters())])
    assert all(relative(ours, wanted) < 1e-13 for ours, wanted in zip(*found, strict=True))


def test_a_query_without_mass_teaches_nothing() -> None:
    """A sink or a window can take all of it, as far as fp32 goes; padding counts nothing whatever it sees."""
    q, k, weights = torch.randn(1, 3, 2, 4), torch.randn(1, 5, 4), torch.randn(1, 3, 2)
    for x in (q, k, weights):
        x.requires_grad_()
    attended = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]]).bool()
    mass = torch.rand(1, 3, 5) * attended
    mass[0, 0] = 0
    loss = index_loss(q, k, weights, mass, attended, torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in (q, k, weights) if x.grad is not None)
    assert index_loss(q, k, weights, mass, attended, torch.ones(1, 3).bool()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp4(dtype: torch.dtype) -> None:
    """Scores of the rounded queries and keys, in fp32; gradients go straight through to all parameters."""
    net = tiny_model(tiny_config("c", 0)).cast(dtype).use(Precision(fp4_indexer=True))
    attention: Any = net.get_submodule("layers.0.self_attn")
    batch = packed_batch(ROWS, LENGTH)
    layout = build_layout(net.config, batch["position_ids"], batch["document_ids"])
    x = torch.randn(2, LENGTH, 32).to(dtype)
    seen: list[tuple[Tensor, ...]] = []
    loss_of = attention.indexer.loss

    def recorded(compared: tuple[Tensor, ...], *rest: Tensor) -> Tensor:
        seen.append((*compared, *rest))
        return loss_of(compared, *rest)

    attention.indexer.loss = recorded
    _, loss = attention(x, layout, "sparse", indexer_loss=True)
    q, k, weights, mass, attended, real = (t.detach().double() for t in seen[0])
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for rows in (q, k):  # 16 channels share a scale
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        scaled = rows.abs() / 2 ** (largest / 6).log2().ceil()
        assert torch.isin(scaled, steps).all()
    scores = (torch.einsum("bthc,bsc->bths", q, k).relu() * weights.unsqueeze(-1)).sum(2)
    student = scores.masked_fill(attended == 0, -torch.inf).softmax(-1)
    counted = (real * attended.any(-1)).bool()
    teacher = (mass / mass.sum(-1, keepdim=True))[counted]
    wanted = torch.xlogy(teacher, teacher / student[counted].clamp(min=1e-300)).sum()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    grads = {name: p.grad for name, p in attention.indexer.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", ["sch", "ccs"])
def test_of_a_model(layers: str, mode: AttentionMode) -> None:
    """One part more, with its count; all other losses and gradients bitwise the same."""
    net = tiny_model(tiny_config(layers, num_nextn_predict_layers=1))
    batch = packed_batch([[150, 10], [3, 2]], 160, depth=1)
    found = []
    for asked in (False, True):
        net.zero_grad(set_to_none=True)
        losses = net(**batch, mode=mode, indexer_loss=asked).losses
        torch.stack([loss for loss, _ in losses.values()]).sum().backward()
        found.append((losses, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
    (plain, without), (losses, grads) = found
    count = layers.count("c") * (147 + 7)
    assert losses.keys() - plain.keys() == {"indexer"} and losses["indexer"][1] == count
    assert losses["indexer"][0] > 0
    assert all(losses[part] == plain[part] for part in plain)
    assert grads.keys() - without.keys() == {n for n in grads if ".indexer." in n}
    assert all(torch.equal(grads[name], grad) for name, grad in without.items())
    with torch.no_grad():
        assert net(**batch, mode=mode, indexer_loss=True).losses["indexer"][0] == losses["indexer"][0]


def test_where_there_is_none() -> None:
    batch = packed_batch([[60]], 60)
    assert set(tiny_model(tiny_config("shf"))(**batch, indexer_loss=True).losses) == {"lm", "balance"}
    net = tiny_model(tiny_config("c", 0))
    assert net(batch["input_ids"], indexer_loss=True).losses == {}


def test_a_tiny_indexer_learns() -> None:
    """In a frozen model its divergence falls to a fraction, and it finds most of what there is to find."""
    config = tiny_config("cc", 0, sliding_window=8, index_topk=4, initializer_range=0.1)
    net = tiny_model(config, seed=1)
    engine = TorchEngine(net, OptimConfig(lr=1e-2, warmup_steps=0), torch.float32)
    engine.activate(("indexer",))
    batch = packed_batch([[100], [60, 36]], 100)

    def look() -> tuple[float, float, float]:
        seen = evaluate(engine, [batch], torch.device("cpu"), "dense", indexer_loss=True)
        return seen["indexer"], seen["indexer_recall"], seen["indexer_recall_best"]

    before, recall, best = look()
    for _ in range(60):
        loss, count = engine(batch, mode="warmup", indexer_loss=True).losses["indexer"]
        engine.backward(loss / count)
        engine.step(1e-2)
    after, learned, same = look()
    print(before, after, recall, learned, best)
    assert same == best  # of the attention, which is frozen
    assert after < 0.5 * before
    assert learned - recall > 0.5 * (best - recall)
