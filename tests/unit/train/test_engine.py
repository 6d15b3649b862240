"""The reference engine: exact accumulation, masters, clipping, refusal of what is not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.compose import compose
from configs.errors import ConfigError
from model.init import initialize
from model.model import ForCausalLM
from tests.tiny import tiny_config
from train.config import RunConfig
from train.engine import Batch, Engine, TorchEngine
from train.loop import label_counts, loss_weights, train_step
from train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def run_config(batch_rows: int = 4, micro: int = 4, length: int = 40, **model: object) -> RunConfig:
    base = compose(["optim.warmup_steps=1", "optim.lr=0.01", "optim.decay_fraction=0.5"])
    model_config = tiny_config("sc", 1, **{"num_nextn_predict_layers": 1, "hc_sinkhorn_iters": 2, **model})
    train = replace(base.train, steps=10, seq_len=length, micro_batch=micro, batch_tokens=batch_rows * length)
    data = replace(base.data, tokenizer=replace(base.data.tokenizer, kind="file", path="x", vocab_size=90))
    return RunConfig(model_config, data, base.optim, base.precision, train, base.run)


def uneven_batch(rows: int = 4, length: int = 40) -> Batch:
    """Packed rows with different numbers of labels, and one row with much padding."""
    torch.manual_seed(0)
    ids = torch.randint(2, 90, (rows, length + 2))
    documents = torch.zeros(rows, length, dtype=torch.int64)
    documents[1, 17:] = 1
    documents[2, 5:] = -1
    ends = torch.ones(rows, length, dtype=torch.bool)
    ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
    labels = ids[:, 1:-1].masked_fill(ends | (documents < 0), -100)
    before_end = torch.cat((ends[:, 1:], torch.ones(rows, 1, dtype=torch.bool)), dim=1)
    further = ids[:, 2:].masked_fill((labels == -100) | before_end, -100)
    positions = torch.arange(length).expand(rows, -1).clone()
    positions[1, 17:] -= 17
    positions[2, 5:] -= 5
    return {
        "input_ids": ids[:, :-2],
        "labels": labels,
        "position_ids": positions,
        "document_ids": documents,
        "next_ids": further.unsqueeze(-1),
    }


def engine_for(config: RunConfig, dtype: torch.dtype = torch.float32) -> TorchEngine:
    return TorchEngine(initialize(ForCausalLM(config.model), 0), config.optim, dtype)


def load(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    targets = engine.state_to_load({key: tuple(tensor.shape) for key, tensor in state.items()})
    for key, target in targets.items():
        target.copy_(state[key])
    engine.state_was_loaded(targets)


def test_micro_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over counts of the whole step: 4 rows at once or one by one give the same losses and gradients."""
    grads: list[dict[str, torch.Tensor]] = []

    def keep_gradients(engine: TorchEngine, lr: float, measure: bool) -> dict[str, torch.Tensor]:
        grads.append({name: p.grad for name, p in engine.masters.items() if p.grad is not None})
        return {"grad_norm_model": torch.zeros(())}

    monkeypatch.setattr(TorchEngine, "step", keep_gradients)
    whole, parts = (
        train_step(engine_for(config), uneven_batch(), config, 0, ALONE)
        for config in (run_config(micro=4), run_config(micro=1))
    )
    assert parts == pytest.approx(whole, rel=1e-6)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, grad in grads[0].items():
        assert torch.linalg.vector_norm(grad - grads[1][name]) <= 2e-5 * torch.linalg.vector_norm(grad), name


