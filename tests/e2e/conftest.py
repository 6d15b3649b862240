"""The text that the runs of these tests are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        lines = [
            f"The {word} of number {number} is {number * k}."
            for k, word in enumerate(["root", "sum", "cube"] * 12)
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder
