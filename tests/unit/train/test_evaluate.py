"""Validation: exact means over uneven batches and ranks, and what is seen of the model on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import model.attention
from model.init import initialize
from model.kernels.attention import Seen
from optim.config import OptimConfig
from tests.tiny import documents, packed_batch, tiny_config, tiny_model
from train import evaluate as evaluation
from train.engine import TorchEngine
from train.evaluate import evaluate, mixing_errors

CPU = torch.device("cpu")
ROWS = [[17, 40], [61]]  # documents of two rows of 96: late queries see more entries than are selected


def engine_for(layers: str = "sc", **changes: Any) -> TorchEngine:
    config = tiny_config(layers, 1, **{"num_nextn_predict_layers": 1, "sliding_window": 32, **changes})
    return TorchEngine(tiny_model(config), OptimConfig(), torch.float32)


def batch_of(rows: int, masked: int) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    ids = torch.randint(96, (rows, 21))
    labels = ids[:, 1:].clone()
    labels[:, :masked] = -100
    positions = torch.arange(20).repeat(rows, 1)
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}


def test_mean_over_labels_not_over_batches() -> None:
    engine = engine_for()
    batches = [batch_of(1, 0), batch_of(3, 15)]
    parts = [engine(batch).losses["lm"] for batch in batches]
    expected = sum(float(loss.detach()) for loss, _ in parts) / sum(int(count) for _, count in parts)
    assert evaluate(engine, batches, CPU, "sparse")["lm"] == pytest.approx(expected, rel=1e-6)


def test_the_indexers_divergence_is_a_mean_over_queries() -> None:
    engine = engine_for("scc")
    batches = [packed_batch(ROWS, 96, depth=1), packed_batch([[5, 3]], 40, depth=1)]
    parts = [engine(batch, indexer_loss=True).losses["indexer"] for batch in batches]
    assert [int(count) for _, count in parts] == [2 * (14 + 37 + 58), 2 * 2]
    expected = sum(float(loss.detach()) for loss, _ in parts) / (2 * 111)
    found = evaluate(engine, batches, CPU, "sparse", indexer_loss=True)
    assert found["indexer"] == pytest.approx(expected, rel=1e-6)
    assert "indexer" not in evaluate(engine, batches, CPU, "sparse")


def test_ranks_add_up() -> None:
    engine = engine_for()
    batches = [batch_of(1, 0), batch_of(3, 15), batch_of(2, 3)]
    whole = evaluate(engine, batches, CPU, "sparse", look=False)
    assert whole.keys() == {"lm", "mtp", "lm/at_0", "accuracy", "mtp_accuracy"}
    sums: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        assert x.dtype == torch.float64 and x.dim() == 1
        sums.append(x.clone())
        return x

    for share in (batches[:1], batches[1:], []):
        evaluate(engine, share, CPU, "sparse", collect)
    assert len(sums) == 3
    for share in (batches[:1], []):  # every rank ends with the same, also one that had nothing to do
        means = evaluate(engine, share, CPU, "sparse", lambda _: sum(sums, torch.zeros(())), look=False)
        assert means == pytest.approx(whole, rel=1e-12)


def test_a_model_without_mtp_has_no_such_loss() -> None:
    engine = engine_for(num_nextn_predict_layers=0)
    found = evaluate(engine, [batch_of(2, 0)], CPU, "sparse")
    assert not {"mtp", "mtp_accuracy"} & found.keys() and "accuracy" in found


def test_mixing_is_measured_and_left_as_it_was() -> None:
    engine = engine_for()
    initialize(engine.model, 0)  # whose mixing is mild enough for 20 iterations
    attributes = [dict(vars(module)) for module in engine.model.modules()]
    before = evaluate(engine, [batch_of(2, 0)], CPU, "sparse")
    assert before["hc_row_error"] < 1e-4 and abs(before["hc_spectral_norm"] - 1) < 1e-4
    assert [dict(vars(module)) for module in engine.model.modules()] == attributes
    assert evaluate(engine, [batch_of(2, 0)], CPU, "sparse") == before
    plain = evaluate(engine_for(residual="plain", hc_mult=1), [batch_of(2, 0)], CPU, "sparse")
    assert "hc_row_error" not in plain and "stream_norm/0" in plain


def test_a_failing_batch_leaves_the_model_as_it_was() -> None:
    engine = engine_for()
    attributes = [dict(vars(module)) for module in engine.model.modules()]
    with pytest.raises(IndexError):
        batch = {"input_ids": torch.full((1, 8), 1000), "position_ids": torch.arange(8).unsqueeze(0)}
        evaluate(engine, [batch], CPU, "sparse")
    assert [dict(vars(module)) for module in engine.model.modules()] == attributes


def test_mixing_errors_by_hand() -> None:
    lopsided = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])  # columns sum to 1, rows to 1.5 and 0.5
    errors = mixing_errors([torch.eye(2).unsqueeze(0), lopsided])
    assert errors["hc_row_error"] == pytest.approx(0.5)
    assert errors["hc_spectral_norm"] == pytest.approx(math.sqrt(0.75 + math.sqrt(0.3125)))


def test_norms_of_the_streams_before_the_head() -> None:
    engine = engine_for()
    seen: list[Tensor] = []
    hook = engine.model.hc_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = evaluate(engine, [batch_of(3, 0), batch_of(1, 0)], CPU, "sparse")
    hook.remove()
    first = seen[0].double()  # of the first batch
    norms = {f"stream_norm/{i}": float((first[:, :, i] ** 2).mean().sqrt()) for i in range(4)}
    assert {name: x for name, x in found.items() if "stream" in name} == pytest.approx(norms, rel=1e-5)


class Recorded:
    """The arguments of every call of the attention kernel, in the order of the layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[Tensor, ...]] = []
        kernel = model.attention.shared_kv_attention

        def record(q: Tensor, kv: Tensor, entries: Tensor, seen: Seen, *rest: Any) -> Tensor:
            mask = None if entries is None else seen.mask(entries.shape[1])
            self.calls.append((q, kv, entries, mask, *rest))
            return kernel(q, kv, entries, seen, *rest)

        monkeypatch.setattr(model.attention, "shared_kv_attention", record)


