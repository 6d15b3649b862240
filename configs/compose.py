"""From the command line to a RunConfig: Hydra composes the YAML, one strict merge types it; no torch.

Every mistake becomes a ConfigError of one line: the key, what is wrong, and what to write instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.wording import as_written, explain, one_line, unknown_key, unreadable
from model.config import ModelConfig
from train.config import RunConfig
from train.sections import RunDirConfig

CONFIG_DIR = Path(__file__).resolve().parent
HELP = """\
Train a language model: python -m train [KEY=VALUE ...]      (or: make train ARGS="KEY=VALUE ...")

Without arguments, the experiment `laptop` runs. Values are those of that experiment:

{keys}

Groups choose a file configs/<group>/<option>.yaml; an experiment chooses the others and sets keys,
and what the command line says comes last. Every key in those files can be set in the same way.

{groups}

Examples:
  python -m train train.steps=50 optim.warmup_steps=5       a shorter run
  python -m train data.path=texts train.seed=1              your own text: a folder, JSONL or Parquet
  python -m train data.sources.mine.files=[texts]           as one more source of a mixture
  python -m train phases=lengths                            longer sequences and larger batches as it goes on
  python -m train experiment=nano train.micro_batch=2       a larger model on a GPU, with less memory
  python -m train run.name=first resume=auto                go on where the run `first` stopped
  python -m train -m optim=muon,adamw train.seed=0,1        a sweep: every combination, one run each
"""


def compose(overrides: list[str], model: ModelConfig | None = None) -> RunConfig:
    """Return the checked configuration that Hydra overrides such as `model=nano` or `train.steps=20` select.

    `model` replaces the configured one, also where other keys refer to it. Raises ConfigError with one line,
    before anything is allocated or written.
    """
    check([_parse(text) for text in overrides])
    tree = _compose_yaml(overrides)
    if model is not None:
        tree.model = dataclasses.asdict(model)
    return to_run_config(tree)


def from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` has written. Raises ConfigError when it is not valid."""
    saved = typing.cast(DictConfig, OmegaConf.create(text))
    saved.resume = None  # the place may be gone
    return to_run_config(saved)


def multirun(argv: list[str], task: Callable[[RunConfig], float | None]) -> None:
    """Call `task` once for every configuration of a Hydra sweep: `-m model=laptop,nano train.seed=0,1`.

    `argv` may hold Hydra's own flags and `hydra.*` settings, so sweepers and launchers work. The runs go to
    `<run.dir>/sweep-<time>/<number>`. A grid is checked as a whole before its first run: raises ConfigError.
    """
    overrides = [_parse(argument, sweep=True) for argument in argv if not argument.startswith("-")]
    check(overrides)
    for job in _grid(overrides):
        to_run_config(_compose_yaml(job))

    @hydra.main(config_path=str(CONFIG_DIR), config_name="train", version_base="1.3")
    def run_one(composed: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            config = to_run_config(composed)
        except ConfigError as error:  # a value that a search came up with
            raise SystemExit(str(error)) from error
        config = dataclasses.replace(config, run=RunDirConfig(dir=str(folder.parent), name=folder.name))
        try:
            return task(config)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from error

    others = [_may_add(argument) for argument in argv if argument not in ("-m", "--multirun")]
    sys.argv = [sys.argv[0], "--multirun", *others]  # Hydra's parser wants flags before overrides
    run_one()


def to_run_config(composed: DictConfig) -> RunConfig:
    """Merge a composed tree strictly into the dataclasses' types and build them; raises ConfigError."""
    schema = _schema(RunConfig)
    _name_elements(schema, composed, RunConfig)
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(schema, composed))
        parts = {name: _build(name, merged[name]) for name in map(str, schema)}
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, RunConfig, list(_paths(schema)))) from error
    return RunConfig(**parts)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, for the folder of the run."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def help_text() -> str:
    """Return what `--help` prints: usage, the common keys, the groups with their options, examples."""
    defaults = compose([])
    lines = []
    for key, meaning in _described_keys():
        value: Any = defaults
        for part in key.split("."):
            value = getattr(value, part)
        lines.append(f"  {f'{key}={as_written(value)}':<38} {meaning}")
    options = [f"  {group + '=':<12} {', '.join(names)}" for group, names in groups().items()]
    return HELP.format(keys="\n".join(lines), groups="\n".join(options))


def _described_keys() -> Iterator[tuple[str, str]]:
    """Yield every key of train.yaml and of data/python.yaml that a comment explains, with that comment."""
    for file, above in (("train.yaml", ""), ("data/python.yaml", "data.")):
        section = ""
        for line in (CONFIG_DIR / file).read_text().splitlines():
            code, _, meaning = line.partition("  # ")
            name, colon, _ = code.strip().partition(":")
            if not line.startswith(" "):
                section = name
            if colon and meaning and section != "hydra":
                yield above + (name if name == section else f"{section}.{name}"), meaning.strip()


def differences(saved: str, config: RunConfig) -> list[str]:
    """What differs between a saved configuration (`to_yaml`) and this one, as `key: before -> now`."""
    before = OmegaConf.create(saved)
    now = OmegaConf.create(to_yaml(config))
    keys = dict.fromkeys([*_paths(before), *_paths(now)])
    pairs = [(key, OmegaConf.select(before, key), OmegaConf.select(now, key)) for key in keys]
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b and not isinstance(b, DictConfig)]


