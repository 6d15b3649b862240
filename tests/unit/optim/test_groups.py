from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import optim
from configs.errors import ConfigError
from model.config import CSA, HCA, ModelConfig
from model.model import ForCausalLM
from optim.config import OptimConfig
from optim.groups import RULES, build_groups, group_rows, rule_for, set_active
from tests.unit.optim.shapes import CONFIG, all_homes, parameters

PRESETS = sorted((Path(optim.__file__).parents[1] / "configs" / "model").glob("*.yaml"))


def homes_of(groups: list[dict[str, Any]]) -> dict[str, tuple[str, str, Any]]:
    found = {}
    for group in groups:
        blocks = group.get("blocks", [None] * len(group["names"]))
        for name, rows in zip(group["names"], blocks, strict=True):
            assert name not in found
            found[name] = (group["algorithm"], group["set"], rows)
    return found


@pytest.mark.parametrize("residual", ["mhc", "plain"])
def test_every_parameter_gets_its_home(residual: str) -> None:
    homes = all_homes(residual)
    found = homes_of(build_groups(parameters(homes).items(), CONFIG, OptimConfig()))
    assert set(found) == set(homes)
    for name, home in homes.items():
        rows = (home.blocks or (home.shape[-2],)) if home.algorithm == "muon" else None
        assert found[name] == (home.algorithm, home.set, rows), name


def test_groups_hold_the_parameters_of_their_names_and_every_setting() -> None:
    named = parameters(all_homes())
    config = OptimConfig(lr=0.5, indexer_lr=0.1, weight_decay=0.2, momentum=0.8, update_rms=0.3, eps=1e-9)
    groups = build_groups(named.items(), CONFIG, config)
    assert [(g["set"], g["algorithm"]) for g in groups] == [
        ("model", "adamw"),
        ("model", "muon"),
        ("indexer", "muon"),
        ("indexer", "adamw"),
    ]
    for group in groups:
        assert [id(named[name]) for name in group["names"]] == [id(p) for p in group["params"]]
        lr = 0.1 if group["set"] == "indexer" else 0.5
        assert (group["lr"], group["lr_scale"], group["weight_decay"]) == (lr, lr / 0.5, 0.2)
        if group["algorithm"] == "muon":
            assert (group["momentum"], group["update_rms"]) == (0.8, 0.3)
        else:
            assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-9)
    set_active(groups, "indexer", False)
    assert [group["active"] for group in groups] == [True, True, False, False]


def test_the_baseline_gives_everything_to_adamw() -> None:
    homes = all_homes()
    found = homes_of(build_groups(parameters(homes).items(), CONFIG, OptimConfig(name="adamw")))
    assert found == {name: ("adamw", home.set, None) for name, home in homes.items()}


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.new_proj.weight",
        "model.layers.0.self_attn.q_a_proj.weight",  # transformers' prefix
        "layers.0.self_attn.q_a_proj.weight.more",
        "layers.x.self_attn.q_a_proj.weight",
        "layers.0.self_attn.q_a_projXweight",
        "embed_tokens.weight_norm",
        "mtp.0.layers.0.self_attn.sinks",
    ],
)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_an_unknown_name_is_an_error_that_names_it(name: str, algorithm: str) -> None:
    named = parameters(all_homes()) | {name: torch.nn.Parameter(torch.ones(2, 2))}
    with pytest.raises(ConfigError, match="0 rules match") as error:
        build_groups(named.items(), CONFIG, OptimConfig(name=algorithm))
    assert repr(name) in str(error.value)


def test_a_name_with_two_rules_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.groups.RULES", (*RULES, RULES[0]))
    with pytest.raises(ConfigError, match="2 rules match"):
        rule_for("layers.0.self_attn.q_a_proj.weight")


def test_blocks_that_do_not_fill_the_matrix_are_an_error() -> None:
    named = {"layers.0.self_attn.o_a_proj.weight": torch.nn.Parameter(torch.ones(9, 3))}
    with pytest.raises(ConfigError, match=r"o_a_proj\.weight' has 9 rows"):
        build_groups(named.items(), CONFIG, OptimConfig())
    flat = {"layers.0.self_attn.o_a_proj.weight": torch.nn.Parameter(torch.ones(8))}
    with pytest.raises(ConfigError, match=r"has shape \[8\]"):
        build_groups(flat.items(), CONFIG, OptimConfig())


def test_the_table_counts_everything_once() -> None:
    homes = all_homes()
    rows = group_rows(build_groups(parameters(homes).items(), CONFIG, OptimConfig()))
    assert [row.group for row in rows] == ["model-adamw", "model-muon", "indexer-muon", "indexer-adamw"]
    for row in rows:
        mine = [home for home in homes.values() if (home.algorithm, home.set) == (row.algorithm, row.set)]
        assert row.tensors == len(mine)
        assert row.parameters == sum(torch.Size(home.shape).numel() for home in mine)
    # A layer: 4 whole, 2 groups, 6 mixing parts, router, 3 experts of gate, up and down, 3 shared.
    # CSA adds 4 halves, HCA 2 wholes; outside: 2 heads, e_proj, h_proj.
    assert rows[1].matrices == 4 * (4 + 2 + 6 + 1 + 9 + 3) + 4 + 2 + 4
    assert (rows[0].matrices, rows[2].matrices, rows[3].matrices) == (0, 4 + 2, 0)
    assert rows[2].examples.split(", ")[0] == "layers.*.self_attn.indexer.compressor.kv_proj.weight"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_real_model_is_covered(preset: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(preset))
    assert isinstance(values, dict)
    config = ModelConfig(**{str(key): value for key, value in values.items()})
    with torch.device("meta"):
        model = ForCausalLM(config)
    rows = group_rows(build_groups(model.named_parameters(), config, OptimConfig()))
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    csa, hca = (config.layer_types.count(kind) for kind in (CSA, HCA))
    mixing = 6 * blocks + 1 + config.num_nextn_predict_layers if config.residual == "mhc" else 0
    per_block = 4 + config.o_groups + 1 + 3 * config.n_routed_experts + 3
    matrices = blocks * per_block + mixing + 4 * csa + 2 * hca + 2 * config.num_nextn_predict_layers
    assert sum(row.matrices for row in rows if row.set == "model") == matrices
    assert sum(row.matrices for row in rows if row.set == "indexer") == 6 * csa
