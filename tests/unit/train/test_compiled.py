"""Compiled layers: one graph each, the same numbers, and what is compiled where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.hyper_connection import HyperConnection
from model.kernels import (
    attention,
    cast,
    cast_hopper,
    gated_pool,
    gpu,
    grouped,
    hopper,
    index_select,
    product,
    sinkhorn,
    stream_product,
    swiglu,
)
from model.precision import NAMED
from tests.distributed.ranks import spawn
from tests.tiny import packed_batch, relative, tiny_config, tiny_model
from tests.unit.train.test_engine import run_config, uneven_batch
from train import recompute
from train.compiled import compile_layers
from train.engine import TorchEngine
from train.loop import train_step
from train.ranks import Ranks
from train.recovery import choose_experts
from train.zero import ZeroEngine

BATCH = packed_batch([[40, 24], [64]], 64, depth=1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled is traced, in one piece or not at all, and runs as torch's own operations."""
    made: list[Any] = []
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True)

    def compiling(function: Any, **options: Any) -> Any:
        made.append(function.__self__)
        return whole(function, **options)

    monkeypatch.setattr(torch, "compile", compiling)
    torch._dynamo.reset()
    return made


def model_of(
    dtype: torch.dtype = torch.bfloat16, how: str = "none", layers: str = "sch", mtp: int = 1
) -> Any:
    net = tiny_model(tiny_config(layers, 1, num_nextn_predict_layers=mtp, hc_sinkhorn_iters=2))
    return recompute.apply(net, how).cast(dtype)


def results(net: Any, **options: Any) -> list[torch.Tensor]:
    losses = net(**BATCH, **options).losses
    torch.stack([loss for loss, _ in losses.values()]).sum().backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [*(loss.detach() for loss, _ in losses.values()), *grads]


@pytest.mark.parametrize(
    ("mode", "how", "layers", "mtp"),
    [("sparse", "full", "sch", 1), ("dense", "none", "ch", 0), ("warmup", "none", "ch", 0)],
)
def test_layers_are_one_graph(traced: list[Any], mode: str, how: str, layers: str, mtp: int) -> None:
    """As near to fp32 as they are otherwise. Sliding layers and MTP are the same in all modes."""
    net, eager = model_of(how=how, layers=layers, mtp=mtp), model_of(layers=layers, mtp=mtp)
    compile_layers(net)
    assert len(traced) == len(layers) + mtp and not any(
        isinstance(module, HyperConnection) for module in traced
    )
    options = {"mode": mode, "indexer_loss": True}
    exact = model_of(torch.float32, layers=layers, mtp=mtp)
    every = (results(net, **options) for net in (net, eager, exact))
    for found, near, wanted in zip(*every, strict=True):
        few = wanted.ndim and wanted.numel() < 64  # that cancel, if it is a gradient
        assert few or relative(found, wanted) <= 2 * relative(near, wanted) + 1e-2
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        net(**BATCH)
    assert counters["stats"]["unique_graphs"] == graphs  # evaluation compiles nothing


def test_with_kernels_too(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP8 and FP4, as a GPU runs it; kernels compute nothing here."""
    for module in (attention, cast, gated_pool, index_select, product, sinkhorn, stream_product, swiglu):
        monkeypatch.setattr(module, "runs_kernels", lambda x: True)
    monkeypatch.setattr(gpu._Launched, "_launch", lambda *_, **__: None)
    for name in ("grouped", "outer"):
        monkeypatch.setattr(grouped, name, lambda *_: None)
    for module, name in ((hopper, "suits"), (cast_hopper, "suits"), (product, "_library_takes")):
        monkeypatch.setattr(module, name, lambda *_, **__: False)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "index_head_dim": 128}
    config = tiny_config("ch", 1, index_n_heads=16, hc_sinkhorn_iters=2, **sizes)
    net = tiny_model(config).cast(torch.bfloat16)
    net.use(NAMED["fp4_qat"])
    compile_layers(net)
    net(**packed_batch([[40, 24], [64]], 64), indexer_loss=True).losses["lm"][0].backward()
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("case", ["fp32", "selective", "shared", "ranks"])
def test_where_only_streams_are_compiled(case: str, traced: list[Any]) -> None:
    net = model_of(
        torch.float32 if case == "fp32" else torch.bfloat16, "selective" if case == "selective" else "none"
    )
    if case == "ranks":
        net.moes()[1].dispatcher = nn.Identity()
    compile_layers(net, whole=case != "shared")
    assert len(traced) == 16 and all(isinstance(module, HyperConnection) for module in traced)


def test_routing_is_chosen_by_what_is_compiled_for_training(traced: list[Any]) -> None:
    config = run_config()
    config = replace(config, train=replace(config.train, compile=True))
    engine, ranks = (
        TorchEngine(tiny_model(config.model), config.optim, torch.bfloat16),
        Ranks(0, 1, torch.device("cpu")),
    )
    compile_layers(engine.model)
    train_step(engine, uneven_batch(), config, 0, ranks)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    choose_experts(engine, uneven_batch(), config, ranks)
    assert graphs and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert config.indexer_loss  # what the pass would not need, and shares a graph by


def zero_steps(ranks: Ranks) -> None:
    """Steps of ZeRO, which takes gradients by hooks, with layers compiled and without."""

    def trained(whole: bool) -> list[dict[str, float]]:
        config = run_config()
        engine = ZeroEngine(tiny_model(config.model), config.optim, torch.bfloat16, stage=1)
        if whole:
            compile_layers(engine.model)
        return [train_step(engine, uneven_batch(), config, i, ranks) for i in range(2)]

    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    for found, wanted in zip(trained(True), trained(False), strict=True):
        for name in ("lm", "grad_norm_model"):  # bf16's rounding in other places
            assert found[name] == pytest.approx(wanted[name], rel=0.05), name


def test_zero(tmp_path: Path) -> None:
    spawn(1, "tests.unit.train.test_compiled", "zero_steps", folder=tmp_path)