def test_loss_falls_on_one_batch() -> None:
    config = run_config()
    engine = engine_for(config)
    losses = [train_step(engine, uneven_batch(), config, step, ALONE)["lm"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.5


def test_bf16_keeps_fp32_masters_and_gradients() -> None:
    config = run_config()
    engine = engine_for(config, torch.bfloat16)
    batch = uneven_batch()
    for _ in range(2):
        output = engine(batch)
        engine.backward(output.losses["lm"][0] / output.losses["lm"][1])
    name = "layers.0.self_attn.q_a_proj.weight"
    weight, master = engine.narrow[name], engine.masters[name]
    assert weight.dtype == torch.bfloat16 and weight.grad is None
    assert master.dtype == torch.float32 and master.grad is not None and master.grad.dtype == torch.float32
    assert "layers.0.mlp.gate.weight" not in engine.narrow  # routers stay fp32
    once = run_config()
    twin = engine_for(once, torch.bfloat16)
    output = twin(batch)
    twin.backward(output.losses["lm"][0] / output.losses["lm"][1])
    once_grad = twin.masters[name].grad
    assert once_grad is not None and torch.equal(master.grad, 2 * once_grad)  # accumulated exactly
    before = master.detach().clone()
    engine.step(0.01)
    assert not torch.equal(master, before)
    assert torch.equal(weight, master.to(torch.bfloat16))


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    config = run_config()
    engine = engine_for(config)
    before = {name: p.detach().clone() for name, p in engine.masters.items()}
    output = engine(uneven_batch())
    engine.backward(output.losses["lm"][0] * float("nan"))
    norms = engine.step(0.01)
    assert not norms["grad_norm_model"].isfinite()
    assert all(torch.equal(p, before[name]) for name, p in engine.masters.items())
    assert all(p.grad is None for p in engine.masters.values())


def test_state_round_trip_continues_exactly() -> None:
    config = run_config()
    engine = engine_for(config)
    for step in range(3):
        train_step(engine, uneven_batch(), config, step, ALONE)
    kept = {name: tensor.clone() for name, tensor in engine.state().items()}
    expected = [train_step(engine, uneven_batch(), config, step, ALONE) for step in (3, 4)]
    resumed = engine_for(config)
    load(resumed, kept)
    assert [train_step(resumed, uneven_batch(), config, step, ALONE) for step in (3, 4)] == expected
    assert any(name.startswith("buffer.") and "e_score_correction_bias" in name for name in kept)


def test_state_of_another_model_is_refused() -> None:
    engine = engine_for(run_config())
    state = dict(engine.state())
    del state["weight.norm.weight"]
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        load(engine, state)
    state = {**engine.state(), "weight.norm.weight": torch.zeros(5)}
    with pytest.raises(ConfigError, match=r"norm\.weight is \[5\]"):
        load(engine, state)


def test_mtp_weight_falls_with_the_decay() -> None:
    config = run_config()
    assert loss_weights(config, 4)["mtp"] == config.train.mtp_loss_weight
    assert loss_weights(config, 5)["mtp"] == config.train.mtp_decay_loss_weight


def test_balance_bias_follows_the_loads() -> None:
    config = run_config()
    engine = engine_for(config)
    train_step(engine, uneven_batch(), config, 0, ALONE)
    bias = engine.model.moes()[1].gate.e_score_correction_bias
    rate = config.train.bias_update_rate
    assert all(size in (0, pytest.approx(rate)) for size in bias.abs().unique().tolist())
    assert bias.abs().max() > 0


def indexer_run(mode: str = "sparse", weight: float = 1.0, **options: Any) -> RunConfig:
    config = run_config(index_topk=3, **options)
    return replace(config, train=replace(config.train, attention_mode=mode, indexer_loss_weight=weight))


def own_of_the_indexer(key: str) -> bool:
    return ".indexer." in key


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_indexers_loss_touches_nothing_else(mode: str, name: str) -> None:
    """Bitwise: the first step's losses, norm and clipping, then all other weights and moments."""
    found = []
    for weight in (0.0, 100.0):  # a huge gradient of its own
        config = indexer_run(mode, weight)
        config = replace(config, optim=replace(config.optim, name=name, clip_norm=0.1))
        engine = engine_for(config)
        before = {key: x.clone() for key, x in engine.state().items()}
        found.append((train_step(engine, uneven_batch(), config, 0, ALONE), engine.state(), before))
    (off, without, before), (on, state, _) = found
    assert on.keys() - off.keys() == {"indexer", "grad_norm_indexer"}
    assert all(on[key] == value for key, value in off.items()) and off["grad_norm_model"] > 0.1
    assert on["grad_norm_indexer"] > 0.1 and on["indexer"] > 0
    assert state.keys() == without.keys()  # moments of what rests, too
    for key, x in without.items():
        moved = not torch.equal(x, state[key])
        assert moved == own_of_the_indexer(key), key
        if own_of_the_indexer(key):
            assert torch.equal(x, before[key]) if key.startswith("weight.") else not x.any(), key


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_warming_up_moves_the_indexer_only(name: str) -> None:
    """Losses are those of dense attention; no weight decay, no momentum, no bias of another part changes."""
    dense, config = indexer_run("dense"), indexer_run("warmup")
    dense, config = (replace(c, optim=replace(c.optim, name=name)) for c in (dense, config))
    wanted = train_step(engine_for(dense), uneven_batch(), dense, 0, ALONE)
    engine = engine_for(config)
    before = {key: x.clone() for key, x in engine.state().items()}
    found = train_step(engine, uneven_batch(), config, 0, ALONE)
    assert {key: found[key] for key in ("lm", "mtp", "balance", "indexer", "grad_norm_indexer")} == {
        key: wanted[key] for key in ("lm", "mtp", "balance", "indexer", "grad_norm_indexer")
    }
    assert "grad_norm_model" not in found
    assert loss_weights(config, 0) == {"indexer": 1.0}  # backward goes through nothing else
    for key, x in engine.state().items():
        kind = key.partition(".")[0]
        if own_of_the_indexer(key):
            assert x.any() and (kind != "weight" or not torch.equal(x, before[key])), key
        elif kind in ("weight", "buffer"):
            assert torch.equal(x, before[key]), key
        elif kind != "rng":
            assert not x.any(), key


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resuming_over_a_switch_of_modes_is_exact(name: str) -> None:
    """From the checkpoint before or after any switch; sets that never trained have moments, too."""
    modes = [
        ("warmup", 1.0),
        ("dense", 0.0),
        ("dense", 1.0),
        ("warmup", 1.0),
        ("sparse", 1.0),
        ("sparse", 0.0),
    ]
    configs = [indexer_run(*mode) for mode in modes]
    configs = [replace(c, optim=replace(c.optim, name=name)) for c in configs]

    def advance(engine: TorchEngine, first: int) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
        logged, states = [], []
        for step in range(first, len(configs)):
            states.append({key: x.clone() for key, x in engine.state().items()})
            logged.append(train_step(engine, uneven_batch(), configs[step], step, ALONE))
        return logged, [*states, engine.state()]

    wanted, states = advance(engine_for(configs[0]), 0)
    assert all(state.keys() == states[1].keys() for state in states[1:])
    for first in range(1, len(configs)):
        engine = engine_for(configs[0])
        load(engine, states[first])
        logged, resumed = advance(engine, first)
        assert logged == wanted[first:]
        assert all(torch.equal(x, states[-1][key]) for key, x in resumed[-1].items())


def test_a_checkpoint_from_before_the_indexer_learned_goes_on() -> None:
    config = indexer_run()
    engine = engine_for(config)
    train_step(engine, uneven_batch(), config, 0, ALONE)
    kinds = ("momentum.", "exp_avg", "step.")
    old = {k: x for k, x in engine.state().items() if not (own_of_the_indexer(k) and k.startswith(kinds))}
    resumed = engine_for(config)
    load(resumed, old)
    assert train_step(resumed, uneven_batch(), config, 1, ALONE)["indexer"] > 0
    del old["momentum.layers.0.self_attn.kv_proj.weight"]
    with pytest.raises(ConfigError, match=r"lacks the moments of layers\.0\.self_attn\.kv_proj"):
        load(engine_for(config), old)


def test_counts_are_known_before_the_forward_pass() -> None:
    """By loops over documents and from the losses of micro-batches."""
    config, batch = indexer_run(), uneven_batch()
    counts = label_counts(batch, config, ALONE)
    assert counts["indexer"] == (40 - 3) + (17 - 3 + 23 - 3) + (5 - 3) + (40 - 3)
    losses = engine_for(config)(batch, indexer_loss=True).losses
    assert counts == {part: int(count) for part, (_, count) in losses.items()}
    assert label_counts(batch, indexer_run(weight=0.0), ALONE).keys() == counts.keys() - {"indexer"}


def test_warming_up_needs_something_to_warm_up() -> None:
    with pytest.raises(ConfigError, match=r"indexer_loss_weight is 0.*more than 0"):
        indexer_run("warmup", 0.0)
    config = indexer_run("warmup")
    sliding = ["sliding_attention"] * 2
    with pytest.raises(ConfigError, match=r"attention_mode is 'warmup'.*sparse or dense"):
        replace(config, model=replace(config.model, layer_types=sliding))