def recalls(arguments: tuple[Tensor, ...], topk: int) -> Iterator[tuple[float, float]]:
    """Recall and the best possible one of every contested query, from one call of the kernel, in loops."""
    q, kv, entries, selected, sinks, _, window = arguments
    sinks = sinks.detach()
    scale = q.shape[-1] ** -0.5
    for row, start, size, number in documents(ROWS):
        first_slot = sum(lengths // 4 for lengths in ROWS[row][:number])
        for position in range(size):
            t, complete = start + position, (position + 1) // 4
            if complete <= topk:
                continue
            slots = range(first_slot, first_slot + complete)
            near = range(max(start, t - int(window) + 1), t + 1)
            mass = dict.fromkeys(slots, 0.0)
            for head in range(q.shape[2]):

                def weight(key: Tensor, head: int = head, t: int = t, row: int = row) -> float:
                    return math.exp(float(q[row, t, head].double() @ key.double()) * scale)

                far = {s: weight(entries[row, s]) for s in slots}
                total = sum(far.values()) + sum(weight(kv[row, j]) for j in near)
                total += math.exp(float(sinks[head]))
                for s in slots:
                    mass[s] += far[s] / total
            whole = sum(mass.values())
            chosen = [s for s in range(entries.shape[1]) if selected[row, t, s]]
            assert len(chosen) == topk
            best = sum(sorted(mass.values())[-topk:])
            yield sum(mass[s] for s in chosen) / whole, best / whole


@pytest.mark.parametrize("budget", [1, 1 << 24])
def test_indexer_recall_is_the_share_of_true_attention(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LOGIT_BUDGET", budget)
    engine = engine_for("schc")
    recorded = Recorded(monkeypatch)
    found = evaluate(engine, [packed_batch(ROWS, 96, depth=1)], CPU, "sparse")
    means = []
    for layer in (1, 3):
        pairs = torch.tensor(list(recalls(recorded.calls[layer], topk=6)))
        assert len(pairs) == 13 + 34  # of the documents with 40 and 61 tokens
        recall, best = pairs.mean(0).tolist()
        means.append((recall, best))
        assert 0.3 < recall < best < 0.99  # neither trivial
        assert found[f"indexer_recall/{layer}"] == pytest.approx(recall, rel=1e-4)
        assert found[f"indexer_recall_best/{layer}"] == pytest.approx(best, rel=1e-4)
    assert found["indexer_recall"] == pytest.approx(sum(r for r, _ in means) / 2, rel=1e-4)
    assert found["indexer_recall_best"] == pytest.approx(sum(b for _, b in means) / 2, rel=1e-4)


def test_recall_of_a_sample_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "QUERIES", 4)
    engine = engine_for("sc")
    recorded = Recorded(monkeypatch)
    found = evaluate(engine, [packed_batch(ROWS, 96, depth=1)], CPU, "sparse")
    pairs = list(recalls(recorded.calls[1], topk=6))
    sampled = [pairs[i * 47 // 4] for i in range(4)]  # evenly spaced, rows in order
    assert found["indexer_recall"] == pytest.approx(sum(r for r, _ in sampled) / 4, rel=1e-4)


def test_recall_in_dense_attention_is_that_of_what_would_be_selected() -> None:
    engine = engine_for("cs")  # the first layer gets the same input in both modes
    batch = packed_batch(ROWS, 96, depth=1)
    sparse, dense = (evaluate(engine, [batch], CPU, mode) for mode in ("sparse", "dense"))
    assert dense["indexer_recall/0"] == pytest.approx(sparse["indexer_recall/0"], rel=1e-6)


@pytest.mark.parametrize("changes", [{"index_topk": 15}, {"layers": "sh"}])
def test_no_recall_where_nothing_is_selected(changes: dict[str, Any]) -> None:
    found = evaluate(engine_for(**changes), [packed_batch(ROWS, 96, depth=1)], CPU, "sparse")
    assert not [name for name in found if "recall" in name] and found["lm"] > 0
