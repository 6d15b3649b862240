"""Weights to and from Hugging Face: names, folders of safetensors, and the oracle's own files.

Written are the names of `transformers` (`DeepseekV4ForCausalLM`), with MTP under `mtp.`, which it ignores.
Read are these and the shorter ones of the released checkpoints (`layers.0.attn.wq_a.weight`, one tensor per
expert), which `transformers` itself writes, in part, from `save_pretrained`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import ConfigError
from model.config import ModelConfig
from model.deepseek import EXPERT, TO_OURS, expert_keys
from model.flops import parameter_shapes
from model.model import ForCausalLM, stays_fp32
from model.tensorfile import Spec, TensorFile, nbytes

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SHOWN = 10  # names in an error, at most
BUFFERS = ("tid2eid", "e_score_correction_bias")

# Released or transformers' name -> ours, applied in this order; our own names pass unchanged.
_TO_OURS = [
    (re.compile(r"^model\."), ""),
    (re.compile(r"^(mtp\.\d+)\.(?=attn|ffn|hc_attn|hc_ffn)"), r"\1.block."),
    *TO_OURS,
    (
        re.compile(r"\.self_attn\.compressor\.indexer\.(kv_|gate_|position_bias)"),
        r".self_attn.indexer.compressor.\1",
    ),
    (re.compile(r"\.self_attn\.compressor\.indexer\.(scorer\.)?"), ".self_attn.indexer."),
    (re.compile(r"\.self_attn\.norm\."), ".self_attn.kv_norm."),
]


def to_hf_state_dict(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names -> transformers'; the same tensors. Also for gradients, so buffers may be absent.

    Raises ConfigError for names that are unknown and parameters that are missing.
    """
    _check_names(state_dict, config)
    return {_hf_name(name): tensor for name, tensor in state_dict.items()}


