"""Routing that was chosen ahead: exact, undisturbing, and used; which steps it is chosen for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.model import ModelOutput
from tests.unit.train.test_engine import ALONE, engine_for, run_config, uneven_batch
from train import recompute
from train.engine import TorchEngine
from train.loop import train_step
from train.recovery import Recovery, choose_experts
from train.spikes import Point, Spike, SpikesConfig

ANTICIPATED = Spike(9, 8, "", "anticipate", (29, 36), back_to=4, ahead=3, until=12)


def kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("how", recompute.HOW)
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_routing_by_the_same_parameters_changes_no_bit(how: str, mode: str) -> None:
    """With accumulation and packed documents; choosing moves nothing, neither gradients nor generators."""
    config, batch = run_config(micro=2), uneven_batch()
    config = replace(config, train=replace(config.train, attention_mode=mode))
    plain, replayed = engine_for(config), engine_for(config)
    for engine in (plain, replayed):
        recompute.apply(engine.model, how)
    for step in range(3):
        before = kept(replayed.state())
        routing = choose_experts(replayed, batch, config, ALONE)
        hashed = [[experts is None for experts in micro] for micro in routing]
        assert hashed == [[True, False, False]] * 2  # the last is MTP's
        assert same(before, replayed.state())
        assert all(p.grad is None for p in replayed.model.parameters())
        wanted = train_step(plain, batch, config, step, ALONE)
        assert train_step(replayed, batch, config, step, ALONE, routing=routing) == wanted
        assert same(plain.state(), replayed.state())


def test_the_present_weighs_what_the_past_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(micro=2)
    engine, other = engine_for(config), engine_for(config)
    for step in range(3):
        train_step(other, uneven_batch(), config, step, ALONE)
    routing = choose_experts(other, uneven_batch(), config, ALONE)
    own = choose_experts(engine, uneven_batch(), config, ALONE)
    chosen, others = (torch.cat([micro[1] for micro in found]) for found in (routing, own))  # type: ignore[misc]
    assert not torch.equal(chosen, others)
    used: list[Tensor] = []
    forward = TorchEngine.__call__

    def call(engine: TorchEngine, *arguments: Any, **options: Any) -> ModelOutput:
        output = forward(engine, *arguments, **options)
        used.append(output.expert_indices[1])
        return output

    grads: dict[str, Tensor] = {}

    def keep_gradients(engine: TorchEngine, lr: float, measure: bool) -> dict[str, Tensor]:
        grads.update({name: p.grad for name, p in engine.masters.items() if p.grad is not None})
        return {"grad_norm_model": torch.zeros(())}

    monkeypatch.setattr(TorchEngine, "__call__", call)
    monkeypatch.setattr(TorchEngine, "step", keep_gradients)
    train_step(engine, uneven_batch(), config, 0, ALONE, routing=routing)
    assert torch.equal(torch.cat(used), chosen.long())
    gate = grads["layers.1.mlp.gate.weight"]
    assert gate.isfinite().all() and gate.any()
    real = chosen[uneven_batch()["document_ids"] >= 0]
    loads = torch.bincount(real.flatten(), minlength=config.model.n_routed_experts).double()
    bias = engine.model.moes()[1].gate.e_score_correction_bias  # which follows what was used
    assert torch.equal(bias.sign(), (loads.mean() - loads).sign().float())


@pytest.mark.parametrize("compiled", [False, True])
def test_choosing_keeps_nothing_for_backward(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where layers are compiled, which are compiled with gradients alone. The head has nothing to do."""
    enabled: list[bool] = []
    forward = TorchEngine.__call__

    def call(engine: TorchEngine, *arguments: Any, **options: Any) -> ModelOutput:
        enabled.append(torch.is_grad_enabled())
        return forward(engine, *arguments, **options)

    engine, config = engine_for(run_config(micro=2)), run_config(micro=2)
    config = replace(config, train=replace(config.train, compile=compiled))
    monkeypatch.setattr(TorchEngine, "__call__", call)
    monkeypatch.setattr(engine.model.lm_head, "weight", None)
    choose_experts(engine, uneven_batch(), config, ALONE)
    assert enabled == [compiled, compiled]


def recovery(*spikes: Spike, steps: int = 100) -> Recovery:
    config = run_config()
    return Recovery(replace(config, train=replace(config.train, steps=steps)), list(spikes))


def rehearsed(found: Recovery, first: int, last: int) -> dict[int, list[int]]:
    """Which steps' routing is chosen at every step, and that each is there when it is trained."""
    chosen: dict[int, list[int]] = {}
    for step in range(first, last):
        if due := list(found.due(step)):
            chosen[step] = due
        had = found.routing(step)
        assert bool(had) == any(step in steps for at, steps in chosen.items() if at < step)
        found.routes |= {later: [[None]] for later in due}
        assert found.postpone() == any(later > step for later in found.routes)
    return chosen


def test_stages() -> None:
    """At once for the next steps, then for one more at each, at last for none: steps 5 to 12, from 1."""
    found = rehearsed(recovery(ANTICIPATED), 0, 20)
    assert found == {4: [5, 6, 7], 5: [8], 6: [9], 7: [10], 8: [11]}
    again = replace(ANTICIPATED, step=11, until=14)  # another spike meanwhile
    found = rehearsed(recovery(ANTICIPATED, again), 0, 20)
    assert found[4] == [5, 6, 7] and found[10] == [13] and max(found) == 10
    short = rehearsed(recovery(ANTICIPATED, steps=9), 0, 9)
    assert max(max(due) for due in short.values()) == 8
    nothing = recovery(
        replace(ANTICIPATED, policy="skip"), replace(ANTICIPATED, back_to=None, policy="record")
    )
    assert rehearsed(nothing, 0, 20) == {}
    assert nothing.passed_over == (range(28, 36),)


def test_a_spike_names_its_sequences_and_what_is_to_be_done() -> None:
    found = recovery()
    found.config = replace(found.config, spikes=SpikesConfig(on_nan="skip"))  # 4 sequences a step
    found.points = [Point(step, 3.0, 1.0, 4 * step) for step in range(1, 60)]
    assert found.look(Point(60, 3.0, 1.0, 240), finite=True) is None
    spike = found.look(Point(61, float("nan"), 1.0, 244), finite=False)
    assert spike is not None and (spike.step, spike.onset, spike.policy) == (61, 61, "skip")
    assert spike.sequences == (241, 244)
    assert len(found.points) == 61
