"""Which algorithm trains which parameter: one table of full names, and the groups made from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from configs.errors import ConfigError
from optim.config import OptimConfig

SETS = ("model", "indexer")  # each has its own gradient norm, learning rate and switch
Blocks = Callable[[Any, int], tuple[int, ...]]  # (model config, rows of the matrix) -> rows of its blocks


class Rule(NamedTuple):
    """One row of the table: names that match `pattern` in full go to `algorithm` in the set `set`."""

    pattern: str
    algorithm: str  # "muon" | "adamw"
    set: str  # one of SETS
    blocks: Blocks


class GroupRow(NamedTuple):
    """One printable line about a group; `matrices` counts what Muon orthogonalises one by one."""

    group: str
    algorithm: str
    set: str
    tensors: int
    matrices: int
    parameters: int
    examples: str


def _whole(config: Any, rows: int) -> tuple[int, ...]:
    return (rows,)


def _output_groups(config: Any, rows: int) -> tuple[int, ...]:
    return (config.o_lora_rank,) * config.o_groups


def _gate_and_up(config: Any, rows: int) -> tuple[int, ...]:
    return (config.moe_intermediate_size,) * 2


def _streams(config: Any, rows: int) -> tuple[int, ...]:
    return (config.hc_mult, config.hc_mult, config.hc_mult**2)  # pre, post, comb


def _windows(config: Any, rows: int) -> tuple[int, ...]:
    return (config.head_dim,) * (rows // config.head_dim)  # CSA: a half, b half; HCA: one


def _index_windows(config: Any, rows: int) -> tuple[int, ...]:
    return (config.index_head_dim,) * 2


_LAYER = r"(layers\.\d+|mtp\.\d+\.block)\."
_ATTENTION = _LAYER + r"self_attn\."
_INDEXER = _ATTENTION + r"indexer\."
_HEAD = r"(mtp\.\d+\.)?hc_head\."

RULES = (
    # Muon: every matrix that is a linear map, cut into its logically independent blocks.
    Rule(_ATTENTION + r"(q_a_proj|q_b_proj|kv_proj|o_b_proj)\.weight", "muon", "model", _whole),
    Rule(_ATTENTION + r"o_a_proj\.weight", "muon", "model", _output_groups),
    Rule(_ATTENTION + r"compressor\.(kv_proj|gate_proj)\.weight", "muon", "model", _windows),
    Rule(_LAYER + r"(attn_hc|ffn_hc)\.fn", "muon", "model", _streams),
    Rule(_LAYER + r"mlp\.gate\.weight", "muon", "model", _whole),
    Rule(_LAYER + r"mlp\.experts\.gate_up_proj", "muon", "model", _gate_and_up),
    Rule(_LAYER + r"mlp\.experts\.down_proj", "muon", "model", _whole),
    Rule(_LAYER + r"mlp\.shared_experts\.(gate_proj|up_proj|down_proj)\.weight", "muon", "model", _whole),
    Rule(_HEAD + r"hc_fn", "muon", "model", _whole),
    Rule(r"mtp\.\d+\.(e_proj|h_proj)\.weight", "muon", "model", _whole),
    Rule(_INDEXER + r"compressor\.(kv_proj|gate_proj)\.weight", "muon", "indexer", _index_windows),
    Rule(_INDEXER + r"(q_b_proj|weights_proj)\.weight", "muon", "indexer", _whole),
    # AdamW: tables of vectors, norms, biases and scales.
    Rule(r"(embed_tokens|lm_head|norm)\.weight", "adamw", "model", _whole),
    Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", "adamw", "model", _whole),
    Rule(_ATTENTION + r"(q_a_norm|kv_norm|compressor\.kv_norm)\.weight", "adamw", "model", _whole),
    Rule(_ATTENTION + r"(sinks|compressor\.position_bias)", "adamw", "model", _whole),
    Rule(_LAYER + r"(attn_hc|ffn_hc)\.(base|scale)", "adamw", "model", _whole),
    Rule(_HEAD + r"(hc_base|hc_scale)", "adamw", "model", _whole),
    Rule(r"mtp\.\d+\.(enorm|hnorm|norm)\.weight", "adamw", "model", _whole),
    Rule(_INDEXER + r"compressor\.(kv_norm\.weight|position_bias)", "adamw", "indexer", _whole),
)


def rule_for(name: str) -> Rule:
    """The one rule whose pattern matches the whole of `name`; ConfigError when there is not exactly one."""
    found = [rule for rule in RULES if re.fullmatch(rule.pattern, name)]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} rules match parameter {name!r}; give it one in optim/groups.py")
    return found[0]


def block_rows(name: str, shape: torch.Size, model_config: Any) -> tuple[int, ...]:
    """Rows, along dim -2, of the logically independent blocks of a Muon matrix; leading dims are a batch.

    Raises ConfigError when the blocks of `model_config` do not fill the tensor.
    """
    if len(shape) < 2:
        raise ConfigError(f"{name!r} has shape {list(shape)}, no matrix; give it to AdamW in optim/groups.py")
    blocks = rule_for(name).blocks(model_config, shape[-2])
    if sum(blocks) != shape[-2]:
        raise ConfigError(f"{name!r} has {shape[-2]} rows, not the blocks {blocks} of optim/groups.py")
    return blocks


def build_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], model_config: Any, optim_config: OptimConfig
) -> list[dict[str, Any]]:
    """Parameter groups of HybridOptimizer: at most one for each pair of algorithm and set.

    model_config is read for o_groups, o_lora_rank, moe_intermediate_size, hc_mult, head_dim, index_head_dim.
    A group holds `params` with their `names` and, for Muon, their `blocks`, in parallel; `algorithm`, `set`,
    `active` (the switch of `set_active`), `lr`, `lr_scale`, and what its algorithm needs. Raises ConfigError
    when a parameter has no home.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        rule = rule_for(name)
        algorithm = "adamw" if optim_config.name == "adamw" else rule.algorithm
        if (algorithm, rule.set) not in groups:
            groups[algorithm, rule.set] = _empty_group(algorithm, rule.set, optim_config)
        group = groups[algorithm, rule.set]
        group["params"].append(parameter)
        group["names"].append(name)
        if algorithm == "muon":
            group["blocks"].append(block_rows(name, parameter.shape, model_config))
    return list(groups.values())


