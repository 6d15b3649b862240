"""What the small commands share: KEY=VALUE arguments, endings, and which checkpoint a path means."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from configs import compose
from configs.errors import ConfigError
from model.config import ModelConfig
from train import checkpoint
from train.config import RunConfig

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number"}


def run(argv: list[str], help_text: str, command: Callable[[list[str]], None]) -> int:
    """Exit code of a command: 0 done, 2 for a mistake (one line on stderr), 130 when interrupted."""
    if {"-h", "--help"} & set(argv):
        print(help_text)
        return 0
    try:
        command(argv)
    except (ConfigError, OSError, SafetensorError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def read(kind: type[T], argv: list[str], others: list[str] | None = None) -> T:
    """The dataclass `kind` from KEY=VALUE arguments; what is like none of its keys goes to `others`.

    Raises ConfigError for what is no KEY=VALUE, for unknown keys (without `others`: all), for values that are
    not of the field's type and for fields without a value.
    """
    hints, values = typing.get_type_hints(kind), {}
    for text in argv:
        key, equals, value = text.partition("=")
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
        if key in hints and equals:
            values[key] = _typed(key, value, hints[key])
        elif others is not None and not near:
            others.append(text)
        elif not equals:
            raise ConfigError(f"{text}: write KEY=VALUE; the keys are {', '.join(hints)}")
        else:
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(hints)}"
            raise ConfigError(f"{key}: there is no such key; {remedy}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.name not in values:
            raise ConfigError(f"{field.name}: has no value; set it as {field.name}=VALUE")
    return kind(**values)


def _typed(key: str, value: str, hint: Any) -> Any:
    try:
        return hint(value)
    except ValueError:
        raise ConfigError(f"{key} is {value!r}; it must be {_WORDS[hint]}") from None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint that verifies: the folder itself, or the newest good one of a run's folder.

    Damaged newer ones are a warning each. Raises ConfigError when there is none.
    """
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.verify(path)
        return path
    if not path.is_dir():
        raise ConfigError(f"checkpoint: {path} does not exist; give a checkpoint's or a run's folder")
    found = checkpoint.newest_good(path / "checkpoints", warn)
    if found is None:
        raise ConfigError(
            f"checkpoint: {path} holds no whole checkpoint; give a checkpoint's or a run's folder"
        )
    return found


def config_from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` has written. Raises ConfigError when it is not valid."""
    saved = cast(DictConfig, OmegaConf.create(text))
    saved.resume = None  # the place may be gone
    return compose.to_run_config(saved)


def compose_around(model: ModelConfig, overrides: list[str]) -> RunConfig:
    """`configs.compose.compose` with this model in place of the configured one."""
    compose.check([compose._parse(text) for text in overrides])
    tree = compose._compose_yaml(overrides)
    tree.model = asdict(model)
    return compose.to_run_config(tree)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
