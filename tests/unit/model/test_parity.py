"""Same weights in, same logits and gradients out: against `DeepseekV4ForCausalLM` of transformers.

In fp64 both must agree to the last digits; in fp32, as both are used, to 1e-5. A few fp32 gradients, such as
that of a hyper-connection's three scales, are sums over all tokens that nearly cancel: there two correct
programs differ by more, so we are compared with fp64 instead, as transformers is. Comparing means something
only where rounding cannot change a choice, so the margins of every top-k are asserted too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4ForCausalLM,
    DeepseekV4RotaryEmbedding,
)

import model.indexer
from model.config import ModelConfig
from model.hf import to_hf_state_dict
from model.kernels.indexer import index_scores, select_entries
from model.model import ForCausalLM
from model.moe import Router
from model.rope import inverse_frequencies
from tests.tiny import FLASH, PRO, relative, tiny_config, tiny_model

M = TypeVar("M", bound=torch.nn.Module)

TOLERANCE = 1e-5  # fp32
EXACT = 1e-10  # fp64
# Gradients of a few numbers, each a sum over all tokens that nearly cancels.
CANCELLING = re.compile(r"_hc\.(scale|base)$|hc_head\.hc_(scale|base)$|\.sinks$")
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"
LENGTHS = (1, 3, 4, 127, 128, 129, 261, 389)
SINGLE = [(kind, hashed, length) for kind in "sch" for hashed in (0, 1) for length in (5, 50, 300)]
PATTERNS = [(pattern, 2, length) for pattern in (FLASH, PRO) for length in LENGTHS]


def oracle_with_weights_of(ours: ForCausalLM) -> DeepseekV4ForCausalLM:
    config = DeepseekV4Config(**ours.config.to_hf())
    oracle = DeepseekV4ForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).float()
    oracle.load_state_dict(to_hf_state_dict(ours.state_dict(), ours.config), strict=True)
    return oracle


class Margins:
    """Watches every top-k of a model: the relative gap between the last kept and the first left out."""

    def __init__(self, ours: ForCausalLM, monkeypatch: pytest.MonkeyPatch):
        self.indexer: list[Tensor] = []
        self.router: list[Tensor] = []
        monkeypatch.setattr(model.indexer, "select_entries", self._select)
        for module in ours.modules():
            if isinstance(module, Router) and not module.is_hash:
                module.register_forward_hook(self._route)

    def _select(
        self, q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, topk: int, ranked_in: torch.dtype
    ) -> Tensor:
        scores = index_scores(q.double(), k.double(), weights.double())
        self.indexer.append(gap(scores.masked_fill(~visible, -torch.inf)[visible.sum(-1) > topk], topk))
        return select_entries(q, k, weights, visible, topk, ranked_in)

    def _route(self, router: Router, inputs: tuple, routing) -> None:
        self.router.append(gap(routing.affinities + router.get_buffer("e_score_correction_bias"), router.k))


def gap(scores: Tensor, k: int) -> Tensor:
    """Between the k-th and the next score [n, E], over the root mean square of the row's finite ones."""
    if scores.numel() == 0:
        return scores.new_zeros(0)
    best = scores.topk(k + 1, dim=-1).values
    finite = scores.masked_fill(scores.isinf(), 0)
    scale = (finite.square().sum(-1) / scores.isfinite().sum(-1)).sqrt()
    return (best[:, -2] - best[:, -1]) / scale


class KeepFp64(TorchFunctionMode):
    """Leaves fp64 tensors alone where transformers' code would compute in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def widened(model: M) -> M:
    """All weights and biases in fp64; inverse frequencies stay fp32 on both sides."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == torch.float32 and "inv_freq" not in name:
            tensor.data, tensor.grad = tensor.data.double(), None
    return model


def ours_on(model: ForCausalLM, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits and all gradients of the summed loss, by transformers' names."""
    out = model(ids, labels, return_logits=True)
    assert out.logits is not None
    out.losses["lm"][0].backward()
    state = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"logits": out.logits.detach(), **to_hf_state_dict(state, model.config)}


def oracle_on(model: DeepseekV4ForCausalLM, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize(("layers", "hashed", "length"), SINGLE + PATTERNS)
def test_logits_and_every_gradient(
    layers: str, hashed: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tiny_model(tiny_config(layers, hashed), seed=1)
    oracle, margins = oracle_with_weights_of(ours), Margins(ours, monkeypatch)
    generator = torch.Generator().manual_seed(length)
    ids, labels = torch.randint(0, ours.config.vocab_size, (2, 2, length), generator=generator)

    found, wanted = ours_on(ours, ids, labels), oracle_on(oracle, ids, labels)
    assert_clear_choices(margins, ours.config, length)
    exact = ours_on(widened(ours), ids, labels)
    with KeepFp64():
        oracle_exact = oracle_on(widened(oracle), ids, labels)
    assert set(found) == set(wanted)
    for name in wanted:
        error = relative(exact[name], oracle_exact[name])
        assert error <= EXACT, f"{name} in fp64: {error:.1e}"

    hard = {name for name in wanted if relative(found[name], wanted[name]) > TOLERANCE}
    assert len(hard) <= 8, hard
    for name in hard:
        error, limit = relative(found[name], exact[name]), 3e-4 if CANCELLING.search(name) else 2e-5
        assert error <= max(limit, relative(wanted[name], exact[name])), f"{name} in fp32: {error:.1e}"


def assert_clear_choices(margins: Margins, config: ModelConfig, length: int) -> None:
    """Every choice is far clearer than fp32's rounding, and there were choices to make."""
    sparse = config.layer_types.count("compressed_sparse_attention")
    assert len(margins.indexer) == (sparse if length // 4 > config.index_topk else 0)
    assert all(len(gaps) == 2 * (length + 1 - 4 * (config.index_topk + 1)) for gaps in margins.indexer)
    for gaps in margins.indexer + margins.router:
        assert gaps.numel() == 0 or gaps.min() > TOLERANCE, gaps.min()


def test_margins_see_a_tie() -> None:
    assert gap(torch.tensor([[3.0, 2.0, 2.0, -torch.inf]]), 2).item() == 0
    assert gap(torch.tensor([[2.0, 0.0, 1.0]]), 1).item() > 0.5


@pytest.mark.parametrize("preset", ["v4_flash", "v4_pro", None])
def test_inverse_frequencies(preset: str | None) -> None:
    values = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) if preset else None
    config = ModelConfig(**values) if values else tiny_config("sch")
    oracle = DeepseekV4RotaryEmbedding(DeepseekV4Config(**config.to_hf()))
    ours = {
        kind: inverse_frequencies(rope, config.qk_rope_head_dim)
        for kind, rope in config.rope_parameters.items()
    }
    for kind, frequencies in ours.items():
        theirs = getattr(oracle, f"{kind}_inv_freq")
        assert frequencies.shape == theirs.shape == (config.qk_rope_head_dim // 2,)
        assert ((frequencies - theirs).abs() <= 1e-6 * theirs).all()
        assert getattr(oracle, f"{kind}_attention_scaling") == 1.0
    slowest = 160000.0 ** -(1 - 2 / config.qk_rope_head_dim)
    assert ours["compress"][-1] == pytest.approx(slowest / 16, rel=1e-5)  # YaRN is on
    assert ours["compress"][0] == 1 == ours["main"][0]
