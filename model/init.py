"""Every parameter's initialisation, in one table with its reason.

Each tensor, and each expert's matrix, draws from a generator seeded by (seed, full name): the values depend
neither on the order of construction nor on which tensors or experts a rank holds.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig
from model.model import ForCausalLM
from model.moe import Experts, hash_table

Fill = Callable[[Tensor, ModelConfig, torch.Generator], object]


def _normal(x: Tensor, config: ModelConfig, generator: torch.Generator) -> object:
    return x.normal_(0.0, config.initializer_range, generator=generator)


def _into_residual(x: Tensor, config: ModelConfig, generator: torch.Generator) -> object:
    return x.normal_(
        0.0, config.initializer_range / math.sqrt(2 * config.num_hidden_layers), generator=generator
    )


def _constant(value: float) -> Fill:
    return lambda x, config, generator: x.fill_(value)


def _hc_base(x: Tensor, config: ModelConfig, generator: torch.Generator) -> object:
    n = config.hc_mult
    x.zero_()  # post = 2 sigmoid(0) = 1
    x[:n] = _mean_of_streams(n)
    x[2 * n :].view(n, n).fill_diagonal_(COMB_DIAGONAL)
    return x


def _hc_head_base(x: Tensor, config: ModelConfig, generator: torch.Generator) -> object:
    return x.fill_(_mean_of_streams(config.hc_mult))


def _mean_of_streams(n: int) -> float:
    """The logit at which a sigmoid gives 1 / n (and almost 1 for one stream)."""
    share = min(1 / n, 0.999)
    return math.log(share / (1 - share))


COMB_DIAGONAL = (
    3.0  # softmax row of 4 streams: 0.870 on the diagonal; from 4 on Sinkhorn leaves rows 1e-4 off
)

# (full-name pattern, fill, reason); the first match counts.
TABLE: tuple[tuple[str, Fill, str], ...] = (
    (r".*norm\.weight", _constant(1.0), "norms start as plain normalisation"),
    (r".*\.sinks", _constant(0.0), "one neutral extra slot, as in the released model's code"),
    (r".*\.position_bias", _constant(0.0), "pooling starts content-based, positions alike"),
    (
        r".*(attn|ffn)_hc\.base",
        _hc_base,
        "pre = mean of the streams, post = 1, comb near identity: a plain residual",
    ),
    (r".*hc_head\.hc_base", _hc_head_base, "the head starts as the mean of the streams"),
    (
        r".*(attn|ffn)_hc\.scale|.*hc_head\.hc_scale",
        _constant(0.01),
        "mixing starts almost static (Xie et al. 2026)",
    ),
    (
        r".*(attn|ffn)_hc\.fn|.*hc_head\.hc_fn",
        _normal,
        "breaks the symmetry between streams through the small scale",
    ),
    (
        r".*\.(o_b_proj|down_proj)(\.weight)?",
        _into_residual,
        "2 L outputs add up on the residual: variance / 2 L",
    ),
    (r".*(embed_tokens|lm_head|_proj|mlp\.gate)\.weight", _normal, "initializer_range"),
    (r".*\.experts\.gate_up_proj", _normal, "initializer_range"),
)


@torch.no_grad()
def initialize(model: ForCausalLM, seed: int) -> ForCausalLM:
    """Fill every parameter and buffer of `model` in place, on whatever device they are."""
    for name, parameter in model.named_parameters():
        fill(model, name, parameter, seed)
    fill_buffers(model, model.lm_head.weight.device)
    return model


@torch.no_grad()
def fill(model: ForCausalLM, name: str, values: Tensor, seed: int) -> Tensor:
    """Fill `values`, of the shape of `model`'s parameter of this full name, in place; returns them."""
    owner, rule = model.get_submodule(name.rpartition(".")[0]), _fill_for(name)
    if not isinstance(owner, Experts):
        rule(values, model.config, _generator(f"{seed}/{name}", values.device))
        return values
    for number, matrix in enumerate(values, start=owner.first):
        rule(matrix, model.config, _generator(f"{seed}/{name}/{number}", values.device))
    return values


def fill_buffers(model: ForCausalLM, device: torch.device) -> None:
    """Put the buffers' first values on `device`: hash tables, and balancing biases of zero."""
    config = model.config
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    for layer, moe in enumerate(model.moes()):
        if moe.gate.is_hash:
            table = hash_table(config.vocab_size, experts, k, config.hash_seed + layer)
            moe.gate.tid2eid = table.to(device)
        else:
            moe.gate.e_score_correction_bias = torch.zeros(experts, device=device)


def _fill_for(name: str) -> Fill:
    for pattern, fill, _ in TABLE:
        if re.fullmatch(pattern, name):
            return fill
    raise KeyError(f"model.init.TABLE has no row for {name}")


def _generator(key: str, device: torch.device) -> torch.Generator:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device).manual_seed(seed)