def from_hf_state_dict(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' or released names -> ours; the same tensors, but single experts are stacked.

    Raises ConfigError for names that are unknown and parameters that are missing.
    """
    sources = keys_of_names(state_dict, parameter_shapes(config), optional=_buffer_names(config))
    return {name: _assemble(keys, state_dict.__getitem__) for name, keys in sources.items()}


def save_pretrained(
    model: ForCausalLM, directory: str | Path, files: Mapping[str, str] | None = None
) -> None:
    """`write_pretrained` of a model in memory; weights keep their dtype."""
    state = model.state_dict()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_pretrained(directory, model.config, specs, lambda name: [state[name]], files)


def write_pretrained(
    directory: str | Path,
    config: ModelConfig,
    specs: Mapping[str, Spec],
    parts: Callable[[str], Iterable[Tensor]],
    files: Mapping[str, str] | None = None,
) -> None:
    """`write_folder` of the names and the `config.json` of `transformers`.

    `specs`: every tensor by our name; `parts` gives a tensor's consecutive parts, one of which is held at a
    time. Raises ConfigError for a baseline that `transformers` cannot express.
    """
    refuse_filled(Path(directory))
    _check_names(specs, config)
    settings = {**config.to_hf(), "dtype": str(specs["lm_head.weight"][0]).removeprefix("torch.")}
    content = ((_hf_name(name), parts(name)) for name in specs)
    write_folder(directory, settings, {_hf_name(name): spec for name, spec in specs.items()}, content, files)


def write_folder(
    directory: str | Path,
    settings: Mapping[str, Any],
    specs: Mapping[str, Spec],
    content: Iterable[tuple[str, Iterable[Tensor]]],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write `config.json`, `files` (name -> text) and safetensors of about 5 GB to a new or empty folder.

    `specs`: every tensor by its key; `content`: the same keys in the same order, each with the tensor's
    consecutive parts. The folder appears complete or not at all: it is written beside its place, flushed to
    disk and renamed. Raises FileExistsError for a folder that holds something.
    """
    directory = Path(directory).absolute()
    refuse_filled(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        _write_weights(staging, specs, iter(content))
        texts = {**(files or {}), "config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n"}
        for file, text in texts.items():
            (staging / file).write_text(text)
        for path in (*staging.iterdir(), staging):
            flush(path)
        staging.rename(directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_filled(directory: Path) -> None:
    """Raise FileExistsError for a folder that holds something."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; give a new folder to save the model in")


def load_pretrained(directory: str | Path, dtype: torch.dtype | None = None) -> ForCausalLM:
    """The model of a folder that `save_pretrained`, here or in transformers, has written.

    `dtype` of the large products' weights, as stored by default; what is computed in fp32 is held in fp32.
    Raises FileNotFoundError for missing files, ConfigError for a config.json that is not this model's and
    for missing, unknown or misshapen tensors.
    """
    directory = Path(directory)
    hf, files = read_json(directory / "config.json"), tensor_files(directory)
    if hf.get("quantization_config"):
        raise ConfigError(f"{directory}/config.json: quantization_config: use train.import_hf on this folder")
    model = empty_model(config_of(hf, files))
    empty = model.state_dict()
    try:
        sources = keys_of_names(files, {name: tensor.shape for name, tensor in empty.items()})
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from None

    handles = {file: _open(file) for file in set(files.values())}
    state = {}
    for name, keys in sources.items():
        tensor = _assemble(keys, lambda key: handles[files[key]].get_tensor(key))
        if tensor.shape != empty[name].shape:
            found, wanted = list(tensor.shape), list(empty[name].shape)
            raise ConfigError(f"{directory}: {name} has shape {found}, config.json asks for {wanted}")
        state[name] = tensor.to(stored_dtype(name, empty[name].dtype, dtype or tensor.dtype), copy=True)
    model.load_state_dict(state, assign=True)
    return model


def config_of(hf: dict[str, Any], keys: Iterable[str]) -> ModelConfig:
    """The model of a config.json and of the tensors beside it: without any `mtp.` weight, it has no MTP.

    transformers drops MTP when it saves and leaves it in config.json.
    """
    config = ModelConfig.from_hf(hf)
    if not any(key.startswith("mtp.") for key in keys):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def empty_model(config: ModelConfig) -> ForCausalLM:
    """The model without storage: for names, shapes and dtypes, or to be filled by `assign=True`."""
    with torch.device("meta"):
        return ForCausalLM(config)


def stored_dtype(name: str, own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """Of a parameter or buffer: `own` for what is computed in fp32 and for buffers, else `wanted`."""
    return own if name.endswith(BUFFERS) or stays_fp32(name) else wanted


# ---- names ----


def _hf_name(name: str) -> str:
    if name.startswith(("lm_head.", "mtp.")):
        return name
    name = name.replace(".indexer.compressor.", ".compressor.indexer.")
    name = name.replace(
        ".self_attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."
    )
    return "model." + name.replace(".self_attn.indexer.", ".self_attn.compressor.indexer.")


def _our_name(name: str) -> str:
    for pattern, replacement in _TO_OURS:
        name = pattern.sub(replacement, name)
    return name


def keys_of_names(
    keys: Iterable[str], shapes: Mapping[str, Sequence[int]], optional: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Our name -> the keys that hold it: one, or those of every expert, by number, gate before up.

    Raises ConfigError that lists what is missing of `shapes`, keys of no name and the names with two.
    """
    whole, single = _by_name(keys)
    known = {*shapes, *optional}
    missing = [name for name in shapes if name not in whole and name not in single]
    unknown = [key for name in whole if name not in known for key in whole[name]]
    for name, experts in single.items():
        prefix, stack = experts[0].rsplit(".", 3)[0], name.rpartition(".")[2]
        wanted = expert_keys(prefix, stack, shapes[name][0]) if name in known else []
        missing += [key for key in wanted if key not in experts]
        unknown += [key for key in experts if key not in wanted]
        whole[name] = wanted
    _refuse(missing=missing, unknown=sorted(unknown))
    return whole


def _by_name(keys: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Our name -> the one key that holds all of it; our name -> the keys of single experts."""
    whole: dict[str, list[str]] = {}
    single: dict[str, list[str]] = {}
    for key in keys:
        if expert := EXPERT.match(key):
            stack = "down_proj" if expert[3] == "2" else "gate_up_proj"
            single.setdefault(_our_name(f"{expert[1]}.{stack}"), []).append(key)
        else:
            whole.setdefault(_our_name(key), []).append(key)
    for name, found in whole.items():
        if len(found) > 1 or name in single:
            raise ConfigError(f"{name} is given more than once, such as by {found[0]}; keep one")
    return whole, single


def _assemble(keys: list[str], fetch: Callable[[str], Tensor]) -> Tensor:
    """The tensor at one key, or single experts' [F, D] gates and ups -> [E, 2F, D], downs -> [E, D, F]."""
    tensors = [fetch(key) for key in keys]
    expert = EXPERT.match(keys[0])
    if expert is None:
        return tensors[0]
    if expert[3] == "2":
        return torch.stack(tensors)
    return torch.stack([torch.cat(pair) for pair in zip(tensors[::2], tensors[1::2])])


def _check_names(names: Iterable[str], config: ModelConfig) -> None:
    parameters, given = parameter_shapes(config), set(names)
    unknown = given - set(parameters) - set(_buffer_names(config))
    _refuse(missing=[name for name in parameters if name not in given], unknown=sorted(unknown))


def _buffer_names(config: ModelConfig) -> list[str]:
    buffer = {"hash_moe": "tid2eid", "moe": "e_score_correction_bias"}
    layers = [f"layers.{i}.mlp.gate.{buffer[mlp]}" for i, mlp in enumerate(config.mlp_layer_types)]
    mtp = [f"mtp.{i}.block.mlp.gate.{buffer['moe']}" for i in range(config.num_nextn_predict_layers)]
    return layers + mtp


def _refuse(**problems: list[str]) -> None:
    """One line that names the first few of each kind."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{kind} weights {', '.join(names[:SHOWN])}{more}")
    if parts:
        raise ConfigError(f"{', '.join(parts)}; use the configuration that these weights belong to")


# ---- files ----


def _write_weights(
    directory: Path, specs: Mapping[str, Spec], content: Iterator[tuple[str, Iterable[Tensor]]]
) -> None:
    """One file, or numbered ones and an index of which holds what."""
    shards = _shards(specs)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, keys in zip(files, shards):
        with TensorFile(directory / file, {key: specs[key] for key in keys}) as tensors:
            for key, parts in islice(content, len(keys)):
                tensors.write_parts(key, parts)
    if len(shards) > 1:
        size = sum(map(nbytes, specs.values()))
        where = {key: file for file, keys in zip(files, shards) for key in keys}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(specs: Mapping[str, Spec]) -> list[list[str]]:
    """Keys in order, a new shard wherever the next tensor would exceed SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + nbytes(spec) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes(spec)
    return shards


def tensor_files(directory: Path) -> dict[str, Path]:
    """Key of every tensor in a model's folder -> the file that holds it. Raises FileNotFoundError."""
    if (directory / INDEX).exists():
        files = {key: directory / file for key, file in read_json(directory / INDEX)["weight_map"].items()}
        for file in sorted(set(files.values())):
            if not file.exists():
                raise FileNotFoundError(f"{file} is missing, though {INDEX} lists it; copy the whole folder")
        return files
    single = directory / "model.safetensors"
    if not single.exists():
        raise FileNotFoundError(
            f"{directory} holds neither model.safetensors nor {INDEX}; give a model's folder"
        )
    return dict.fromkeys(_open(single).keys(), single)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; give the folder of a saved model")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy it again") from None


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on disk before anything points at it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
