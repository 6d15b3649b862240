"""`python -m train.import_hf`: released or transformers' weights as the first checkpoint of a run.

Read are the two layouts that `model.hf` knows, in bf16, fp16 or fp32, and quantised as DeepSeek releases
them: FP8 (E4M3) in blocks of 128 x 128, and FP4 (E2M1), two in a byte, in blocks of 1 x 32, both with scales
in E8M0 or fp32.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.compose import compose, to_yaml
from configs.errors import ConfigError
from data.tokenizer import Tokenizer, open_tokenizer
from model.config import ModelConfig
from model.hf import config_of, keys_of_names, read_json, tensor_files
from model.quant import FP4_BLOCK, FP8_BLOCK, Block, Quantised, dequantise, dequantise_fp4
from optim.partition import Piece
from train import cli
from train.checkpoint import Tensors
from train.config import RunConfig
from train.export import TOKENIZER, matrices, model_specs
from train.resume import new_folder
from train.saving import write
from train.sections import RunDirConfig

FLOATS, INTEGERS = (torch.float32, torch.bfloat16, torch.float16), (torch.int64, torch.int32)
FP4, SCALES = (torch.int8, torch.uint8), (torch.float8_e8m0fnu, torch.float32)
QUANTISED = (torch.float8_e4m3fn, *FP4)

HELP = """\
Start a run from released weights: python -m train.import_hf source=DIR [out=RUN] [KEY=VALUE ...]

  source=DIR   config.json, *.safetensors and tokenizer.json of a DeepSeek-V4 model: the released files (bf16,
               FP8, FP4) or those that transformers saves
  out=RUN      the folder of the new run; without it, run.dir and run.name
  KEY=VALUE    any keys of `python -m train`, such as experiment=nano optim.lr=1e-5; the model and, unless
               data.tokenizer says otherwise, the tokenizer are those of source

The run gets a checkpoint at step 0 with fp32 weights and the routers' tables. That takes 4 bytes of disk for
a parameter and the memory of a few matrices. Training goes on from there, with a new optimizer, by the
command that is printed.

Examples:
  python -m train.import_hf source=DeepSeek-V4-Flash out=runs/flash data.path=texts optim.lr=1e-5
  python -m train.import_hf source=saved run.name=more data.tokenizer.kind=file data.tokenizer.path=t.json
"""


@dataclass(frozen=True)
class Options:
    """The command's own arguments; see HELP."""

    source: str
    out: str = ""


class Stored(NamedTuple):
    """One tensor of the source, its scales and their block where it is quantised, and the pieces it holds."""

    key: str
    scale: str | None
    block: Block
    pieces: list[Piece]


def main(argv: list[str]) -> None:
    overrides: list[str] = []
    options = cli.read(Options, argv, overrides)
    source = Path(options.source)
    overrides += tokenizer_overrides(source, overrides)
    hf, files = read_json(source / "config.json"), tensor_files(source)
    model = config_of(hf, files)
    config, tokenizer = configure(model, overrides)
    if options.out:
        out = Path(options.out)
        config = replace(config, run=RunDirConfig(dir=str(out.parent), name=out.name))
    folder = new_folder(config)
    block = tuple((hf.get("quantization_config") or {}).get("weight_block_size") or FP8_BLOCK)
    with Tensors(sorted(set(files.values()))) as tensors:
        try:
            plan = plan_import(tensors, model, block)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        step = save(tensors, plan, folder, config, tokenizer)
    others = [text for text in overrides if not text.startswith(("run.", "resume"))]
    command = ["python", "-m", "train", f"run.dir={folder.parent}", f"run.name={folder.name}", "resume=auto"]
    print(f"{step} has the weights of {source}; go on with\n{shlex.join([*command, *others])}")


def save(tensors: Tensors, plan: list[Stored], folder: Path, config: RunConfig, tokenizer: Tokenizer) -> Path:
    """The weights as step 0 of a run that has read no data; a failure leaves no folder behind."""
    specs = {piece.key: (_dtype(piece), piece.shape) for stored in plan for piece in stored.pieces}
    manifest = {"config": to_yaml(config), "data": {}, "tracking": {}, "world": 1}
    manifest["tokenizer"] = tokenizer.fingerprint
    content = (entry for stored in plan for entry in read_pieces(tensors, stored))
    try:
        return write(folder / "checkpoints", 0, specs, content, manifest, {TOKENIZER: tokenizer.to_json()})
    except BaseException:
        with suppress(OSError):
            (folder / "checkpoints").rmdir()
            folder.rmdir()
        raise


