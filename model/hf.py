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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.flops import parameter_shapes
from model.model import ForCausalLM, stays_fp32

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

# Released or transformers' name -> ours, applied in this order; our own names pass unchanged.
_TO_OURS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^embed\.", "embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^(mtp\.\d+)\.(?=attn|ffn|hc_attn|hc_ffn)", r"\1.block."),
        (r"hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.self_attn\.compressor\.indexer\.(kv_|gate_|position_bias)", r".self_attn.indexer.compressor.\1"),
        (r"\.self_attn\.compressor\.indexer\.(scorer\.)?", ".self_attn.indexer."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.ape$", ".position_bias"),
        (r"\.(self_attn|compressor)\.norm\.", r".\1.kv_norm."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.w(q_a|o_a|o_b)\.", r".\1_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    )
)
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.w([123])\.weight$")


def to_hf_state_dict(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names -> transformers'; the same tensors. Also for gradients, so buffers may be absent.

    Raises ValueError, in one line, for names that are unknown and parameters that are missing.
    """
    _check_names(state_dict, config)
    return {_hf_name(name): tensor for name, tensor in state_dict.items()}


def from_hf_state_dict(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' or released names -> ours; the same tensors, but single experts are stacked.

    Raises ValueError, in one line, for names that are unknown and parameters that are missing.
    """
    sources = _sources(state_dict)
    _check_names(sources, config)
    return {name: _assemble(keys, state_dict.__getitem__) for name, keys in sources.items()}


def save_pretrained(model: ForCausalLM, directory: str | Path) -> None:
    """Write `config.json` and safetensors of about 5 GB each to a new or empty folder.

    Weights keep their dtype. The folder appears complete or not at all: it is written beside its place,
    flushed to disk and renamed. Raises ConfigError for a baseline that `transformers` cannot express and
    FileExistsError for a folder that holds something.
    """
    directory = Path(directory).absolute()
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; give a new folder to save the model in")
    config = {**model.config.to_hf(), "dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    state = to_hf_state_dict(model.state_dict(), model.config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        _write_weights(state, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in (*staging.iterdir(), staging):
            flush(path)
        staging.rename(directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load_pretrained(directory: str | Path, dtype: torch.dtype | None = None) -> ForCausalLM:
    """The model of a folder that `save_pretrained`, here or in transformers, has written.

    `dtype` of the large products' weights, as stored by default; what is computed in fp32 is held in fp32.
    transformers drops MTP when it saves: a folder without any `mtp.` weight gives a model without MTP,
    whatever its config.json says. Raises ConfigError for a config.json that is not this model's,
    FileNotFoundError for missing files, ValueError for missing, unknown or misshapen tensors.
    """
    directory = Path(directory)
    hf = _read_json(directory / "config.json")
    if hf.get("quantization_config"):
        raise ValueError(f"{directory}/config.json: quantization_config: convert the weights to bf16 first")
    files = _tensor_files(directory)
    config = ModelConfig.from_hf(hf)
    if not any(key.startswith("mtp.") for key in files):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = ForCausalLM(config)
    empty = model.state_dict()
    try:
        sources = _sources(files)
        _check_names(sources, config)
        _refuse(missing=[name for name in empty if name not in sources])
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None

    handles = {file: _open(file) for file in set(files.values())}
    state = {}
    for name, keys in sources.items():
        tensor = _assemble(keys, lambda key: handles[files[key]].get_tensor(key))
        if tensor.shape != empty[name].shape:
            found, wanted = list(tensor.shape), list(empty[name].shape)
            raise ValueError(f"{directory}: {name} has shape {found}, config.json asks for {wanted}")
        state[name] = tensor.to(_dtype_of(name, empty[name], tensor, dtype), copy=True)
    model.load_state_dict(state, assign=True)
    return model


def _dtype_of(name: str, empty: Tensor, stored: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    is_buffer = name.endswith(("tid2eid", "e_score_correction_bias"))
    if is_buffer or stays_fp32(name):
        return empty.dtype
    return wanted or stored.dtype


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


def _sources(keys: Iterable[str]) -> dict[str, list[str]]:
    """Our name -> the keys that hold it: one, or those of every expert, by number, gate before up."""
    whole: dict[str, list[str]] = {}
    single: dict[str, dict[tuple[int, int], str]] = {}
    for key in keys:
        if expert := _EXPERT.match(key):
            number, part = int(expert[2]), int(expert[3])
            stack = "down_proj" if part == 2 else "gate_up_proj"
            single.setdefault(_our_name(f"{expert[1]}.{stack}"), {})[number, part] = key
        else:
            whole.setdefault(_our_name(key), []).append(key)
    for name, found in whole.items():
        if len(found) > 1 or name in single:
            raise ValueError(f"{name} is given more than once, such as by {found[0]}; keep one")
    for name, experts in single.items():
        parts = (2,) if name.endswith("down_proj") else (1, 3)
        numbers = range(len(experts) // len(parts))
        if set(experts) != {(number, part) for number in numbers for part in parts}:
            raise ValueError(f"{name} has gaps between its single experts; give every expert's matrices")
    stacked = {name: [experts[place] for place in sorted(experts)] for name, experts in single.items()}
    return whole | stacked


def _assemble(keys: list[str], fetch: Callable[[str], Tensor]) -> Tensor:
    """The tensor at one key, or single experts' [F, D] gates and ups -> [E, 2F, D], downs -> [E, D, F]."""
    tensors = [fetch(key) for key in keys]
    expert = _EXPERT.match(keys[0])
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
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind} weights {', '.join(names[:3])}{more}")
    if parts:
        raise ValueError(f"{', '.join(parts)}; use the configuration that these weights belong to")


# ---- files ----


def _write_weights(state: dict[str, Tensor], directory: Path) -> None:
    """One file, or numbered ones and an index of which holds what."""
    shards = _shards(state)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards):
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(state: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, a new shard wherever the next tensor would exceed SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Key -> the file that holds it."""
    if (directory / INDEX).exists():
        files = {key: directory / file for key, file in _read_json(directory / INDEX)["weight_map"].items()}
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
        raise ValueError(f"{file} is damaged ({error}); copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; give the folder of a saved model")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on disk before anything points at it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
