from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from configs.errors import ConfigError
from data.config import DataConfig, TokenizerConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("data.path", lambda: DataConfig(path=" ")),
        ("data.text_column", lambda: DataConfig(text_column="")),
        ("data.max_bytes", lambda: DataConfig(max_bytes=0)),
        ("data.validation_fraction", lambda: DataConfig(validation_fraction=0.0)),
        ("data.validation_fraction", lambda: DataConfig(validation_fraction=1.0)),
        ("data.fim_rate", lambda: DataConfig(fim_rate=1.5)),
        ("data.cache_dir", lambda: DataConfig(cache_dir="")),
        ("data.tokenizer.kind", lambda: TokenizerConfig(kind="wordpiece")),
        ("data.tokenizer.path", lambda: TokenizerConfig(kind="file")),
        ("data.tokenizer.path", lambda: TokenizerConfig(kind="bpe", path="x.json")),
        ("data.tokenizer.vocab_size", lambda: TokenizerConfig(vocab_size=260)),
    ],
)
def test_a_wrong_value_is_one_line_naming_the_key(key, make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(f"{key}: ")
    assert "\n" not in str(caught.value)


def test_yaml_has_every_key_and_builds_the_dataclass():
    tree = OmegaConf.load(CONFIGS / "python.yaml")
    tree.tokenizer.vocab_size = 4096
    values = OmegaConf.to_container(tree, resolve=True)
    assert set(values) == {f.name for f in fields(DataConfig)}
    assert set(values["tokenizer"]) == {f.name for f in fields(TokenizerConfig)}
    config = DataConfig(**{**values, "tokenizer": TokenizerConfig(**values["tokenizer"])})
    assert config.path is None
    v4 = OmegaConf.merge(tree, OmegaConf.load(CONFIGS / "python_v4.yaml"))
    assert v4.tokenizer.kind == "deepseek_v4"
