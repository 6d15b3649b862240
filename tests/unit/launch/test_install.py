"""Installing: the right PyTorch is tried first, an old Python is refused in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.install_torch import CPU_BUILD, CPU_INDEX, attempts

ROOT = Path(__file__).resolve().parents[3]


def fake_command(folder: Path, name: str, script: str) -> Path:
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return command


@pytest.mark.parametrize("exit_code", [0, 9])
def test_a_cpu_build_is_tried_only_without_a_gpu(
    exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(tmp_path, "nvidia-smi", f"exit {exit_code}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    tried = attempts()
    if exit_code == 0:
        assert tried == [["torch>=2.11"]]
    else:
        assert "--no-index" in tried[0] and CPU_INDEX in tried[1] and tried[2] == [CPU_BUILD]


def test_outside_linux_the_index_has_the_right_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert attempts() == [["torch>=2.11"]]


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = fake_command(tmp_path, "python3.9", "exit 1")  # what the version check of an old Python returns
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    outside = {
        key: value for key, value in os.environ.items() if not key.startswith("MAKE")
    }  # of `make test`
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}"],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1 and "Python 3.11 or newer" in done.stdout and str(old) in done.stdout
    assert not (tmp_path / ".venv").exists()
