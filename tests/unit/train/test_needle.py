"""The retrieval probe: what rows hold, and that only a model that finds the needle gets its value right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.compose import compose
from configs.errors import ConfigError
from model.loss import TokenScores
from train.needle import (
    DEPTHS,
    GROUPS,
    KEY,
    VALUE,
    find_needles,
    probe_batches,
    probes,
    text_tokens,
)

LENGTH, COUNT = 96, 3
CPU = torch.device("cpu")


def text(count: int = COUNT, length: int = LENGTH, ids: int = 40) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(5, 5 + ids, (text_tokens(count, length),), generator=draw)


def test_rows_hide_one_needle_at_every_depth() -> None:
    parts = text().view(COUNT, -1).tolist()
    needles = []
    for part, rows in zip(parts, probes(text(), COUNT, LENGTH), strict=True):
        needle = rows[0, -KEY - VALUE :].tolist()
        needles.append(tuple(needle))
        assert len(set(needle)) == KEY + VALUE and rows.shape == (len(GROUPS), LENGTH)
        for row, depth in zip(rows.tolist(), (*DEPTHS, None), strict=True):
            at = [i for i in range(LENGTH) if row[i : i + KEY] == needle[:KEY]]
            assert row[-KEY - VALUE :] == needle
            if depth is None:
                assert at == [LENGTH - KEY - VALUE] and row[: at[0]] == part
                continue
            hay = LENGTH - 2 * (KEY + VALUE)
            assert at == [round(depth * hay / 100), LENGTH - KEY - VALUE]
            assert row[at[0] : at[0] + KEY + VALUE] == needle
            assert row[: at[0]] + row[at[0] + KEY + VALUE : at[1]] == part[:hay]
    assert len(set(needles)) == COUNT


def test_a_key_that_the_text_has_is_not_taken() -> None:
    """Of nine tokens few keys are free: the text holds most orders of them."""
    uniform = text(COUNT, 1500, ids=9)
    for rows in probes(uniform, COUNT, 1500):
        key = rows[-1, -KEY - VALUE : -VALUE]
        windows = rows[-1, : -KEY - VALUE].unfold(0, KEY, 1)
        assert not (windows == key).all(1).any()
    with pytest.raises(ConfigError, match=r"train\.needle=0"):
        probes(text(ids=KEY + VALUE - 1), COUNT, LENGTH)


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (4, 2), (5, 3)])
def test_ranks_share_the_rows_out(micro: int, world: int) -> None:
    rows = probes(text(), COUNT, LENGTH).flatten(0, 1)
    found: list[list[int]] = []
    ranks = [list(probe_batches(text(), COUNT, LENGTH, micro, 1, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # all ranks compute together
    for batch in (batch for batches in zip(*ranks, strict=True) for batch in batches):
        assert {name: tuple(x.shape) for name, x in batch.items()} == {
            **dict.fromkeys(("input_ids", "labels", "position_ids", "document_ids"), (micro, LENGTH)),
            "next_ids": (micro, LENGTH, 1),
            "sources": (micro,),
        }
        for i in range(micro):
            row, labels, group = batch["input_ids"][i], batch["labels"][i], int(batch["sources"][i])
            counted = (labels != -100).nonzero().flatten().tolist()
            if group < 0:
                assert not counted and (batch["document_ids"][i] == -1).all()
                continue
            assert group == len(found) % len(GROUPS) and (batch["document_ids"][i] == 0).all()
            assert counted == list(range(LENGTH - VALUE - 1, LENGTH - 1))
            assert torch.equal(labels[counted], row[-VALUE:])
            found.append(row.tolist())
    assert found == rows.tolist()


class Copier:
    """Predicts what came after the last time that the KEY tokens before were the same: likely, if so."""

    def __init__(self, reach: int):
        self.reach = reach

    def __call__(self, batch: dict[str, Tensor], mode: str, return_scores: bool) -> Any:
        assert return_scores and "sources" not in batch
        correct = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for b, t in (batch["labels"] != -100).nonzero().tolist():
            row = batch["input_ids"][b].tolist()
            before = row[t + 1 - KEY : t + 1]
            earlier = [
                i for i in range(max(KEY - 1, t - self.reach), t) if row[i + 1 - KEY : i + 1] == before
            ]
            correct[b, t] = bool(earlier) and row[earlier[-1] + 1] == int(batch["labels"][b, t])
        loss = torch.where(correct, 0.25, 6.0)
        return SimpleNamespace(scores=[TokenScores(loss, correct, batch["labels"] != -100)])


def test_only_who_reaches_the_needle_gets_the_value() -> None:
    def score(reach: int) -> dict[str, float]:
        engine: Any = Copier(reach)
        return find_needles(engine, probe_batches(text(), COUNT, LENGTH, 4, 0), CPU, "sparse")

    everywhere = score(LENGTH)
    hidden = {f"needle_loss/{depth}": 0.25 for depth in DEPTHS}
    assert everywhere == {**hidden, "needle_control": 6.0, "needle_accuracy": 1.0}
    near = score(LENGTH // 2)
    assert [near[f"needle_loss/{depth}"] for depth in DEPTHS] == [6.0, 6.0, 0.25, 0.25, 0.25]
    assert near["needle_accuracy"] == 0.6 and near["needle_control"] == 6.0


def test_configuration() -> None:
    assert compose([]).train.needle == 0 and compose(["experiment=nano"]).train.needle > 0
    with pytest.raises(ConfigError, match=r"train\.needle"):
        compose(["train.needle=-1"])
    short = ["train.seq_len=32", "train.needle=1", "model.index_topk=4"]
    assert compose(short).train.needle == 1
    # compression windows of the model are as long as the shortest sequence that holds a needle
    rates = "model.compress_rates={compressed_sparse_attention:4,heavily_compressed_attention:16}"
    with pytest.raises(ConfigError, match=r"train\.needle 0"):
        compose(["train.seq_len=16", "train.needle=1", rates])
