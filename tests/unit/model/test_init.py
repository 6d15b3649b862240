"""Initialisation: one table covers every parameter of every preset, by name and seed alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from model.config import ModelConfig
from model.init import TABLE, initialize
from model.model import ForCausalLM
from tests.tiny import tiny_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
BASELINES = [{"residual": "plain", "hc_mult": 1}, {"hc_mult": 1}]


def filled(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return initialize(ForCausalLM(config), seed).state_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_table_covers_every_preset(preset: str) -> None:
    """On the meta device: nothing is allocated. Every parameter finds its row, most find exactly one."""
    with torch.device("meta"):
        model = ForCausalLM(ModelConfig(**yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())))
    names = [name for name, _ in model.named_parameters()]
    rows = {name: [pattern for pattern, _, _ in TABLE if re.fullmatch(pattern, name)] for name in names}
    assert all(rows.values()), [name for name in names if not rows[name]][:3]
    used = Counter(found[0] for found in rows.values())
    assert set(used) == {pattern for pattern, _, _ in TABLE}  # no row is dead
    norms = [name for name in names if name.endswith("norm.weight")]
    assert all(rows[name][0] == TABLE[0][0] for name in norms) and len(norms) == used[TABLE[0][0]]


@pytest.mark.parametrize("changes", [{}, *BASELINES], ids=str)
@pytest.mark.parametrize("layers", ["sch", "fs"])
def test_nothing_is_left_uninitialised(layers: str, changes: dict) -> None:
    """Everything, buffers too, is NaN or an impossible expert before."""
    model = ForCausalLM(tiny_config(layers, num_nextn_predict_layers=1, **changes))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-1)
    state = initialize(model, 0).state_dict()
    assert all(not tensor.isnan().any() for tensor in state.values())
    tables = [tensor for name, tensor in state.items() if name.endswith("tid2eid")]
    assert len(tables) == 1 and tables[0].min() == 0 and tables[0].max() == 7
    biases = [tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == len(layers) and not any(bias.any() for bias in biases)


def test_unknown_parameter_is_refused() -> None:
    model = ForCausalLM(tiny_config("s"))
    model.layers[0].surprise = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match=r"layers\.0\.surprise"):
        initialize(model, 0)


def test_values_depend_on_name_and_seed_alone() -> None:
    """Not on what else the model holds; every tensor draws differently."""
    small, large = filled(tiny_config("sc")), filled(tiny_config("sc", num_nextn_predict_layers=2))
    assert set(small) < set(large)
    assert all(torch.equal(small[name], large[name]) for name in small)
    other = filled(tiny_config("sc"), seed=1)
    random = [
        name for name in small if re.search(r"_proj|_hc\.fn|hc_fn|lm_head|embed_tokens|gate\.weight", name)
    ]
    assert len(random) > 20
    assert not any(torch.equal(small[name], other[name]) for name in random)
    first = [round(float(small[name].flatten()[0] / small[name].std()), 6) for name in random]
    assert len(set(first)) == len(first)


def test_values_do_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ForCausalLM(tiny_config("sc"))
    backwards = list(model.named_parameters())[::-1]
    monkeypatch.setattr(model, "named_parameters", lambda: iter(backwards))
    state, expected = initialize(model, 0).state_dict(), filled(tiny_config("sc"))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_values() -> None:
    """Standard deviations and constants, one by one."""
    config = tiny_config("ch", hidden_size=64, initializer_range=0.02, num_nextn_predict_layers=1)
    state = filled(config)

    def std(name: str) -> float:
        return state[name].std().item()

    for name in ("embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.q_b_proj.weight"):
        assert std(name) == pytest.approx(0.02, rel=0.05)
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.0.attn_hc.fn", "mtp.0.e_proj.weight"):
        assert std(name) == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_b_proj.weight", "mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"):
        assert std(f"layers.0.{name}") == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        if name.endswith(("sinks", "position_bias")):
            assert not tensor.any()
        if name.endswith("scale"):
            assert (tensor == 0.01).all()
    pre, post, comb = state["layers.0.ffn_hc.base"].split([4, 4, 16])
    assert torch.allclose(pre.sigmoid(), torch.tensor(0.25)) and not post.any()
    diagonal = comb.view(4, 4).diagonal()
    assert (diagonal > 1).all() and comb.sum() == diagonal.sum()
    assert torch.allclose(state["hc_head.hc_base"].sigmoid(), torch.tensor(0.25))
