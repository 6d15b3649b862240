"""What the small commands share: KEY=VALUE arguments, endings, and which checkpoint a path means."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from configs.errors import ConfigError
from train import checkpoint

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


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
