"""How configuration errors are put into words: one line that names the key and the remedy; no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from typing import Any

from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError


def unreadable(text: str) -> str:
    """Say that a command-line argument is no override, or that its value needs quotes."""
    key, _, value = text.partition("=")
    if value and re.fullmatch(r"[+~]{0,2}[\w./]+", key):
        return f"{key}: cannot read {value}; quote what has special characters: '{key}=\"{value}\"'"
    return f"{text}: not an override; write KEY=VALUE, such as train.steps=100 or model=nano"


def unknown_key(key: str, keys: list[str]) -> str:
    """Say that a key does not exist, with the nearest that does: by its whole path or by its last part."""
    keys = [name for name in sorted(keys) if not key.startswith(f"{name}.")]
    last = {name.rpartition(".")[2]: name for name in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    near = near or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    remedy = f"did you mean {near[0]}?" if near else "`python -m train --help` lists the keys"
    return f"{key}: there is no such key; {remedy}"


def explain(error: OmegaConfBaseException, root: type, known: list[str]) -> str:
    """Turn an error of the strict merge into dataclass `root`, with keys `known`, into one line."""
    key = str(error.full_key or "")
    if isinstance(error, ConfigKeyError):
        return unknown_key(key, known)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value; set it as {key}=VALUE"
    expected = _expected(key, root)
    if isinstance(error, ValidationError) and expected:
        return f"{key} is {as_written(error.value)}; it must be {expected}"
    return f"{key}: {one_line(error)}"


def as_written(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def _expected(key: str, root: type) -> str:
    """Describe the type that a key needs; the empty string for keys inside free mappings."""
    hint: Any = root
    for part in re.sub(r"\[\d+\]", ".[]", key).split("."):
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(part)
        elif typing.get_origin(hint) in (list, dict):
            hint = typing.get_args(hint)[-1]
        else:
            return ""
    return _describe(hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "a mapping with the keys " + ", ".join(field.name for field in dataclasses.fields(hint))
    if typing.get_origin(hint) is list:
        return f"a list [...], each {_describe(typing.get_args(hint)[0])}"
    if dict in (hint, typing.get_origin(hint)):
        return "a mapping {key: value, ...}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "")


def one_line(error: BaseException) -> str:
    """Return the first line that says something, of the error or of what caused it."""
    for line in str(error).splitlines():
        if line.strip():
            return " ".join(line.split())
    return one_line(error.__cause__) if error.__cause__ else type(error).__name__
