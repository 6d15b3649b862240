"""The attention kernel's reference and the indexer's choice, against loops; memory; the dense baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.kernels.attention
import model.kernels.indexer
from model.attention import Attention
from model.init import initialize
from model.kernels.attention import shared_kv_attention
from model.kernels.indexer import index_scores, keep_best, select_entries
from model.layout import build_layout
from model.model import ForCausalLM
from tests.tiny import documents, packed_batch, relative, tiny_config, tiny_model
from tests.unit.model import naive

ROWS = [[1, 5, 17, 2, 12], [30, 3]]
LENGTH = 40


def inputs(entries: int, length: int = LENGTH) -> dict[str, Any]:
    """Random q, kv, entries, sinks in fp64, each query seeing a random half of the entries."""
    generator = torch.Generator().manual_seed(entries)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    batch, heads, channels = len(ROWS), 3, 8
    return {
        "q": random(batch, length, heads, channels),
        "kv": random(batch, length, channels),
        "entries": random(batch, entries, channels) if entries else None,
        "visible": torch.rand(batch, length, entries, generator=generator) < 0.5 if entries else None,
        "sinks": random(heads),
        "positions": packed_batch(ROWS, length)["position_ids"],
    }


def assert_same(ours: Tensor, wanted: Tensor, tensors: dict[str, Any], tolerance: float) -> None:
    """Values, and gradients of a random weighting, of everything that takes one."""
    assert relative(ours, wanted) <= tolerance
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    trained = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    mine = torch.autograd.grad(ours, list(trained.values()), upstream)
    theirs = torch.autograd.grad(wanted, list(trained.values()), upstream)
    for name, a, b in zip(trained, mine, theirs):
        assert relative(a, b) <= tolerance, name


@pytest.mark.parametrize("entries", [0, 1, 7])
@pytest.mark.parametrize("window", [1, 4, 7, 16, 40, 100])
def test_kernel_is_one_softmax_per_token(entries: int, window: int) -> None:
    tensors = inputs(entries)
    ours = shared_kv_attention(**tensors, window=window)
    assert_same(ours, naive.attention(**tensors, window=window), tensors, 1e-12)


def test_kernel_without_window() -> None:
    """Entries only, as the dense baseline uses it; a query that sees nothing gets zero."""
    tensors = inputs(7)
    tensors["visible"][0, :3] = False
    ours = shared_kv_attention(**tensors, window=0)
    assert not ours[0, :3].any()
    assert_same(ours, naive.attention(**tensors, window=0), tensors, 1e-12)


def test_kernel_in_fp32() -> None:
    exact = inputs(7)
    narrow = {n: x.detach().float() if x.is_floating_point() else x for n, x in exact.items()}
    ours = shared_kv_attention(**narrow, window=16)
    assert ours.dtype == torch.float32 and relative(ours, naive.attention(**exact, window=16)) < 1e-6


@pytest.mark.parametrize("budget", [1, 1400])
def test_chunks_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one by one, and three at once with a rest of one; backward recomputes them."""
    tensors = inputs(7)
    whole = shared_kv_attention(**tensors, window=4)
    calls: list[int] = []
    attend = model.kernels.attention._attend
    monkeypatch.setattr(model.kernels.attention, "LOGIT_BUDGET", budget)

    def counted(q: Tensor, *rest: Any) -> Any:
        calls.append(q.shape[1])
        return attend(q, *rest)

    monkeypatch.setattr(model.kernels.attention, "_attend", counted)
    chunked = shared_kv_attention(**tensors, window=4)
    assert len(calls) > 1 and sum(calls) == 10
    assert_same(chunked, whole, tensors, 1e-13)


