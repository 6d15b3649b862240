from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from optim.config import OptimConfig
from optim.groups import build_groups, set_active
from optim.muon import HybridOptimizer, clip_grad_norm_per_set, muon_step
from tests.unit.optim.shapes import CONFIG, Home, all_homes, parameters

SETTINGS = OptimConfig(lr=0.02, indexer_lr=0.01, weight_decay=0.1)


def optimizer_of(named: dict[str, torch.nn.Parameter], config: OptimConfig = SETTINGS) -> HybridOptimizer:
    return HybridOptimizer(build_groups(named.items(), CONFIG, config))


def new_gradients(named: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(named: dict[str, torch.nn.Parameter], optimizer: HybridOptimizer, seeds: range) -> None:
    for seed in seeds:
        new_gradients(named, seed)
        optimizer.step()


def blocks_of(home: Home) -> list[tuple[int | slice, ...]]:
    """Index of every single matrix of a tensor, made without the code under test."""
    edges, start = [], 0
    for rows in home.blocks or (home.shape[-2],):
        edges.append(slice(start, start + rows))
        start += rows
    if len(home.shape) == 2:
        return [(rows,) for rows in edges]
    return [(expert, rows) for expert in range(home.shape[0]) for rows in edges]


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def slow_polar(x: Tensor) -> Tensor:
    """The hybrid iteration in fp64, on the singular values themselves."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def test_five_steps_equal_a_slow_fp64_muon() -> None:
    homes = {name: home for name, home in all_homes().items() if home.algorithm == "muon"}
    named = parameters(homes)
    weights = {name: p.detach().double() for name, p in named.items()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = optimizer_of(named)
    for seed in range(5):
        new_gradients(named, seed)
        for name, home in homes.items():
            lr = 0.01 if home.set == "indexer" else 0.02
            for index in blocks_of(home):
                grad, matrix = gradient(named[name])[index].double(), weights[name][index]
                momentum = 0.95 * momenta[name][index] + grad
                momenta[name][index] = momentum
                update = slow_polar(0.95 * momentum + grad) * math.sqrt(max(matrix.shape)) * 0.18
                weights[name][index] = matrix * (1 - lr * 0.1) - lr * update
        optimizer.step()
    for name in homes:
        torch.testing.assert_close(named[name].detach().double(), weights[name], atol=2e-5, rtol=0, msg=name)
        momentum = optimizer.state[named[name]]["momentum"]
        torch.testing.assert_close(momentum.double(), momenta[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (16, 80), (80, 16), (4, 128)])
def test_an_update_has_the_root_mean_square_that_adamw_would_have(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, momentum = torch.zeros(shape), torch.zeros(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"momentum": 0.95, "weight_decay": 0.1, "update_rms": 0.18, "dtype": dtype}
    muon_step([weight], [grad], [momentum], lr=0.01, **settings)
    assert weight.square().mean().sqrt().item() == pytest.approx(0.18 * 0.01, rel=0.01)
    assert torch.sum(weight * grad) < 0


def test_a_stacked_parameter_equals_its_blocks_alone() -> None:
    homes = {name: home for name, home in all_homes().items() if home.blocks or len(home.shape) == 3}
    named = parameters(homes)
    lone = [
        (name, index, named[name].detach()[index].clone(), torch.zeros_like(named[name].detach()[index]))
        for name, home in homes.items()
        for index in blocks_of(home)
    ]
    optimizer = optimizer_of(named)
    settings: dict[str, Any] = {"momentum": 0.95, "weight_decay": 0.1, "update_rms": 0.18}
    for seed in range(3):
        new_gradients(named, seed)
        before = {name: gradient(p).clone() for name, p in named.items()}
        optimizer.step()
        assert all(torch.equal(gradient(named[name]), grad) for name, grad in before.items())
        for name, index, weight, momentum in lone:
            lr = 0.01 if homes[name].set == "indexer" else 0.02
            muon_step([weight], [before[name][index]], [momentum], lr=lr, **settings)
    for name, index, weight, _ in lone:
        torch.testing.assert_close(named[name].detach()[index], weight, atol=3e-6, rtol=0, msg=name)


@pytest.mark.parametrize("elements", [1, 30, 1000])
def test_the_chunk_size_does_not_change_the_step(elements: int) -> None:
    shapes = [(3, 5), (5, 3), (3, 5), (4, 4), (3, 5), (4, 4)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for chunk in (elements, None):
        moved = [weight.clone() for weight in weights]
        momenta = [torch.zeros_like(weight) for weight in weights]
        settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "update_rms": 0.2, "lr": 0.1}
        muon_step(moved, grads, momenta, chunk_elements=chunk, **settings)
        results.append(moved)
    for ours, expected, start in zip(*results, weights, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)
        assert not torch.equal(ours, start)


def test_a_batch_never_exceeds_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        sizes.append(x.numel())
        return x

    monkeypatch.setattr("optim.muon.newton_schulz", spy)
    views = [list(torch.ones(20, 2, 5).unbind()) for _ in range(3)]
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "update_rms": 0.2, "lr": 0.1}
    muon_step(*views, chunk_elements=35, **settings)
    assert sizes == [30] * 6 + [20]  # 20 matrices of 10 numbers, three at once


def test_products_are_fp32_on_a_cpu_unless_asked_otherwise() -> None:
    moved = {}
    for choice in ("auto", "float32", "bfloat16"):
        weight = parameters({"layers.0.mlp.gate.weight": Home((3, 12))})
        optimizer_of(weight, OptimConfig(newton_schulz_dtype=choice)).step()
        moved[choice] = weight["layers.0.mlp.gate.weight"]
    assert torch.equal(moved["auto"], moved["float32"])
    assert not torch.equal(moved["auto"], moved["bfloat16"])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_adamw_equals_torch(name: str) -> None:
    config = OptimConfig(name=name, lr=0.02, weight_decay=0.1)
    homes = {key: home for key, home in all_homes().items() if name == "adamw" or home.algorithm == "adamw"}
    ours, theirs = parameters(homes), parameters(homes)
    optimizer = optimizer_of(ours, config)
    reference = torch.optim.AdamW(
        theirs.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1, foreach=True
    )
    for seed in range(5):
        new_gradients(ours, seed)
        new_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for key in homes:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-7, rtol=1e-6, msg=key)
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[ours[key]][moment], reference.state[theirs[key]][moment]
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6, msg=key)


def snapshot(named: dict[str, torch.nn.Parameter], optimizer: HybridOptimizer) -> dict[str, list[Tensor]]:
    return {
        name: [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())]
        for name, p in named.items()
    }


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_inactive_set_is_left_alone_and_wakes_up_unchanged() -> None:
    homes = all_homes()
    named = parameters(homes)
    optimizer = optimizer_of(named)
    train(named, optimizer, range(2))
    before = snapshot(named, optimizer)
    set_active(optimizer.param_groups, "indexer", False)
    train(named, optimizer, range(2, 4))
    asleep = snapshot(named, optimizer)
    for name, home in homes.items():
        assert same(before[name], asleep[name]) == (home.set == "indexer"), name
    set_active(optimizer.param_groups, "indexer", True)
    train(named, optimizer, range(4, 5))
    after = snapshot(named, optimizer)
    assert not any(same(asleep[name], after[name]) for name in homes)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    named = parameters(all_homes())
    optimizer = optimizer_of(named)
    train(named, optimizer, range(2))
    before = snapshot(named, optimizer)
    new_gradients(named, 2)
    idle = ["layers.1.mlp.experts.gate_up_proj", "layers.1.self_attn.sinks"]
    for name in idle:
        named[name].grad = None
    optimizer.step()
    after = snapshot(named, optimizer)
    assert [name for name in named if same(before[name], after[name])] == sorted(idle, key=list(named).index)
    train(named, optimizer, range(3, 4))
    assert optimizer.state[named[idle[1]]]["step"] == 3
    assert optimizer.state[named["norm.weight"]]["step"] == 4
    for parameter in named.values():
        parameter.grad = None
    optimizer.step()


def test_zero_gradients_only_decay() -> None:
    homes = all_homes()
    named = parameters(homes)
    start = {name: p.detach().clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(named).step()
    for name, home in homes.items():
        lr = 0.01 if home.set == "indexer" else 0.02
        torch.testing.assert_close(named[name].detach(), start[name] * (1 - lr * 0.1), atol=1e-7, rtol=1e-6)


def test_two_runs_are_equal_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        named = parameters(all_homes())
        train(named, optimizer_of(named), range(3))
        runs.append(named)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    def fresh() -> tuple[dict[str, torch.nn.Parameter], HybridOptimizer]:
        named = parameters(all_homes())
        for parameter in named.values():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        return named, optimizer_of(named)

    named, optimizer = fresh()
    train(named, optimizer, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer.named_state().items()}
    restored_named, restored = fresh()
    targets = restored.state_to_load(saved)
    assert targets.keys() == saved.keys()
    for key, tensor in saved.items():
        targets[key].copy_(tensor)
        assert tensor.dtype == (dtype if key.startswith("weight.") else torch.float32)
    restored.state_was_loaded(targets)
    train(named, optimizer, range(3, 5))
    train(restored_named, restored, range(3, 5))
    for name, parameter in named.items():
        assert torch.equal(parameter, restored_named[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key: key.replace("exp_avg.norm", "momentum.norm"), "another algorithm"),
        (lambda key: key.replace("exp_avg_sq.norm", "weight.x"), "lacks the moments of norm.weight"),
        (lambda key: key.replace("momentum.layers.0", "weight.x"), r"lacks the moments of layers\.0"),
    ],
)
def test_moments_of_another_kind_or_missing_ones_are_refused(change: Any, words: str) -> None:
    named = parameters(all_homes())
    optimizer = optimizer_of(named)
    optimizer.step()
    keys = [change(key) for key in optimizer.named_state()]
    with pytest.raises(ConfigError, match=words):
        optimizer_of(named).state_to_load(keys)


def test_weights_alone_may_be_loaded() -> None:
    named = parameters(all_homes())
    optimizer = optimizer_of(named)
    weights = list(optimizer.named_state())
    assert all(key.startswith("weight.") for key in weights)
    optimizer.step()
    assert list(optimizer.state_to_load(weights)) == weights


def test_closure_and_class_name() -> None:
    named = parameters(all_homes())
    optimizer = optimizer_of(named)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    assert "muon" not in type(optimizer).__name__.lower()  # DeepSpeed would take it for its own


def norm_of(homes: dict[str, Home], named: dict[str, torch.nn.Parameter], set_name: str) -> float:
    grads = [named[name].grad for name, home in homes.items() if home.set == set_name]
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads if grad is not None))


def test_sets_are_clipped_apart() -> None:
    homes = all_homes()
    named = parameters(homes)
    for name, home in homes.items():
        if home.set == "indexer":
            gradient(named[name]).mul_(1e-3)
    small = norm_of(homes, named, "indexer")
    large = norm_of(homes, named, "model")
    direction = gradient(named["norm.weight"]).clone()
    groups = optimizer_of(named).param_groups
    norms = clip_grad_norm_per_set(groups, 1.0)
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(
        {"model": large, "indexer": small}
    )
    assert small < 1 < large
    assert norm_of(homes, named, "model") == pytest.approx(1.0, rel=1e-5)
    assert norm_of(homes, named, "indexer") == small  # below the limit: not one bit moves
    torch.testing.assert_close(named["norm.weight"].grad, direction / large)


def test_inactive_sets_are_not_clipped_and_infinity_never_clips() -> None:
    homes = all_homes()
    named = parameters(homes)
    groups = optimizer_of(named).param_groups
    before = {name: gradient(p).clone() for name, p in named.items()}
    assert set(clip_grad_norm_per_set(groups, math.inf)) == {"model", "indexer"}
    assert all(torch.equal(gradient(named[name]), grad) for name, grad in before.items())
    set_active(groups, "indexer", False)
    assert set(clip_grad_norm_per_set(groups, 1.0)) == {"model"}
    for name, home in homes.items():
        assert torch.equal(gradient(named[name]), before[name]) == (home.set == "indexer")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_norm_that_is_not_finite_is_reported_for_its_set(bad: float, max_norm: float) -> None:
    named = parameters(all_homes())
    gradient(named["layers.1.self_attn.indexer.weights_proj.weight"])[0, 0] = bad
    norms = clip_grad_norm_per_set(optimizer_of(named).param_groups, max_norm)
    assert norms["model"].isfinite()
    assert not norms["indexer"].isfinite()


def test_a_set_without_gradients_has_norm_zero() -> None:
    named = parameters(all_homes())
    for parameter in named.values():
        parameter.grad = None
    norms = clip_grad_norm_per_set(optimizer_of(named).param_groups, 1.0)
    assert {name: norm.item() for name, norm in norms.items()} == {"model": 0.0, "indexer": 0.0}