def groups() -> dict[str, list[str]]:
    """Return every group of the configuration with its options: the files in configs/<group>/."""
    found: dict[str, list[str]] = {}
    for file in sorted(CONFIG_DIR.glob("*/*.yaml")):
        found.setdefault(file.parent.name, []).append(file.stem)
    return found


def check(overrides: Sequence[Override]) -> None:
    """Raise ConfigError at the first override whose key or group option does not exist.

    Hydra finds these too, but in words about its own machinery and with several lines.
    """
    options = groups()
    tree = _usual()
    keys = set(_paths(tree))
    for override in overrides:
        key = override.key_or_group
        if key in options:
            _check_group(override, options)
        if key in options or key.startswith("hydra"):
            continue
        if inside := [mapping for mapping in _mappings(RunConfig) if key.startswith(f"{mapping}.")]:
            _check_element(override, inside[0])
            continue
        if key not in keys and not override.is_add():
            raise ConfigError(unknown_key(key, [*options, *keys]))
        section = OmegaConf.select(tree, key) if key in keys else None
        if isinstance(section, DictConfig) and not (
            override.is_delete() or isinstance(override.value(), dict)
        ):
            names = [str(name) for name in section]
            raise ConfigError(f"{key}: holds {', '.join(names)}; set one of these: {key}.{names[0]}=VALUE")


def _check_element(override: Override, mapping: str) -> None:
    """Below a mapping any name is allowed, and the strict merge knows its keys; it needs one, though."""
    key = override.key_or_group
    whole = "." not in key.removeprefix(f"{mapping}.")
    if whole and not (override.is_delete() or isinstance(override.value(), dict)):
        names = [field.name for field in dataclasses.fields(_mappings(RunConfig)[mapping])]
        raise ConfigError(f"{key}: set one of {', '.join(names)}, such as {key}.{names[0]}=VALUE")


def _parse(text: str, sweep: bool = False) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(unreadable(text)) from error
    if not override.key_or_group or override.package is not None:
        raise ConfigError(unreadable(text))
    if not sweep and override.is_sweep_override():
        raise ConfigError(f"{text}: several values make a sweep: add -m, or write a list as [a,b]")
    if not sweep and override.key_or_group.startswith("hydra"):
        raise ConfigError(f"{text}: settings of Hydra itself have an effect only in sweeps: add -m")
    return override


def _check_group(override: Override, options: dict[str, list[str]]) -> None:
    """Raise ConfigError for options of a group that do not exist."""
    group = override.key_or_group
    remedy = f"choose one of {', '.join(options[group])}: {group}={options[group][0]}"
    if override.is_delete() or override.is_add():
        raise ConfigError(f"{override.input_line}: {group} cannot be added or removed; {remedy}")
    for text in _single(override):
        value = text.partition("=")[2]
        if value not in options[group]:
            raise ConfigError(f"{group}={value}: there is no configs/{group}/{value}.yaml; {remedy}")


def _single(override: Override) -> list[str]:
    """Return the overrides without sweep that one stands for; none if they are known only to the sweeper."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _grid(overrides: list[Override]) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of every run of a grid."""
    ours = (_single(override) for override in overrides if not override.key_or_group.startswith("hydra"))
    return itertools.product(*(choices for choices in ours if choices))


def _compose_yaml(overrides: Sequence[str]) -> DictConfig:
    _store_schema()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose("train", [_may_add(text) for text in overrides])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(one_line(error)) from error


@functools.cache
def _usual() -> DictConfig:
    """The configuration without overrides, only to be read: others have the same keys."""
    return _compose_yaml([])


def _may_add(override: str) -> str:
    """Let a key of a named element, such as data.sources.web.weight, be set where no file mentions it."""
    return (
        f"++{override}"
        if override.startswith(tuple(f"{name}." for name in _mappings(RunConfig)))
        else override
    )


def _mappings(kind: type, prefix: str = "") -> dict[str, type]:
    """Return {key: dataclass} of all mappings from names to dataclasses in a dataclass."""
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= _mappings(typing.cast(type, hint), f"{prefix}{name}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            found[prefix + name] = typing.get_args(hint)[1]
    return found


def _name_elements(schema: DictConfig, composed: DictConfig, kind: type) -> None:
    """Give the schema the names that mappings have, with the defaults of their elements.

    OmegaConf would make these elements read-only while it merges, and then fail on their lists.
    """
    for key, element in _mappings(kind).items():
        for name in OmegaConf.select(composed, key) or {}:
            OmegaConf.update(schema, f"{key}.{name}", _schema(element))


@functools.cache
def _store_schema() -> None:
    """Give Hydra every key that the dataclasses have, so that YAML files need not repeat defaults."""
    ConfigStore.instance().store("schema", OmegaConf.to_container(_schema(RunConfig)))


def _schema(kind: type) -> DictConfig:
    """Return the empty, typed tree of a dataclass; frozen ones would be read-only, so that is lifted."""
    node = OmegaConf.structured(kind)
    OmegaConf.set_readonly(node, False)
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            node[name] = _schema(typing.cast(type, hint))
    return node


def _build(section: str, node: Any) -> Any:
    """Instantiate one section; its own checks name the key, and the section is added where they do not."""
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_object(node)
    except ValueError as error:
        if isinstance(error, OmegaConfBaseException):
            raise
        text = one_line(error)
        raise ConfigError(text if f"{section}." in text else f"{section}: {text}") from error


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key below a node."""
    for name in map(str, node) if isinstance(node, DictConfig) else ():
        yield prefix + name
        if not OmegaConf.is_missing(node, name):
            yield from _paths(node._get_node(name), f"{prefix}{name}.")
