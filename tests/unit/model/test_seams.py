"""What is injected from outside, and what configurations switch: dispatcher, modes, precision, baselines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import AttentionMode
from model.model import ForCausalLM, stays_fp32
from model.moe import Dispatched, LocalDispatcher, Routing
from tests.tiny import FLASH, packed_batch, relative, tiny_config, tiny_model

BATCH = packed_batch([[40, 9], [12, 1, 36]], 50, depth=1)
FP32 = {
    "norm": [
        "norm.weight",
        "layers.{}.input_layernorm.weight",
        "layers.{}.post_attention_layernorm.weight",
        "layers.{}.self_attn.q_a_norm.weight",
        "layers.{}.self_attn.kv_norm.weight",
    ],
    "router": ["layers.{}.mlp.gate.weight"],
    "mHC": [f"layers.{{}}.{kind}_hc.{part}" for kind in ("attn", "ffn") for part in ("fn", "base", "scale")],
    "head": [f"hc_head.hc_{part}" for part in ("fn", "base", "scale")],
    "sinks": ["layers.{}.self_attn.sinks"],
    "compressor": [
        "layers.1.self_attn.compressor.position_bias",
        "layers.1.self_attn.compressor.kv_norm.weight",
        "layers.1.self_attn.indexer.compressor.position_bias",
        "layers.1.self_attn.indexer.compressor.kv_norm.weight",
        "layers.2.self_attn.compressor.position_bias",
        "layers.2.self_attn.compressor.kv_norm.weight",
    ],
}


def fp32_names() -> set[str]:
    """The list above for layers 0 to 2, and for the MTP block what a sliding layer has."""
    names = {name.format(i) for group in FP32.values() for name in group for i in range(3)}
    block = {n.replace("layers.0.", "mtp.0.block.") for n in names if n.startswith("layers.0.")}
    own = {"mtp.0.enorm.weight", "mtp.0.hnorm.weight", "mtp.0.norm.weight"}
    return names | block | own | {f"mtp.0.hc_head.hc_{part}" for part in ("fn", "base", "scale")}


def test_what_stays_fp32() -> None:
    """The whole list, nothing more; buffers are never cast."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1)).cast(torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == fp32_names() == {name for name, _ in model.named_parameters() if stays_fp32(name)}
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if n not in kept)
    assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}


def test_bf16_forward_and_backward() -> None:
    """Finite, near fp32 with the same experts and entries, gradients in each parameter's dtype."""
    config = tiny_config(FLASH, num_nextn_predict_layers=1, initializer_range=0.1)
    exact = tiny_model(config)
    wanted = exact(**BATCH)
    model = tiny_model(config).cast(torch.bfloat16)
    found = model(**BATCH, replay=wanted.expert_indices)
    for part, (loss, count) in wanted.losses.items():
        assert found.losses[part][0].dtype == torch.float32
        assert found.losses[part][0].item() == pytest.approx(loss.item(), rel=0.02)
        assert found.losses[part][1] == count
    for out in (found, wanted):
        (out.losses["lm"][0] + out.losses["mtp"][0]).backward()
    mine, theirs = [], []
    for (name, a), b in zip(model.named_parameters(), exact.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert a.grad.dtype == a.dtype and a.grad.isfinite().all(), name
            mine.append(a.grad.float().flatten())
            theirs.append(b.grad.flatten())
    assert relative(torch.cat(mine), torch.cat(theirs)) < 0.2
    logits = model(BATCH["input_ids"]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_cast_is_in_place() -> None:
    """The same parameter objects, so that optimizers and hooks made before keep them."""
    model = tiny_model(tiny_config("s"))
    before = {name: id(p) for name, p in model.named_parameters()}
    assert model.cast(torch.bfloat16) is model
    assert before == {name: id(p) for name, p in model.named_parameters()}


class Backwards:
    """A dispatcher with the same contract and rows of an expert in the opposite order."""

    def __init__(self, inner: LocalDispatcher):
        self.inner, self.calls = inner, 0

    def send(self, x: Tensor, routing: Routing) -> Dispatched:
        self.calls += 1
        flipped = Routing(routing.affinities, routing.indices.flip(0), routing.weights.flip(0))
        return self.inner.send(x.flip(0), flipped)

    def receive(self, sent: Dispatched) -> Dispatched:
        return self.inner.receive(sent)

    def combine(self, rows: Tensor, sent: Dispatched) -> Tensor:
        return self.inner.combine(rows, sent).flip(0)


def test_dispatcher_is_replaceable() -> None:
    model = tiny_model(tiny_config("sc", num_nextn_predict_layers=1)).double()
    wanted = model(**BATCH)
    moes: list[Any] = model.moes()
    for moe in moes:
        moe.dispatcher = Backwards(moe.dispatcher)
    found = model(**BATCH)
    assert [moe.dispatcher.calls for moe in moes] == [1, 1, 1]
    assert relative(found.losses["mtp"][0], wanted.losses["mtp"][0]) < 1e-12


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_indexer_gets_no_gradient_from_the_losses(mode: AttentionMode) -> None:
    """And nothing else goes without one."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1))
    out = model(**packed_batch([[140]], 140, depth=1), mode=mode)
    sum(loss for loss, _ in out.losses.values()).backward()
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == (".indexer." not in name), name


BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain residual": ("sch", {"residual": "plain", "hc_mult": 1}),
    "one stream": ("sch", {"hc_mult": 1}),
    "full attention": ("ff", {}),
    "full attention, plain residual": ("ff", {"residual": "plain", "hc_mult": 1}),
    "no hash layer": ("sch", {"hash_layers": 0}),
    "no MTP": ("sch", {"num_nextn_predict_layers": 0}),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name: str) -> None:
    """Finite losses, counts, shapes, and a gradient for every parameter but the indexer's."""
    layers, changes = BASELINES[name]
    model = tiny_model(tiny_config(layers, **{"num_nextn_predict_layers": 1, **changes}))
    batch = packed_batch([[130, 6], [40]], 140, depth=len(model.mtp))
    out = model(**batch, return_logits=True)
    assert out.logits.shape == (2, 140, 96) and out.logits.isfinite().all()
    assert out.losses["lm"][1] == 129 + 5 + 39
    assert set(out.losses) == {"lm", "balance"} | ({"mtp"} if model.mtp else set())
    if model.mtp:
        assert out.losses["mtp"][1] == 128 + 4 + 38
    sum(loss for loss, _ in out.losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if ".indexer." not in parameter_name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name


def test_state_dict_goes_both_ways() -> None:
    """Strict loading of one model's state into another gives the same output, buffers included."""
    first = tiny_model(tiny_config("sch", num_nextn_predict_layers=1), seed=0)
    second = ForCausalLM(first.config)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(**BATCH).losses["mtp"][0], second(**BATCH).losses["mtp"][0])
