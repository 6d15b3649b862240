from __future__ import annotations

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import optim
from configs.errors import ConfigError
from optim.config import OptimConfig

YAML = Path(optim.__file__).parents[1] / "configs" / "optim"


def merged(text: str) -> OptimConfig:
    schema = OmegaConf.structured(OptimConfig)
    OmegaConf.set_readonly(schema, False)
    config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(text)))
    assert isinstance(config, OptimConfig)
    return config


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_yaml_merges_into_the_dataclass(name: str) -> None:
    config = merged((YAML / f"{name}.yaml").read_text())
    assert config.name == name
    assert (config.eps, config.betas, config.lr) == (1e-20, [0.9, 0.95], 2.7e-4)
    assert config.indexer_lr is None


def test_yaml_numbers_become_floats() -> None:
    config = merged("{eps: 1e-20, lr: 1, indexer_lr: 3e-4, clip_norm: .inf}")
    assert (config.eps, config.lr, config.indexer_lr, config.clip_norm) == (1e-20, 1.0, 3e-4, math.inf)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "Muon"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("final_lr_ratio", 1.1),
        ("warmup_steps", -1),
        ("decay_fraction", -0.1),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("eps", 0.0),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
        ("update_rms", 0.0),
        ("indexer_lr", 0.0),
        ("newton_schulz_dtype", "float16"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        OptimConfig(**{key: value})  # type: ignore[arg-type]
    assert f"optim.{key} is {value!r}; it must be " in str(error.value)
    assert "\n" not in str(error.value)
