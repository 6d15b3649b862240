"""`python -m train.export`: a checkpoint's weights as a folder that other tools load, part by part.

bf16 and fp32 are folders for transformers (`model.hf`); deepseek is the layout of the released files, FP4
experts and FP8 blocks, quantised from the checkpoint's fp32 weights (`model.deepseek`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.compose import from_yaml
from configs.errors import ConfigError
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.deepseek import (
    FP4,
    FP8,
    quantised,
    released_dtype,
    released_keys,
    released_settings,
    released_specs,
)
from model.hf import BUFFERS, empty_model, refuse_filled, stored_dtype, write_folder, write_pretrained
from model.tensorfile import Spec
from optim.partition import Piece, pieces
from train import cli
from train.checkpoint import Tensors, open_tensors, read_manifest
from train.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = (*DTYPES, "deepseek")
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
HELP = """\
Write a checkpoint's weights for other tools: python -m train.export checkpoint=DIR out=DIR [format=bf16]

  checkpoint=DIR   a checkpoint, or a run's folder: its newest checkpoint that is not damaged
  out=DIR          a new or empty folder; it appears complete or not at all
  format=bf16      bf16, or fp32: the weights as they are trained. What is computed in fp32 stays fp32:
                   norms, routers, hyper-connections, sinks and position biases
  format=deepseek  the layout and names of the released DeepSeek-V4 files: routed experts in FP4 (scales for
                   1 x 32), the other large products in FP8 (128 x 128), hyper-connections, sinks and biases
                   in fp32, the rest, norms and routers too, in bf16. The model's hidden_size and
                   moe_intermediate_size must be multiples of 32

out holds config.json, the tokenizer's two files and safetensors files of about 5 GB; it needs the memory of
one matrix, format=deepseek that of a few. train.import_hf reads all of them. transformers loads deepseek with
accelerate installed, but decodes it wrongly, or refuses, where 128 does not divide a larger side of an FP8
matrix.

Examples:
  python -m train.export checkpoint=runs/first out=first
  python -m train.export checkpoint=runs/first/checkpoints/step-00000100 out=first-100 format=fp32
  python -m train.export checkpoint=runs/first out=first-released format=deepseek
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
            raise ConfigError(f"format is {self.format!r}; it must be one of {', '.join(FORMATS)}")


def main(argv: list[str]) -> None:
    options = cli.read(Options, argv)
    refuse_filled(Path(options.out))
    source = cli.find_checkpoint(Path(options.checkpoint))
    if options.format == "deepseek":
        export_released(source, Path(options.out))
    else:
        export(source, Path(options.out), DTYPES[options.format])
    print(f"{source} is exported to {options.out} ({options.format})")


def export(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of checkpoint `source` to the new folder `out`, its large products' weights as `dtype`.

    Raises ConfigError for a checkpoint that lacks a weight and for a model that transformers does not know.
    """
    config = run_config(source).model
    specs, files = model_specs(config, dtype), tokenizer_files(source, config)
    with open_tensors(source) as tensors:
        require(tensors, specs, source)
        write_pretrained(out, config, specs, lambda name: model_parts(tensors, name, specs[name]), files)


def export_released(source: Path, out: Path) -> None:
    """Write the model of checkpoint `source` to the new folder `out` as the released files are laid out.

    Raises ConfigError for a checkpoint that lacks a weight and for a model that this layout cannot hold.
    """
    config = run_config(source).model
    settings, specs = released_settings(config), model_specs(config, torch.float32)
    plan = released_plan(specs)
    files = tokenizer_files(source, config)
    stored = {key: spec for matrix in plan for key, spec in released_specs(matrix.key, matrix.shape).items()}
    with open_tensors(source) as tensors:
        require(tensors, specs, source)
        write_folder(out, settings, stored, released_content(tensors, plan), files)


def released_plan(specs: dict[str, Spec]) -> list[Matrix]:
    """What the released files hold for these parameters and buffers of ours."""
    whole = ((name, shape, released_keys(name, shape)) for name, (_, shape) in specs.items())
    return [matrix for name, shape, keys in whole for matrix in matrices(name, shape, keys)]


def released_content(tensors: Tensors, plan: list[Matrix]) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Key and consecutive parts of what `released_specs` lists, in that order, one matrix at a time."""
    for key, _, parts in plan:
        dtype = released_dtype(key)
        if dtype in (FP4, FP8):
            (piece,) = parts  # only tables are cut, and none is quantised
            for name, tensor in quantised(key, tensors[piece.key]).items():
                yield name, [tensor]
        else:
            yield key, (tensors[piece.key].to(dtype) for piece in parts)


def tokenizer_files(source: Path, config: ModelConfig) -> dict[str, str]:
    """Name and content of the tokenizer that is saved with a checkpoint, if one is, and of what
    `transformers.AutoTokenizer` wants beside it."""
    path = source / TOKENIZER
    if not path.exists():
        return {}
    tokenizer = Tokenizer(path)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.mark(tokenizer.bos_id),
        "eos_token": tokenizer.mark(tokenizer.eos_id),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    return {
        TOKENIZER: tokenizer.to_json(),
        TOKENIZER_CONFIG: json.dumps(settings, indent=2) + "\n",
    }


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


class Matrix(NamedTuple):
    """What a file outside holds under one key: a whole parameter or buffer, or one expert's matrix of it."""

    key: str
    shape: tuple[int, ...]
    pieces: list[Piece]


def matrices(name: str, shape: tuple[int, ...], keys: list[str]) -> Iterator[Matrix]:
    """The pieces of a parameter or buffer, dealt out to the keys that hold it."""
    parts = stored_pieces(name, shape)
    each = len(parts) // len(keys)
    for number, key in enumerate(keys):
        own = parts[number * each : (number + 1) * each]
        yield Matrix(key, shape if len(keys) == 1 else own[0].shape, own)


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
