"""Losses by source and by position, and accuracies, against whole logits token by token."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.loss
from model.loss import TokenScores
from optim.config import OptimConfig
from tests.tiny import packed_batch, tiny_config, tiny_model
from train import tally
from train.engine import TorchEngine
from train.evaluate import evaluate
from train.tally import POSITIONS, Tally, position_group

CPU = torch.device("cpu")
SOURCES = ("web", "code", "books")  # of the last there is nothing
LENGTH = 160
ROWS = [[150], [70, 3, 80], [1, 2, 66], []]
OF_ROWS = [0, 1, 0, -1]


def engine_for(depth: int, dtype: torch.dtype = torch.float32) -> TorchEngine:
    model = tiny_model(tiny_config("sc", 1, num_nextn_predict_layers=depth)).to(dtype)
    return TorchEngine(model, OptimConfig(), dtype)


def batches_for(depth: int) -> list[dict[str, Tensor]]:
    """Packed rows with padding, the last of them all padding; one label in four is what the model predicts,
    so that accuracies are not 0."""
    whole = packed_batch(ROWS, LENGTH, depth=depth)
    engine = engine_for(depth, torch.float64)
    with torch.no_grad():
        best = engine.model(**without_labels(whole), return_logits=True).logits.argmax(-1)
    quarter = (torch.arange(LENGTH) % 4 == 0) & (whole["labels"] != -100)
    whole["labels"] = torch.where(quarter, best, whole["labels"])
    whole["sources"] = torch.tensor(OF_ROWS)
    return [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 1), slice(1, 4))]


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name in ("input_ids", "position_ids", "document_ids")}


def naive(depth: int, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of whole logits in fp64, one label after the other."""
    model = engine_for(depth, torch.float64).model
    hidden: list[Tensor] = []
    for mtp in model.mtp:
        mtp.register_forward_hook(lambda _, inputs, output: hidden.append(output[1]))
    found: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != "sources"}
        hidden.clear()
        with torch.no_grad():
            logits = model(**inputs, return_logits=True).logits
            further = [F.linear(h, model.lm_head.weight) for h in hidden]
        for b, t in (batch["labels"] != -100).nonzero().tolist():
            label, position = int(batch["labels"][b, t]), int(batch["position_ids"][b, t])
            loss = float(F.cross_entropy(logits[b, t], batch["labels"][b, t]))
            start = 0 if position < 64 else 2 ** int(math.log2(position))
            for name in ("lm", f"lm/{SOURCES[OF_ROWS[b if len(batch['labels']) == 1 else b + 1]]}"):
                found[name].append(loss)
            found[f"lm/at_{start}"].append(loss)
            found["accuracy"].append(float(int(logits[b, t].argmax()) == label))
        for k, predicted in enumerate(further):
            for b, t in (batch["next_ids"][..., k] != -100).nonzero().tolist():
                target = batch["next_ids"][b, t, k]
                found["mtp"].append(float(F.cross_entropy(predicted[b, t], target)))
                found["mtp_accuracy"].append(float(int(predicted[b, t].argmax()) == int(target)))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("budget", [96 * 7, 1 << 26])
def test_equals_whole_logits(depth: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_for(depth)
    expected = naive(depth, batches)
    assert 0.2 < expected["accuracy"] < 0.5
    assert {"lm/web", "lm/code", "lm/at_0", "lm/at_64", "lm/at_128"} < expected.keys()
    monkeypatch.setattr(model.loss, "LOGIT_BUDGET", budget)
    found = evaluate(engine_for(depth), batches, CPU, "sparse", look=False, sources=SOURCES)
    assert found.keys() == expected.keys()  # nothing of a source or position without tokens
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_losses_are_those_without_scores() -> None:
    """To the bit, and batches are as they were."""
    batches, engine = batches_for(1), engine_for(1)
    copies = [{name: x.clone() for name, x in batch.items()} for batch in batches]
    sums = torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            losses = engine({name: x for name, x in batch.items() if name != "sources"}).losses
            sums += torch.stack([torch.stack([x.double() for x in losses[part]]) for part in ("lm", "mtp")])
    found = evaluate(engine, batches, CPU, "sparse", sources=SOURCES)
    assert [found["lm"], found["mtp"]] == (sums[:, 0] / sums[:, 1]).tolist()
    for batch, copy in zip(batches, copies, strict=True):
        assert batch.keys() == copy.keys() and all(torch.equal(batch[name], x) for name, x in copy.items())


def test_one_source_has_no_loss_of_its_own() -> None:
    batches = batches_for(0)
    for batch in batches:
        batch["sources"].clamp_(max=0)
    found = evaluate(engine_for(0), batches, CPU, "sparse", look=False, sources=("web",))
    assert found.keys() == {"lm", "accuracy", "lm/at_0", "lm/at_64", "lm/at_128"}


def test_micro_batches_change_nothing() -> None:
    batches, engine = batches_for(1), engine_for(1)
    rows = [
        {name: x[i : i + 1] for name, x in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    whole, single = (
        evaluate(engine, these, CPU, "sparse", look=False, sources=SOURCES) for these in (batches, rows)
    )
    assert len(rows) == 4 and single == pytest.approx(whole, rel=1e-6)


def test_groups_of_positions() -> None:
    positions = torch.tensor([0, 63, 64, 127, 128, 255, 256, 1 << 20, (1 << 21) - 1, 1 << 21, 1 << 30])
    starts = [0, 0, 64, 64, 128, 128, 256, 1 << 20, 1 << 20, 1 << 21, 1 << 21]
    assert [POSITIONS[i] for i in position_group(positions)] == [f"at_{start}" for start in starts]
    assert tally.STARTS[:4] == (0, 64, 128, 256)


def test_sums_by_hand() -> None:
    sums = Tally(("a", "b", "c"), CPU)
    scores: Any = TokenScores(
        torch.tensor([1.0, 2.0, torch.inf, 4.0, 8.0]),  # the third is not counted
        torch.tensor([True, False, True, True, True]),
        torch.tensor([True, True, False, True, True]),
    )
    sums.add(scores, torch.tensor([0, 0, 0, 1, -1]))
    sums.add(scores, torch.tensor([1, -1, 3, 0, 7]))
    assert sums.totals.tolist() == [[7.0, 5.0, 0.0], [2.0, 2.0, 0.0], [3.0, 2.0, 0.0]]
    assert sums.losses() == {"a": 7 / 3, "b": 2.5}
    assert sums.accuracy() == 4 / 5 and sums.accuracy(("a",)) == 2 / 3 and sums.accuracy(("c",)) is None
