"""FP4 masters in the engine, the switch of precision, and what is logged of rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from model.init import initialize
from model.model import ForCausalLM
from model.precision import Precision
from model.quant import FP8_BLOCK, FP8_TILE, Block, dequantise_fp4, quantise_fp8, round_fp4
from optim.partition import is_expert
from tests.tiny import packed_batch, tiny_config, tiny_model
from tests.unit.train.test_engine import ALONE, load, run_config, uneven_batch
from train import quantisation
from train.config import RunConfig
from train.engine import TorchEngine
from train.loop import train_step
from train.quantisation import fp4_metrics, fp4_statistics, fp8_metrics, fp8_statistics, in_parts, observed
from train.sections import PrecisionConfig

FP4 = Precision(fp4_experts=True)


def engine_for(config: RunConfig, dtype: torch.dtype = torch.float32) -> TorchEngine:
    model = initialize(ForCausalLM(config.model), 0)
    return TorchEngine(model, config.optim, dtype, fp4_experts=True)


def steps(engine: TorchEngine, config: RunConfig, numbers: range) -> list[dict[str, float]]:
    found = []
    for step in numbers:
        engine.use(config.precision.at(step))
        found.append(train_step(engine, uneven_batch(), config, step, ALONE))
    return found


def quantised(**keys: Any) -> RunConfig:
    config = run_config()
    precision = PrecisionConfig("x", "float32", fp8=True, fp4_experts=True, fp4_indexer=True, fp8_kv=True)
    return replace(config, precision=replace(precision, **keys), train=replace(config.train, log_every=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compute_with_fp4_of_their_exact_masters(dtype: torch.dtype) -> None:
    """After every step; the masters are not rounded, other weights are not touched."""
    config = run_config()
    engine, plain = engine_for(config, dtype), engine_for(config, dtype)
    engine.use(FP4)
    for step in range(2):
        train_step(engine, uneven_batch(), config, step, ALONE)
        for name, parameter in engine.model.named_parameters():
            master = engine.masters[name]
            expected = round_fp4(master) if is_expert(name) else master
            assert torch.equal(parameter, expected.to(parameter.dtype)), name
            assert not is_expert(name) or not torch.equal(parameter.float(), master)
    engine.use(Precision())
    assert all(
        torch.equal(p, engine.masters[name].to(p.dtype)) for name, p in engine.model.named_parameters()
    )
    assert plain.narrow.keys() == engine.narrow.keys()


def test_gradients_go_straight_through() -> None:
    """A model whose experts hold FP4 numbers by themselves has the same loss and gradients."""
    config = run_config()
    engine, other = engine_for(config), engine_for(config)
    engine.use(FP4)
    with torch.no_grad():
        for name, master in other.masters.items():
            if is_expert(name):
                master.copy_(round_fp4(master))
        other._copy_masters()
    for each in (engine, other):
        output = each(uneven_batch())
        each.backward(output.losses["lm"][0])
    for name, master in engine.masters.items():
        one, grad = master.grad, other.masters[name].grad
        assert one is grad is None or (one is not None and grad is not None and torch.equal(one, grad)), name


def test_a_switch_is_exact_wherever_the_run_is_interrupted() -> None:
    config = quantised(qat_start=3)
    whole = engine_for(config)
    expected = steps(whole, config, range(5))
    for until in (2, 3, 4):
        first, second = engine_for(config), engine_for(config)
        assert steps(first, config, range(until)) == expected[:until]
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        second.use(config.precision.at(until))
        load(second, state)
        assert steps(second, config, range(until, 5)) == expected[until:]
        assert all(torch.equal(x, second.state()[name]) for name, x in whole.state().items())
    never = steps(engine_for(config), quantised(qat_start=100), range(5))
    assert never[:3] == [{k: v for k, v in e.items() if not k.startswith("fp4_")} for e in expected[:3]]
    assert never[3]["lm"] != expected[3]["lm"]


def test_a_precision_of_a_step() -> None:
    config = quantised(qat_start=7).precision
    assert config.at(6) == Precision(fp8=True)
    assert config.at(7) == Precision(True, True, True, True)
    with pytest.raises(ConfigError, match=r"precision\.qat_start is -1"):
        replace(config, qat_start=-1)
    with pytest.raises(ConfigError, match=r"model\.index_head_dim is 24; it must be a power of two"):
        replace(quantised(), model=replace(quantised().model, index_head_dim=24))


def test_what_is_logged_of_a_step() -> None:
    config = quantised()
    logged = steps(engine_for(config), config, range(2))
    assert not any(name.startswith(("fp8_", "fp4_")) for name in logged[0])  # every second one is measured
    errors = {name: value for name, value in logged[1].items() if name.startswith("fp8_error/")}
    kinds = {name.removeprefix("fp8_error/").split(".")[0] for name in errors}
    assert kinds == {"attention", "indexer", "shared_expert", "mtp", "expert"}
    assert errors.pop("fp8_error/expert.weight") == 0  # FP4 in FP8
    assert all(0.015 < value < 0.04 for value in errors.values()), errors
    assert {"fp8_error/attention.gradient", "fp8_error/indexer.gradient"} <= errors.keys()
    assert 0.05 < logged[1]["fp4_error"] < 0.15 and logged[1]["fp4_changed"] == 0
    plain = replace(config, precision=replace(config.precision, fp8=False, fp4_experts=False))
    assert not any("fp" in name for name in steps(engine_for(plain), plain, range(2))[1])


def test_looking_changes_nothing() -> None:
    config = quantised()
    silent = replace(config, train=replace(config.train, log_every=100))
    seen, unseen = steps(engine_for(config), config, range(4)), steps(engine_for(silent), silent, range(4))
    assert [step["lm"] for step in seen] == [step["lm"] for step in unseen]


@pytest.mark.parametrize(
    ("shape", "block", "parts"),
    [
        ((5, 130, 70), FP8_BLOCK, 5),
        ((300, 70), FP8_BLOCK, 3),
        ((300, 70), FP8_TILE, 3),
        ((0, 9), FP8_TILE, 1),
    ],
)
def test_parts_are_as_good_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block: Block, parts: int
) -> None:
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2]).unsqueeze(-1)
    assert len(list(in_parts(x))) == 1
    monkeypatch.setattr(quantisation, "AT_ONCE", 1)
    found = [fp8_statistics(part, block) for part in in_parts(x)]
    assert len(found) == parts
    torch.testing.assert_close(sum(found), fp8_statistics(x, block), rtol=1e-5, atol=0)


def test_parts_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a micro-batch of 160 rows, whatever is measured at once."""
    model, found = tiny_model(tiny_config("sc", 1)), []
    model.use(Precision(fp8=True))
    for at_once in (quantisation.AT_ONCE, 1):
        monkeypatch.setattr(quantisation, "AT_ONCE", at_once)
        sums: dict[str, Tensor] = {}
        with observed(model, Precision(fp8=True), sums):
            model(**packed_batch([[160]], 160)).losses["lm"][0].backward()
        found.append(torch.stack(list(sums.values())))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_fp8_statistics_by_hand() -> None:
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 1], x[0, 2] = 448.0, 2.0**-11, 17.0  # 2^-11 is lost; 17 is halfway between 16 and 18
    x[1, 130] = 2.0**-3
    metrics = fp8_metrics(
        {"a": fp8_statistics(x, FP8_TILE), "b": fp8_statistics(x[:0], FP8_TILE)}, lambda x: x
    )
    assert set(metrics) == {f"fp8_{kind}/a" for kind in ("error", "underflow", "largest", "span")}
    assert metrics["fp8_error/a"] == pytest.approx(((1 + 2.0**-22) / x.double().square().sum().item()) ** 0.5)
    assert metrics["fp8_underflow/a"] == 1 / 512 and metrics["fp8_largest/a"] == 1 / 512
    assert metrics["fp8_span/a"] == 11  # scales 1 and 2^-11: 2^-3 is 256 times that