def tokenizer_overrides(source: Path, overrides: list[str]) -> list[str]:
    """What selects the tokenizer of `source`, if it has one and none is chosen."""
    file = source.resolve() / TOKENIZER
    if not file.exists() or any(text.startswith(("data=", "data.tokenizer.")) for text in overrides):
        return []
    return ["data.tokenizer.kind=file", f"data.tokenizer.path='{file}'"]


def configure(model: ModelConfig, overrides: list[str]) -> tuple[RunConfig, Tokenizer]:
    """The run that `overrides` select, with this model, and its tokenizer; raises ConfigError."""
    for text in overrides:
        if text.startswith(("model=", "model.")):
            raise ConfigError(f"{text}: the model is that of source; leave this out")
    config = replace(compose(overrides, model), resume=None)
    if config.data.tokenizer.kind == "bpe":
        raise ConfigError(
            f"source: has no {TOKENIZER}; add the one that the model was trained with, or give"
            " data.tokenizer.kind=deepseek_v4"
        )
    return config, open_tokenizer(config.data.tokenizer, Path(config.data.cache_dir), "", iter(()))


def plan_import(tensors: Tensors, config: ModelConfig, block: Block) -> list[Stored]:
    """What of the source becomes which pieces, in the order of reading; `block` is that of FP8's scales.

    Raises ConfigError for missing and unknown tensors and for what has another shape or dtype.
    """
    scales = {
        key: scale
        for key in tensors
        for scale in (f"{key.removesuffix('.weight')}.scale", f"{key}_scale_inv")
        if scale in tensors
    }
    shapes = {name: shape for name, (_, shape) in model_specs(config, torch.float32).items()}
    keys = keys_of_names(set(tensors) - set(scales.values()), shapes)
    plan = []
    for name, shape in shapes.items():
        for key, part, own in matrices(name, shape, keys[name]):
            stored = Stored(key, scales.get(key), FP4_BLOCK if tensors.dtype(key) in FP4 else block, own)
            _check(tensors, stored, part)
            plan.append(stored)
    return plan


def _check(tensors: Tensors, stored: Stored, shape: tuple[int, ...]) -> None:
    key, scale, block, _ = stored
    dtype, found = tensors.dtype(key), tensors.shape(key)
    if dtype in FP4:
        found = (*found[:-1], *(2 * packed for packed in found[-1:]))
    if found != shape:
        raise ConfigError(f"{key} has shape {list(found)}, config.json asks for {list(shape)}")
    if dtype in QUANTISED and len(shape) > 1:
        if scale is None:
            raise ConfigError(f"{key} is {dtype}, but has no scales; copy the whole folder")
        grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        given, of = tensors.shape(scale), tensors.dtype(scale)
        if given != grid or of not in SCALES:
            raise ConfigError(f"{scale} is {of} {list(given)}; {key} needs {list(grid)} in E8M0 or fp32")
    elif scale or dtype not in (INTEGERS if key.endswith("tid2eid") else FLOATS):
        raise ConfigError(f"{key} is {dtype}, which is not read{' with scales' if scale else ''}; convert it")


def read_pieces(tensors: Tensors, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Key and value of every piece that one tensor of the source holds."""
    whole = tensors[stored.key]
    if stored.scale:
        whole = numbers(whole, tensors[stored.scale].float(), stored.block)
    flat, first = whole.flatten(), stored.pieces[0].start
    for piece in stored.pieces:
        part = flat[piece.start - first :][: piece.numel]
        yield piece.key, part.view(piece.shape).to(_dtype(piece))


def _dtype(piece: Piece) -> torch.dtype:
    return torch.int64 if piece.name.endswith("tid2eid") else torch.float32


def numbers(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """fp32 [..., M, N] of FP8 [..., M, N] in blocks of this size, or of FP4 [..., M, N / 2] in its own."""
    if codes.dtype in FP4:
        return dequantise_fp4(codes, scales)
    return dequantise(Quantised(codes, scales, block))


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1:], HELP, main))
