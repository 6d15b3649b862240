from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from configs.compose import compose
from configs.errors import ConfigError
from data.config import MOST_SOURCES, DataConfig, SourceConfig, TokenizerConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
INF = float("inf")
NAN = float("nan")


def source(**fields) -> DataConfig:
    """A configuration whose only source, `x`, has these fields."""
    return DataConfig(sources={"x": SourceConfig(**({"files": ["a"]} | fields))})


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("data.path", lambda: DataConfig(path=" ")),
        ("data.text_column", lambda: DataConfig(text_column="")),
        ("data.max_bytes", lambda: DataConfig(max_bytes=0)),
        ("data.validation_fraction", lambda: DataConfig(validation_fraction=0.0)),
        ("data.validation_fraction", lambda: DataConfig(validation_fraction=1.0)),
        ("data.validation_fraction", lambda: DataConfig(validation_fraction=NAN)),
        ("data.fim_rate", lambda: DataConfig(fim_rate=1.5)),
        ("data.shuffle_shards", lambda: DataConfig(shuffle_shards=0)),
        ("data.workers", lambda: DataConfig(workers=0)),
        ("data.patience_minutes", lambda: DataConfig(patience_minutes=-1.0)),
        ("data.patience_minutes", lambda: DataConfig(patience_minutes=INF)),
        ("data.patience_minutes", lambda: DataConfig(patience_minutes=NAN)),
        ("data.on_change", lambda: DataConfig(on_change="ignore")),
        ("data.cache_dir", lambda: DataConfig(cache_dir="")),
        ("data.tokenizer.kind", lambda: TokenizerConfig(kind="wordpiece")),
        ("data.tokenizer.path", lambda: TokenizerConfig(kind="file")),
        ("data.tokenizer.path", lambda: TokenizerConfig(kind="bpe", path="x.json")),
        ("data.tokenizer.vocab_size", lambda: TokenizerConfig(vocab_size=260)),
        ("data.sources.x", lambda: source(files=[])),
        ("data.sources.x", lambda: source(dataset="o/n")),
        ("data.sources.x", lambda: source(files=[], dataset="o/n", of="y")),
        ("data.sources.x.files", lambda: source(files=["a", " "])),
        ("data.sources.x", lambda: source(subset="s")),
        ("data.sources.x", lambda: source(revision="r")),
        ("data.sources.x.text_column", lambda: source(text_column="")),
        ("data.sources.x.weight", lambda: source(weight=-0.1)),
        ("data.sources.x.weight", lambda: source(weight=INF)),
        ("data.sources.x.weight", lambda: source(weight=NAN)),
        ("data.sources", lambda: source(weight=0.0)),
        ("data.sources.x", lambda: source(min_tokens=-1)),
        ("data.sources.x", lambda: source(min_tokens=9, max_tokens=8)),
        ("data.sources.x", lambda: source(max_tokens=0)),
        ("data.sources.x.fim_rate", lambda: source(fim_rate=-0.1)),
        ("data.sources.x.of", lambda: source(files=[], of="y")),
        ("data.sources.x.of", lambda: source(files=[], of="x")),
        ("data", lambda: DataConfig().chosen()),
    ],
)
def test_a_wrong_value_is_one_line_naming_the_key(key, make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(f"{key}: ")
    assert "\n" not in str(caught.value)


def test_a_derived_source_needs_one_with_documents_of_its_own():
    web, long = SourceConfig(dataset="o/n"), SourceConfig(of="web")
    with pytest.raises(ConfigError, match=r"^data.sources.last.of: 'long' .* choose one of web$"):
        DataConfig(sources={"web": web, "long": long, "last": SourceConfig(of="long")})


def test_a_mixture_has_a_limit():
    many = {f"s{i}": SourceConfig(files=["a"]) for i in range(MOST_SOURCES + 1)}
    with pytest.raises(ConfigError, match=r"^data.sources: 33 are too many"):
        DataConfig(sources=many)
    many.popitem()
    assert len(DataConfig(sources=many).chosen()) == MOST_SOURCES


def test_extreme_values_that_are_right():
    DataConfig(max_bytes=1, fim_rate=1.0, shuffle_shards=1, workers=1, patience_minutes=0.0)
    source(weight=1e-9, min_tokens=8, max_tokens=8, fim_rate=0.0)
    DataConfig(sources={"x": SourceConfig(files=["a"]), "y": SourceConfig(files=["b"], weight=0.0)})


def test_chosen_sources_are_complete():
    base = SourceConfig(
        dataset="o/n", subset="s", split="dev", revision="r", text_column="body", weight=2.0, max_tokens=9
    )
    derived = SourceConfig(of="base", weight=3.0, min_tokens=5, deduplicate=True, fim_rate=0.5)
    chosen = DataConfig(fim_rate=0.25, sources={"base": base, "derived": derived}).chosen()
    places = ("files", "dataset", "subset", "split", "revision", "text_column")
    assert [getattr(chosen["derived"], p) for p in places] == [getattr(base, p) for p in places]
    assert chosen["derived"].of is None
    own = ("weight", "min_tokens", "max_tokens", "deduplicate", "fim_rate")
    assert [getattr(chosen["derived"], p) for p in own] == [3.0, 5, None, True, 0.5]
    assert [getattr(chosen["base"], p) for p in own] == [2.0, 0, 9, False, 0.25]


def test_a_path_takes_the_place_of_the_sources(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    sources = {"web": SourceConfig(dataset="o/n")}
    chosen = DataConfig(path="~/texts", text_column="body", fim_rate=0.5, sources=sources).chosen()
    assert chosen == {
        "text": SourceConfig(files=["/home/ada/texts"], text_column="body", fim_rate=0.5, weight=1.0)
    }


def test_yaml_of_the_first_run_has_every_key():
    tree = OmegaConf.load(CONFIGS / "python.yaml")
    assert set(tree) == {f.name for f in fields(DataConfig)}
    assert set(tree.tokenizer) == {f.name for f in fields(TokenizerConfig)}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_file_of_the_group_is_a_configuration(name):
    config = compose([f"data={name}", "model.vocab_size=129280"]).data
    assert config.path is None
    assert config.chosen()
    assert config.tokenizer.vocab_size == 129280


def test_values_of_the_files():
    assert list(compose([]).data.chosen()) == ["python"]
    assert compose(["data=python_v4", "model.vocab_size=129280"]).data.tokenizer.kind == "deepseek_v4"
    mixture = compose(["data=mixture", "data.sources.code.weight=0.4", "model.vocab_size=129280"]).data
    assert mixture.chosen()["code"].weight == 0.4
    assert mixture.chosen()["code"].text_column == "content"
    assert compose(["data.path=texts", "data.text_column=body"]).data.chosen()["text"].files == ["texts"]
