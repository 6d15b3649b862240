"""What a mesh does on one GPU, in a group of one rank over NCCL: the same code that several would run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.linear import grouped_linear
from model.moe import LocalDispatcher, MoE
from tests.distributed.test_zero import LENGTH, ROWS, config_of, skewed_model
from tests.tiny import packed_batch, relative, tiny_config
from train.loop import train_step
from train.parallel.expert import AllToAllDispatcher, reduce_rounded, round_stochastically
from train.ranks import Ranks, join
from train.zero import ZeroEngine

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield join("cuda")


def passed(moe: MoE, dispatcher: Any, x: Tensor) -> list[Tensor]:
    """The output and all gradients of a MoE with this dispatcher."""
    moe.dispatcher, x = dispatcher, x.clone().requires_grad_()
    moe.zero_grad()
    out, _ = moe(x, torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
    out.square().mean().backward()
    return [out, x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]  # type: ignore[list-item]


def test_rows_that_travel_come_back(ranks: Ranks) -> None:
    """Many times, since streams that do not wait for each other would show now and then."""
    config = tiny_config(hidden_size=512, moe_intermediate_size=256, n_routed_experts=16)
    torch.manual_seed(0)
    moe = MoE(config, "moe").to(ranks.device)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    moe.gate.e_score_correction_bias[0], moe.gate.e_score_correction_bias[-6:] = 10.0, -10.0
    for name in ("experts", "shared_experts"):
        getattr(moe, name).to(torch.bfloat16)
    far = AllToAllDispatcher(16, dist.group.WORLD, 1)
    for _ in range(20):
        x = torch.randn(4, 2048, 512, device=ranks.device, dtype=torch.bfloat16)
        expected, found = passed(moe, LocalDispatcher(16), x), passed(moe, far, x)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_no_rows_at_all(ranks: Ranks) -> None:
    """A rank to which nobody sends still has gradients, of zeros."""
    weight = torch.randn(4, 64, 64, device=ranks.device, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.randn(0, 64, device=ranks.device, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.zeros(4, dtype=torch.int32, device=ranks.device)
    out = grouped_linear(rows, weight, ends)
    out.sum().backward()
    assert out.shape == (0, 64) and weight.grad is not None and not weight.grad.any()


def test_rounding_has_the_exact_mean(ranks: Ranks) -> None:
    x = torch.randn(1000, device=ranks.device)
    rounded = torch.stack([reduce_rounded(x, 0, dist.group.WORLD) for _ in range(4000)])
    assert relative(rounded.mean(0), x) < 1e-4 < relative(rounded[0], x) < 4e-3
    assert (
        round_stochastically(torch.tensor([torch.inf, torch.nan], device=ranks.device)).isfinite().sum() == 0
    )


def test_sharded_dense_weights(ranks: Ranks) -> None:
    """The same steps with and without, from the meta device, in bf16."""
    config, logged = config_of("muon"), []
    batch = packed_batch(ROWS, LENGTH, depth=1, vocab=90)
    for dense in (False, True):
        model = skewed_model(config.model).to(ranks.device)
        options: dict[str, Any] = {"stage": 2, "shard_dense": dense}
        engine = ZeroEngine(model, config.optim, torch.bfloat16, **options)
        logged.append([train_step(engine, batch, config, step, ranks) for step in range(3)])
    for ours, theirs in zip(*logged, strict=True):
        assert ours["lm"] == pytest.approx(theirs["lm"], rel=1e-4)


@pytest.mark.parametrize("parallel", ["zero", "zero parallel.shard_dense=true"])
def test_a_run(parallel: str, tmp_path: Path) -> None:
    from tests.e2e.runs import options

    corpus = tmp_path / "texts"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text("some words that differ " * 400 + str(number))
    command = [sys.executable, "-m", "train", *options(corpus, tmp_path / "runs"), "precision=bf16"]
    command += ["train.device=cuda", *f"parallel={parallel}".split()]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
