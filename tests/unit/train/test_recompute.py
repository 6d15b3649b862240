"""Recomputing changes no number: losses, gradients, expert loads and weights stay the same, bit for bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.kernels.attention
import model.kernels.indexer
from model.model import ForCausalLM, ModelOutput
from tests.distributed.ranks import spawn
from tests.tiny import packed_batch, relative, tiny_config, tiny_model
from tests.unit.train.test_engine import ALONE, run_config, uneven_batch
from train import recompute
from train.build import build_engine, make_mesh
from train.compiled import compile_layers
from train.engine import Batch, Engine, TorchEngine
from train.loop import train_step
from train.ranks import Ranks
from train.sections import ParallelConfig

LENGTH = 160
BATCH = packed_batch([[140, 13], [5, 60, 41, 2]], LENGTH, depth=2)
RECOMPUTING = ("selective", "full")


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def every_part(how: str, layers: str = "schf", **changes: Any) -> ForCausalLM:
    """All layer types, hash and top-k routing, two MTP blocks."""
    return recompute.apply(tiny_model(tiny_config(layers, 2, num_nextn_predict_layers=2, **changes)), how)


def backward(net: ForCausalLM, batch: Batch = BATCH, **options: Any) -> tuple[ModelOutput, dict[str, Tensor]]:
    """The output and the gradients of every loss together."""
    output = net(**batch, indexer_loss=True, **options)
    torch.stack([loss for loss, _ in output.losses.values()]).sum().backward()
    return output, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[ModelOutput, dict[str, Tensor]], wanted: tuple[ModelOutput, dict[str, Tensor]]
) -> None:
    assert found[1].keys() == wanted[1].keys() and len(wanted[1]) > 20
    for name, grad in wanted[1].items():
        assert torch.equal(found[1][name], grad), name
    for part, (loss, _) in wanted[0].losses.items():
        assert torch.equal(found[0].losses[part][0], loss), part
    for ours, theirs in zip(found[0].expert_indices, wanted[0].expert_indices, strict=True):
        assert torch.equal(ours, theirs)


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "plain residual": {"residual": "plain", "hc_mult": 1},
    "dense": {"mode": "dense"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", RECOMPUTING)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bitwise_equal(case: str, how: str, dtype: torch.dtype) -> None:
    options = {key: value for key, value in CASES[case].items() if key == "mode"}
    changes = {key: value for key, value in CASES[case].items() if key != "mode"}
    kept, again = (every_part(h, **changes).cast(dtype) for h in ("none", how))
    assert_same(backward(again, **options), backward(kept, **options))


@pytest.mark.parametrize("how", RECOMPUTING)
def test_long_sequences_recompute_their_attention_within(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.kernels.attention, "LOGIT_BUDGET", 30_000)
    monkeypatch.setattr(model.kernels.indexer, "SCORE_BUDGET", 30_000)
    assert_same(backward(every_part(how)), backward(every_part("none")))


@pytest.mark.parametrize("how", RECOMPUTING)
def test_replay(how: str) -> None:
    net = every_part("none")
    chosen = [indices.flip(-1).roll(1, 1) for indices in net(**BATCH).expert_indices]
    wanted = backward(net, replay=chosen)
    assert all(torch.equal(a, b) for a, b in zip(wanted[0].expert_indices, chosen, strict=True))
    assert_same(backward(every_part(how), replay=chosen), wanted)


def test_what_is_computed_twice() -> None:
    """Selective: products of mHC and of attention, none with a weight but the grouped output's. Full: all."""
    counts = {}
    for how in recompute.HOW:
        with Calls() as calls:
            backward(every_part(how))
        counts[how] = calls.counts
    for name in ("aten::mm", "aten::_grouped_mm"):
        assert counts["full"][name] > counts["selective"][name] == counts["none"][name] > 0
    for name in ("aten::bmm", "aten::baddbmm", "aten::topk", "aten::rsqrt"):
        assert counts["full"][name] == counts["selective"][name] > counts["none"][name]


