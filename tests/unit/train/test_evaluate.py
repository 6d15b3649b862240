"""Validation: exact means over uneven batches, and how doubly stochastic the mixing is."""

from __future__ import annotations

import math

import pytest
import torch

from model.init import initialize
from model.model import ForCausalLM
from optim.config import OptimConfig
from tests.tiny import tiny_config
from train.engine import TorchEngine
from train.evaluate import evaluate, mixing_errors

CPU = torch.device("cpu")


def engine_for(**model: object) -> TorchEngine:
    config = tiny_config("sc", 1, num_nextn_predict_layers=1, **model)
    return TorchEngine(initialize(ForCausalLM(config), 0), OptimConfig(), torch.float32)


def batch_of(rows: int, masked: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    ids = torch.randint(96, (rows, 21))
    labels = ids[:, 1:].clone()
    labels[:, :masked] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def test_mean_over_labels_not_over_batches() -> None:
    engine = engine_for()
    batches = [batch_of(1, 0), batch_of(3, 15)]
    parts = [engine(batch).losses["lm"] for batch in batches]
    expected = sum(float(loss.detach()) for loss, _ in parts) / sum(int(count) for _, count in parts)
    assert evaluate(engine, batches, CPU, "sparse")["lm"] == pytest.approx(expected, rel=1e-6)


def test_mixing_is_measured_and_left_as_it_was() -> None:
    engine = engine_for()
    before = evaluate(engine, [batch_of(2, 0)], CPU, "sparse")
    assert before["hc_row_error"] < 1e-4 and abs(before["hc_spectral_norm"] - 1) < 1e-4
    assert evaluate(engine, [batch_of(2, 0)], CPU, "sparse") == before
    assert "hc_row_error" not in evaluate(
        engine_for(residual="plain", hc_mult=1), [batch_of(2, 0)], CPU, "sparse"
    )


def test_mixing_errors_by_hand() -> None:
    lopsided = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])  # columns sum to 1, rows to 1.5 and 0.5
    errors = mixing_errors([torch.eye(2).unsqueeze(0), lopsided])
    assert errors["hc_row_error"] == pytest.approx(0.5)
    assert errors["hc_spectral_norm"] == pytest.approx(math.sqrt(0.75 + math.sqrt(0.3125)))
