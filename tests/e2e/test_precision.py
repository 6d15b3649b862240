"""A run in FP8 that goes over to FP4, interrupted around the switch; what it exports is what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.indexer import Indexer
from model.quant import FP8_BLOCK, round_fp4, round_fp8
from tests.e2e.runs import run
from tests.e2e.test_train import metrics
from train import checkpoint, export, import_hf, sample

QAT = [
    "precision=fp4_qat",
    "precision.compute_dtype=float32",
    "precision.qat_start=3",
    "model.moe_intermediate_size=32",
    "train.save_every=1",
    "train.keep_last=6",
]


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, of which the first three are without FP4."""
    runs = tmp_path_factory.mktemp("runs")
    result = run(corpus, runs, "run.name=qat", *QAT)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if "precision" in line and "step" in line]
    assert len(lines) == 1 and "step      3" in lines[0] and "fp4_experts" in lines[0]
    return runs / "qat"


@pytest.mark.parametrize("step", [2, 3, 4])
def test_the_switch_survives_an_interruption(folder: Path, corpus: Path, step: int) -> None:
    before = (folder / "metrics.jsonl").read_text()
    assert [("fp4_error" in line) for line in metrics(folder) if "lm" in line] == [False] * 3 + [True] * 3
    again = run(corpus, folder.parent, f"resume={folder / 'checkpoints' / f'step-0000000{step}'}", *QAT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "metrics.jsonl").read_text() == before


def test_exported_values_are_those_of_the_last_forward(folder: Path, tmp_path: Path) -> None:
    step = folder / "checkpoints" / "step-00000006"
    model, _, _ = sample.load(step, torch.device("cpu"))  # computes as the run did after its last step
    assert all(module.fp4 for module in model.modules() if isinstance(module, Indexer))
    export.main([f"checkpoint={step}", f"out={tmp_path / 'released'}", "format=deepseek"])
    import_hf.main([f"source={tmp_path / 'released'}", f"out={tmp_path / 'back'}", "data.path=nowhere"])
    back = tmp_path / "back" / "checkpoints" / "step-00000000"
    with checkpoint.open_tensors(step) as masters, checkpoint.open_tensors(back) as read:
        for name, parameter in model.named_parameters():
            parts = export.stored_pieces(name, tuple(parameter.shape))
            stored = torch.stack([read[piece.key] for piece in parts])
            exact = torch.stack([masters[piece.key] for piece in parts])
            if ".experts." in name:
                assert torch.equal(stored.view(parameter.shape), parameter), name
                assert torch.equal(stored, round_fp4(exact)) and not torch.equal(stored, exact), name
            elif "shared_experts" in name:
                assert torch.equal(stored[0], round_fp8(exact[0], FP8_BLOCK)), name