def _empty_group(algorithm: str, set_name: str, config: OptimConfig) -> dict[str, Any]:
    lr = config.lr
    if set_name == "indexer" and config.indexer_lr is not None:
        lr = config.indexer_lr
    group: dict[str, Any] = {"params": [], "names": [], "algorithm": algorithm, "set": set_name}
    group |= {"active": True, "lr": lr, "lr_scale": lr / config.lr, "weight_decay": config.weight_decay}
    if algorithm == "muon":
        group |= {"blocks": [], "momentum": config.momentum, "update_rms": config.update_rms}
        return group | {"newton_schulz_dtype": config.newton_schulz_dtype}
    return group | {"betas": tuple(config.betas), "eps": config.eps}


def set_active(groups: Iterable[dict[str, Any]], set_name: str, active: bool) -> None:
    """Switch a set on or off; off means no update, no weight decay and no change of its moments."""
    for group in groups:
        if group["set"] == set_name:
            group["active"] = active


def group_rows(groups: Iterable[dict[str, Any]]) -> list[GroupRow]:
    """One row a group, for printing; the examples are three different kinds of parameter."""
    table = []
    for group in groups:
        params, names = group["params"], group["names"]
        blocks = group.get("blocks", [()] * len(params))
        matrices = sum(p.shape[:-2].numel() * len(rows) for p, rows in zip(params, blocks, strict=True))
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
        table.append(
            GroupRow(
                group=f"{group['set']}-{group['algorithm']}",
                algorithm=group["algorithm"],
                set=group["set"],
                tensors=len(params),
                matrices=matrices,
                parameters=sum(p.numel() for p in params),
                examples=", ".join(list(kinds)[:3]),
            )
        )
    return table