def test_fp4_statistics_by_hand() -> None:
    x = torch.zeros(256, 128)
    x[0, 0], x[0, 1], x[0, 40], x[130, 0] = 6.0, 0.2, 3.5 * 2.0**-16, 1.0
    metrics = {name: float(value) for name, value in fp4_metrics(fp4_statistics(x)).items()}
    # Scales 1, 2^-16 and 2^-2 of the blocks that are not zero: in the first 128 rows they span 2^16.
    assert metrics["fp4_span"] == 8 and metrics["fp4_wide"] == 1 and metrics["fp4_changed"] == 0
    assert metrics["fp4_underflow"] == 1 / x.numel() and metrics["fp4_largest"] == 1 / x.numel()
    error = 0.2**2 + (0.5 * 2.0**-16) ** 2
    assert metrics["fp4_error"] == pytest.approx((error / x.double().square().sum().item()) ** 0.5)
    x[0, 40] = 1.5 * 2.0**-17  # 3 times 2^-18: FP8 has no place for it beside 6
    changed: Tensor = fp4_metrics(fp4_statistics(x))["fp4_changed"]
    fp4 = round_fp4(x)
    kept = quantise_fp8(fp4, FP8_BLOCK)
    assert changed == int((kept.values.float() * kept.scales.repeat_interleave(128, 0) != fp4).sum()) == 1
    assert dequantise_fp4(torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 1)).shape == (1, 32)


def test_masters_are_measured_together_as_one_by_one() -> None:
    stack = torch.randn(3, 200, 160) * torch.exp2(torch.arange(-2.0, 1.0)).view(3, 1, 1)
    torch.testing.assert_close(
        fp4_statistics(stack), sum(fp4_statistics(x) for x in stack), rtol=1e-6, atol=0
    )