@pytest.mark.parametrize("k", [1, 3, 6, 9, 20])
def test_keep_best_is_a_stable_sort(k: int) -> None:
    """Few distinct scores, so most choices are ties: the lower index wins."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-1, 3, (2, 50, 9), generator=generator).float()
    visible = torch.rand(2, 50, 9, generator=generator) < 0.7
    visible[0, 0], visible[0, 1] = False, True
    kept = keep_best(scores, visible, k)
    for b in range(2):
        for t in range(50):
            seen = [s for s in range(9) if visible[b, t, s]]
            best = sorted(seen, key=lambda s: (-float(scores[b, t, s]), s))[:k]
            assert kept[b, t].nonzero().flatten().tolist() == sorted(best)


def test_index_scores() -> None:
    """sum_h w_h ReLU(q_h . k), and the same in chunks of queries."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 11, 4, 6, generator=generator), torch.randn(2, 9, 6, generator=generator)
    weights = torch.randn(2, 11, 4, generator=generator)
    scores = index_scores(q, k, weights)
    for b, t, s in [(0, 0, 0), (1, 10, 8), (0, 5, 3)]:
        wanted = sum(weights[b, t, h] * max(0.0, float(q[b, t, h] @ k[b, s])) for h in range(4))
        assert scores[b, t, s] == pytest.approx(float(wanted), abs=1e-5)
    narrow = index_scores(q.bfloat16(), k.bfloat16(), weights.bfloat16())
    assert narrow.dtype == torch.float32 and relative(narrow, scores) < 0.02


@pytest.mark.parametrize("budget", [1, 2 * 4 * 9 * 3, 1 << 26])
def test_score_chunks_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 11, 4, 6, generator=generator), torch.randn(2, 9, 6, generator=generator)
    weights = torch.randn(2, 11, 4, generator=generator)
    visible = torch.rand(2, 11, 9, generator=generator) < 0.8
    monkeypatch.setattr(model.kernels.indexer, "SCORE_BUDGET", budget)
    assert torch.equal(
        select_entries(q, k, weights, visible, 3), keep_best(index_scores(q, k, weights), visible, 3)
    )
    assert select_entries(q, k, weights, visible, 9) is visible  # nothing to choose


def test_sparse_attends_to_topk_of_dense() -> None:
    """Dense mode is sparse mode with room for every entry; with less room they differ."""
    batch = packed_batch([[40], [23, 17]], 40)
    roomy, tight = (tiny_model(tiny_config("c", index_topk=k)) for k in (10, 2))
    outputs = [m(batch["input_ids"], document_ids=batch["document_ids"], mode=mode).logits
               for m in (roomy, tight) for mode in ("sparse", "dense")]  # fmt: skip
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[3])
    assert not torch.allclose(outputs[2], outputs[3])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation creates, views and expansions aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() // x.element_size() > self.elements:
                self.elements = x.untyped_storage().nbytes() // x.element_size()
                self.name = f"{func} {list(x.shape)}"
        return out


@pytest.mark.parametrize(
    ("layers", "mode"), [("s", "sparse"), ("c", "sparse"), ("c", "dense"), ("h", "dense"), ("f", "dense")]
)
def test_memory_of_a_long_row(layers: str, mode: str) -> None:
    """Forward and backward at 16,384 tokens on the meta device: nothing grows with H * S * S, logits stay
    within their budget."""
    length = 16384
    config = tiny_config(layers, num_attention_heads=64, o_groups=8, sliding_window=128, vocab_size=8)
    with torch.device("meta"):
        attention = Attention(config, config.layer_types[0])
        layout = build_layout(config, torch.zeros(1, length, dtype=torch.int64))
        x = torch.zeros(1, length, config.hidden_size, requires_grad=True)
    with Largest() as largest:
        attention(x, layout, mode)[0].sum().backward()  # type: ignore[arg-type]
    budget = model.kernels.attention.LOGIT_BUDGET
    assert budget / 2 <= largest.elements <= 1.05 * budget < 64 * length * length / 50, largest.name


def test_full_attention_is_dense_attention() -> None:
    """The baseline by hand: one causal softmax with a sink over the document's tokens."""
    config = tiny_config("f", hash_layers=0)
    attention: Any = initialize(ForCausalLM(config), 0).double().get_submodule("layers.0.self_attn")
    torch.nn.init.normal_(attention.sinks)
    rows = [[21, 4], [30]]
    batch = packed_batch(rows, 31)
    layout = build_layout(config, batch["position_ids"], batch["document_ids"])
    x = torch.randn(2, 31, config.hidden_size, dtype=torch.float64, requires_grad=True)
    ours, _ = attention(x, layout)
    weights = dict(attention.named_parameters())
    wanted = torch.zeros_like(ours)
    for b, start, size, _ in documents(rows):
        document = slice(start, start + size)
        wanted[b, document] = naive.token_attention(weights, config, x[b, document], "compress", 1000)
    real = batch["document_ids"] >= 0
    assert_same(ours[real], wanted[real], {"x": x, **weights}, 1e-6)  # rotations are fp32
