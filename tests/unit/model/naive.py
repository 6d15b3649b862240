"""The model's parts once more, slowly: loops over tokens, heads and experts, from the equations alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig

Weights = Mapping[str, Tensor]


def attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    window: int,
) -> Tensor:
    """One softmax per token over its window, its visible entries and the sink: as `shared_kv_attention`."""
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = kv[b, max(t - int(positions[b, t]), t - window + 1) : t + 1]
            if entries is not None and visible is not None:
                keys = torch.cat((keys, entries[b, visible[b, t]]))
            logits = q[b, t] @ keys.T / math.sqrt(q.shape[-1])  # [H, J]
            weights = logits.exp() / (sinks.exp() + logits.exp().sum(-1)).unsqueeze(-1)
            rows.append(weights @ keys)
    return torch.stack(rows).view_as(q)


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def frequencies(rope: dict[str, Any], dims: int) -> list[float]:
    """Plain, or with YaRN: slow turns divided by the factor, fast ones kept, linear by channel between."""
    plain = [rope["rope_theta"] ** (-2 * i / dims) for i in range(dims // 2)]
    if rope["rope_type"] == "default":
        return plain

    def channel(turns: float) -> float:
        """Where a channel makes so many turns over the original length."""
        frequency = turns * 2 * math.pi / rope["original_max_position_embeddings"]
        return -dims * math.log(frequency) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(channel(rope["beta_fast"])), 0)
    high = max(math.ceil(channel(rope["beta_slow"])), low + 0.001)
    slow = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dims // 2)]
    return [f * (1 - s) + f / rope["factor"] * s for f, s in zip(plain, slow)]


def rotate(x: Tensor, rope: dict[str, Any], dims: int, sign: int = 1) -> Tensor:
    """Multiply pairs of the last `dims` channels of x [..., S, C] by exp(sign * i * position * frequency)."""
    position = torch.arange(x.shape[-2], dtype=torch.float64).unsqueeze(-1)
    angle = sign * position * torch.tensor(frequencies(rope, dims), dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x[..., -dims:].double().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((x[..., :-dims], torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)), dim=-1)


def token_attention(w: Weights, config: ModelConfig, x: Tensor, rope: str, window: int) -> Tensor:
    """Self-attention of one document x [S, D] over its tokens alone, nothing compressed."""
    heads, channels, dims = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    turn = config.rope_parameters[rope]
    q = norm(x @ w["q_a_proj.weight"].T, w["q_a_norm.weight"]) @ w["q_b_proj.weight"].T
    q = rotate(norm(q.view(len(x), heads, channels)).transpose(0, 1), turn, dims).transpose(0, 1)
    kv = rotate(norm(x @ w["kv_proj.weight"].T, w["kv_norm.weight"]), turn, dims)
    position = torch.arange(len(x))
    out = attention(q[None], kv[None], None, None, w["sinks"], position[None], window)[0]
    out = rotate(out.transpose(0, 1), turn, dims, -1).transpose(0, 1)
    groups = out.flatten(1).chunk(config.o_groups, dim=-1)
    matrices = w["o_a_proj.weight"].chunk(config.o_groups)
    return torch.cat([g @ m.T for g, m in zip(groups, matrices)], dim=-1) @ w["o_b_proj.weight"].T


def compressed(w: Weights, config: ModelConfig, x: Tensor, channels: int) -> Tensor:
    """CSA's entries [T, C] of one document x [S, D]: `w` of a compressor whose halves are a, then b."""
    rate = config.compress_rates["compressed_sparse_attention"]
    kv, gate, bias = x @ w["kv_proj.weight"].T, x @ w["gate_proj.weight"].T, w["position_bias"]
    entries = []
    for first in range(0, len(x) // rate * rate, rate):
        slots = [(first + j, channels, j) for j in range(rate)]
        slots += [(first - rate + j, 0, j) for j in range(rate) if first]
        values = torch.stack([kv[t, at : at + channels] for t, at, _ in slots])
        gates = torch.stack([gate[t, at : at + channels] + bias[j, at : at + channels] for t, at, j in slots])
        entries.append((gates.exp() / gates.exp().sum(0) * values).sum(0))
    normed = norm(torch.stack(entries), w["kv_norm.weight"])
    every = torch.zeros(len(x), channels, dtype=x.dtype)  # an entry turns as the first token of its window
    at = torch.arange(len(entries)) * rate
    every = every.index_put((at,), normed)
    return rotate(every, config.rope_parameters["compress"], config.qk_rope_head_dim)[at]


def indexer_loss(w: Weights, config: ModelConfig, x: Tensor, sparse: bool) -> tuple[Tensor, int]:
    """Of one document x [S, D] and a CSA layer's attention `w`: KL(attention || scores) summed over its
    queries that see an entry, and how many these are. Only the scores carry a gradient."""
    rate = config.compress_rates["compressed_sparse_attention"]
    loss, queries = torch.zeros((), dtype=x.dtype), range(rate - 1, len(x))
    if not queries:
        return loss, 0
    own, dims, turn = part(w, "indexer"), config.qk_rope_head_dim, config.rope_parameters["compress"]
    heads, channels = config.index_n_heads, config.index_head_dim
    with torch.no_grad():
        latent = norm(x @ w["q_a_proj.weight"].T, w["q_a_norm.weight"])
        q = (latent @ w["q_b_proj.weight"].T).view(len(x), config.num_attention_heads, config.head_dim)
        q = rotate(norm(q).transpose(0, 1), turn, dims).transpose(0, 1)
        kv = rotate(norm(x @ w["kv_proj.weight"].T, w["kv_norm.weight"]), turn, dims)
        entries = compressed(part(w, "compressor"), config, x, config.head_dim)
    index_q = (latent @ own["q_b_proj.weight"].T).view(len(x), heads, channels)
    index_q = rotate(index_q.transpose(0, 1), turn, dims).transpose(0, 1)
    index_k = compressed(part(own, "compressor"), config, x, channels)
    head_weights = x @ own["weights_proj.weight"].T / math.sqrt(heads * channels)
    for t in queries:
        scores = [
            sum(head_weights[t, h] * (index_q[t, h] @ key).clamp(min=0) for h in range(heads))
            for key in index_k[: (t + 1) // rate]
        ]
        chosen = sorted(range(len(scores)), key=lambda s: (-float(scores[s].detach()), s))
        chosen = chosen[: config.index_topk] if sparse else chosen
        keys = torch.cat((entries[chosen], kv[max(0, t - config.sliding_window + 1) : t + 1]))
        with torch.no_grad():
            weights = (q[t] @ keys.T / math.sqrt(config.head_dim)).exp()  # [H, J]
            mass = (weights / (w["sinks"].exp() + weights.sum(-1)).unsqueeze(-1)).sum(0)[: len(chosen)]
            teacher = mass / mass.sum()
        student = torch.stack([scores[s] for s in chosen])
        student = student.exp() / student.exp().sum()
        loss = loss + (teacher * (teacher.log() - student.log())).sum()
    return loss, len(queries)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
    """One expert, x [D]."""
    a, b = gate @ x, up @ x
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return down @ (a * torch.sigmoid(a) * b)


def moe(
    w: Weights, config: ModelConfig, x: Tensor, table: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """Tokens x [n, D] one by one through their experts; `table` [V, K] and `ids` [n] for hash routing."""
    k, limit, out = config.num_experts_per_tok, config.swiglu_limit, []
    for token in range(len(x)):
        affinity = torch.log1p((w["gate.weight"] @ x[token]).exp()).sqrt()
        if table is not None and ids is not None:
            chosen = table[ids[token]].tolist()
        else:
            ranked = (affinity + w["gate.e_score_correction_bias"]).tolist()
            chosen = sorted(range(len(ranked)), key=lambda e: -ranked[e])[:k]
        total = sum(affinity[e] for e in chosen)
        shared = tuple(w[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        y = swiglu(x[token], shared[0], shared[1], shared[2], limit)
        for e in chosen:
            gate, up = w["experts.gate_up_proj"][e].chunk(2)
            weight = config.routed_scaling_factor * affinity[e] / total
            y = y + weight * swiglu(x[token], gate, up, w["experts.down_proj"][e], limit)
        out.append(y)
    return torch.stack(out)


def hyper_weights(w: Weights, config: ModelConfig, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre [N], post [N] and comb [N, N] of one token's streams [N, D]."""
    n, eps = config.hc_mult, config.hc_eps
    mixes = w["fn"] @ norm(streams.flatten())
    pre, post, comb = mixes.split([n, n, n * n])
    b_pre, b_post, b_comb = w["base"].split([n, n, n * n])
    pre = torch.sigmoid(w["scale"][0] * pre + b_pre) + eps
    post = 2 * torch.sigmoid(w["scale"][1] * post + b_post)
    rows = (w["scale"][2] * comb + b_comb).view(n, n).exp()
    comb = rows / rows.sum(1, keepdim=True) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return pre, post, comb


def mixed(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """new X_j = post_j * output + sum_i comb_ij X_i, with streams [N, D] and output [D]."""
    rows = []
    for j in range(len(streams)):
        row = post[j] * output
        for i in range(len(streams)):
            row = row + comb[i, j] * streams[i]
        rows.append(row)
    return torch.stack(rows)


def head(w: Weights, config: ModelConfig, streams: Tensor) -> Tensor:
    """Streams [S, N, D] of one document -> [S, D]."""
    mixes = norm(streams.flatten(1)) @ w["hc_fn"].T
    pre = torch.sigmoid(mixes * w["hc_scale"] + w["hc_base"]) + config.hc_eps
    return (pre.unsqueeze(-1) * streams).sum(1)


def sliding_block(w: Weights, config: ModelConfig, streams: Tensor) -> Tensor:
    """A decoder layer with sliding-window attention and a top-k MoE on one document [S, N, D]."""

    def around(streams: Tensor, name: str, norm_name: str, block: Callable[[Tensor], Tensor]) -> Tensor:
        weights = [hyper_weights(part(w, name), config, token) for token in streams]
        x = torch.stack([pre @ token for (pre, _, _), token in zip(weights, streams)])
        out = block(norm(x, w[f"{norm_name}.weight"]))
        return torch.stack([mixed(x, o, post, comb) for x, o, (_, post, comb) in zip(streams, out, weights)])

    def attend(x: Tensor) -> Tensor:
        return token_attention(part(w, "self_attn"), config, x, "main", config.sliding_window)

    streams = around(streams, "attn_hc", "input_layernorm", attend)
    return around(streams, "ffn_hc", "post_attention_layernorm", lambda x: moe(part(w, "mlp"), config, x))


def part(weights: Weights, prefix: str) -> Weights:
    """The weights below a prefix, without it."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(f"{prefix}.")}
