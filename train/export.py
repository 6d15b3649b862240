"""`python -m train.export`: a checkpoint's weights as a folder that transformers loads, part by part."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.compose import from_yaml
from configs.errors import ConfigError
from model.config import ModelConfig
from model.hf import BUFFERS, empty_model, refuse_filled, stored_dtype, write_pretrained
from model.tensorfile import Spec
from optim.partition import Piece, pieces
from train import cli
from train.checkpoint import Tensors, open_tensors, read_manifest
from train.config import RunConfig

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENIZER = "tokenizer.json"
HELP = """\
Write a checkpoint's weights for transformers: python -m train.export checkpoint=DIR out=DIR [format=bf16]

  checkpoint=DIR   a checkpoint, or a run's folder: its newest checkpoint that is not damaged
  out=DIR          a new or empty folder; it appears complete or not at all
  format=bf16      bf16, or fp32: the weights as they are trained. What is computed in fp32 stays fp32:
                   norms, routers, hyper-connections, sinks and position biases

out holds config.json, tokenizer.json and safetensors files of about 5 GB; it needs the memory of one matrix.

Examples:
  python -m train.export checkpoint=runs/first out=first
  python -m train.export checkpoint=runs/first/checkpoints/step-00000100 out=first-100 format=fp32
  python -m train.sample checkpoint=first prompt="import "
"""


@dataclass(frozen=True)
class Options:
    """The command's arguments; see HELP."""

    checkpoint: str
    out: str
    format: str = "bf16"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format is {self.format!r}; it must be {' or '.join(FORMATS)}")


def main(argv: list[str]) -> None:
    options = cli.read(Options, argv)
    refuse_filled(Path(options.out))
    source = cli.find_checkpoint(Path(options.checkpoint))
    export(source, Path(options.out), FORMATS[options.format])
    print(f"{source} is exported to {options.out} ({options.format})")


def export(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of checkpoint `source` to the new folder `out`, its large products' weights as `dtype`.

    Raises ConfigError for a checkpoint that lacks a weight and for a model that transformers does not know.
    """
    config = run_config(source).model
    specs = model_specs(config, dtype)
    files = {TOKENIZER: (source / TOKENIZER).read_text()} if (source / TOKENIZER).exists() else {}
    with open_tensors(source) as tensors:
        require(tensors, specs, source)
        write_pretrained(out, config, specs, lambda name: model_parts(tensors, name, specs[name]), files)


def run_config(source: Path) -> RunConfig:
    """The configuration of the run that saved this checkpoint. Raises ConfigError when it is not valid."""
    try:
        return from_yaml(read_manifest(source)["config"])
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def model_specs(config: ModelConfig, dtype: torch.dtype) -> dict[str, Spec]:
    """Dtype and shape of every parameter and buffer by our name, for large products' weights in `dtype`."""
    state = empty_model(config).state_dict()
    return {name: (stored_dtype(name, t.dtype, dtype), tuple(t.shape)) for name, t in state.items()}


def stored_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The pieces of a parameter, or a buffer as one, with the keys of checkpoints."""
    if name.endswith(BUFFERS):
        return [Piece(f"buffer.{name}", name, 0, shape)]
    return [piece._replace(key=f"weight.{piece.key}") for piece in pieces(name, shape)]


def model_parts(tensors: Tensors, name: str, spec: Spec) -> Iterator[Tensor]:
    """The consecutive pieces of a parameter or buffer, one at a time, in the dtype of `spec`."""
    dtype, shape = spec
    for piece in stored_pieces(name, shape):
        yield tensors[piece.key].to(dtype)


def require(tensors: Tensors, specs: dict[str, Spec], source: Path) -> None:
    """Raise ConfigError unless every parameter and buffer is there."""
    for name, (_, shape) in specs.items():
        for piece in stored_pieces(name, shape):
            if piece.key not in tensors:
                raise ConfigError(f"{source}: lacks {piece.key}; choose another checkpoint")


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1:], HELP, main))