@pytest.mark.parametrize("how", recompute.HOW)
def test_without_gradients_nothing_is_checkpointed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(block: Any, *inputs: Any, **_: Any) -> Any:
        calls.append(block)
        return block(*inputs)

    monkeypatch.setattr(recompute, "checkpoint", counted)
    net = every_part(how)
    with torch.no_grad():
        net(**BATCH)
    assert not calls
    net(**BATCH)
    assert calls == ([] if how == "none" else [*net.layers, *net.mtp])


@pytest.mark.parametrize("how", RECOMPUTING)
def test_steps_of_an_engine(how: str) -> None:
    """Three steps of several micro-batches: logged values, expert loads among them, and all state."""

    def trained(how: str, dtype: torch.dtype) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        config = run_config(micro=2)
        net = recompute.apply(tiny_model(config.model), how)
        engine = TorchEngine(net, config.optim, dtype)
        return [train_step(engine, uneven_batch(), config, i, ALONE) for i in range(3)], engine.state()

    for dtype in (torch.float32, torch.bfloat16):
        (logged, state), (wanted, reference) = trained(how, dtype), trained("none", dtype)
        assert logged == wanted and any("load" in name for name in logged[0])
        assert all(torch.equal(x, reference[key]) for key, x in state.items())


@pytest.mark.parametrize("how", RECOMPUTING)
def test_compiled_streams(how: str) -> None:
    """Compiled and recomputed equal compiled and kept; micro-batches after the first compile nothing."""
    found, kept = (recompute.apply(tiny_model(tiny_config("c")), how) for how in (how, "none"))
    for net in (found, kept):
        compile_layers(net)
    assert_same(backward(found), backward(kept))
    found.zero_grad(set_to_none=True)
    kept.zero_grad(set_to_none=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(backward(found), backward(kept))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def zero_steps(ranks: Ranks, stage: str) -> None:
    """Two steps of ZeRO with and without recomputing."""
    from train.zero import ZeroEngine

    def trained(how: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        config = run_config(micro=1)
        net = recompute.apply(tiny_model(config.model), how)
        engine: Engine = ZeroEngine(net, config.optim, torch.bfloat16, stage=int(stage))
        rows = slice(4 // ranks.world * ranks.rank, 4 // ranks.world * (ranks.rank + 1))
        mine = {name: x[rows] for name, x in uneven_batch().items()}
        return [train_step(engine, mine, config, i, ranks) for i in range(2)], engine.state()

    wanted, reference = trained("none")
    for how in RECOMPUTING:
        logged, state = trained(how)
        assert logged == wanted, how
        assert all(torch.equal(x, reference[key]) for key, x in state.items()), how


@pytest.mark.parametrize(("world", "stage"), [(1, "1"), (2, "2")])
def test_zero(world: int, stage: str, tmp_path: Path) -> None:
    spawn(world, "tests.unit.train.test_recompute", "zero_steps", stage, folder=tmp_path)


@pytest.mark.parametrize("how", recompute.HOW)
def test_the_configuration_reaches_the_model(how: str) -> None:
    config = run_config()
    alone = ParallelConfig(engine="torch")
    config = replace(config, train=replace(config.train, recompute=how), parallel=alone)
    net = build_engine(config, ALONE.device, make_mesh(config, ALONE)).model
    assert (net.around is ForCausalLM.around) == (how == "none")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", RECOMPUTING)
def test_on_a_gpu(how: str, compiled: bool) -> None:
    """In bf16 the same experts are chosen, and gradients agree as far as their sums are in one order."""
    found, kept = (every_part(h).cuda().cast(torch.bfloat16) for h in (how, "none"))
    for net in (found, kept) if compiled else ():
        compile_layers(net)
    batch = {name: x.cuda() for name, x in BATCH.items()}
    ours, theirs = backward(found, batch), backward(kept, batch)
    for a, b in zip(ours[0].expert_indices, theirs[0].expert_indices, strict=True):
        assert torch.equal(a, b)
    for name, grad in theirs[1].items():
        assert relative(ours[1][name], grad) < 1e-3, name
