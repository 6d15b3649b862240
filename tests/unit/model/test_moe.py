"""Routers, dispatch and grouped experts against loops over tokens and experts; loads, bias, hash table."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import initialize
from model.linear import _grouped_linear_masked, grouped_linear
from model.model import ForCausalLM
from model.moe import MoE, Routing, clamped_swiglu, expert_loads, hash_table, update_bias
from tests.tiny import packed_batch, relative, tiny_config, tiny_model
from tests.unit.model import naive

CONFIG = tiny_config("s", vocab_size=40)


def block(mlp_type: str, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> MoE:
    """Random weights, and a random bias or the hash table."""
    made, generator = MoE(config, mlp_type), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    if mlp_type == "hash_moe":
        made.gate.get_buffer("tid2eid").copy_(hash_table(config.vocab_size, config.n_routed_experts, 3, 0))
    else:
        torch.nn.init.normal_(made.gate.get_buffer("e_score_correction_bias"), std=0.2, generator=generator)
    return made.to(dtype)


def tokens(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 11, config.hidden_size, generator=generator).to(dtype).requires_grad_()
    return x, torch.randint(0, config.vocab_size, (2, 11), generator=generator)


def compare(made: MoE, x: Tensor, ids: Tensor, tolerance: float = 1e-12) -> Routing:
    """Values, and the gradients of every weight and of x, against one token and one expert at a time."""
    ours, routing = made(x, ids)
    weights = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    table = made.gate.get_buffer("tid2eid") if made.gate.is_hash else None
    wanted = naive.moe(weights, CONFIG, x.flatten(0, 1), table, ids.flatten()).view_as(x)
    assert relative(ours, wanted) <= tolerance
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
    trained = {"x": x, **dict(made.named_parameters())}
    mine = torch.autograd.grad(ours, list(trained.values()), upstream)
    theirs = torch.autograd.grad(wanted, list(trained.values()), upstream)
    for name, a, b in zip(trained, mine, theirs):
        assert b.any() and relative(a, b) <= tolerance, name
    return routing


@pytest.mark.parametrize("mlp_type", ["moe", "hash_moe"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_token_and_expert_at_a_time(mlp_type: str, dtype: torch.dtype, tolerance: float) -> None:
    compare(block(mlp_type, dtype=dtype), *tokens(dtype=dtype), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_experts_without_tokens_and_with_all(dtype: torch.dtype, tolerance: float) -> None:
    """Expert 5 gets every token, experts 0, 3 and 7 none; their gradients are exactly zero."""
    made = block("moe", dtype=dtype)
    made.gate.get_buffer("e_score_correction_bias")[5] = 100
    made.gate.get_buffer("e_score_correction_bias")[[0, 3, 7]] = -100
    routing = compare(made, *tokens(dtype=dtype), tolerance)
    counts = torch.bincount(routing.indices.flatten(), minlength=8)
    assert counts[5] == 22 and not counts[[0, 3, 7]].any() and counts.sum() == 66
    output, _ = made(*tokens(dtype=dtype))
    output.sum().backward()
    for stack in made.experts.parameters():
        assert stack.grad is not None
        assert not stack.grad[[0, 3, 7]].any() and stack.grad[5].any()


def test_the_same_twice() -> None:
    """Bitwise, gradients too."""
    made, (x, ids) = block("moe", dtype=torch.float32), tokens(dtype=torch.float32)
    runs = [torch.autograd.grad(made(x, ids)[0].square().sum(), [x, *made.parameters()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_router() -> None:
    """The bias chooses, the affinities weigh; weights sum to the scaling factor; no gradient for the bias."""
    made, (x, ids) = block("moe").gate, tokens()
    routing = made(x.flatten(0, 1), ids.flatten())
    affinities = torch.log1p((x.flatten(0, 1) @ made.weight.T).exp()).sqrt()
    assert relative(routing.affinities, affinities) < 1e-12
    best = (affinities + made.get_buffer("e_score_correction_bias")).topk(3).indices
    assert torch.equal(routing.indices.sort().values, best.sort().values)
    assert not torch.equal(best.sort().values, affinities.topk(3).indices.sort().values)
    assert torch.allclose(routing.weights.sum(-1), torch.tensor(1.5, dtype=torch.float64))
    ratio = routing.weights / affinities.gather(1, routing.indices)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    assert not made.get_buffer("e_score_correction_bias").requires_grad


def test_router_computes_in_fp32() -> None:
    """bf16 inputs lose nothing more: affinities of the rounded inputs are exact to fp32."""
    made, (x, ids) = block("moe", dtype=torch.float32).gate, tokens(dtype=torch.float32)
    rounded = x.flatten(0, 1).bfloat16()
    routing = made(rounded, ids.flatten())
    exact = torch.log1p((rounded.double() @ made.weight.double().T).exp()).sqrt()
    assert routing.affinities.dtype == routing.weights.dtype == torch.float32
    assert relative(routing.affinities, exact) < 1e-6


def test_replay_uses_todays_weights() -> None:
    """Given experts, in the given order; affinities, weights and all gradients are of today's parameters."""
    made, (x, ids) = block("moe"), tokens()
    given = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(22)]
    )
    output, routing = made(x, ids, given)
    assert torch.equal(routing.indices, given)
    expected = routing.affinities.gather(1, given)
    assert torch.allclose(routing.weights, expected / expected.sum(-1, keepdim=True) * 1.5)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    mine = torch.autograd.grad(output, [x, *made.parameters()], upstream)
    hashed = block("hash_moe")  # the same choice by table: every token an id of its own
    hashed.load_state_dict(made.state_dict(), strict=False)
    hashed.gate.get_buffer("tid2eid")[:22] = given
    wanted, _ = hashed(x, torch.arange(22).view(2, 11))
    theirs = torch.autograd.grad(wanted, [x, *hashed.parameters()], upstream)
    assert torch.equal(output, wanted) and all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_replay_through_the_model() -> None:
    """Replaying the model's own choice is bitwise nothing; another choice, in any one MoE, is something."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1))
    batch = packed_batch([[9, 21], [30]], 32, depth=1)
    first = model(**batch)
    assert [tuple(i.shape) for i in first.expert_indices] == [(2, 32, 3)] * 4
    again = model(**batch, replay=first.expert_indices)
    partly = model(**batch, replay=[None, *first.expert_indices[1:3], None])
    for part in first.losses:
        assert torch.equal(first.losses[part][0], again.losses[part][0])
        assert torch.equal(first.losses[part][0], partly.losses[part][0])
    for i in range(4):
        other = [choice.clone() for choice in first.expert_indices]
        other[i] = (other[i] + 1) % 8
        changed = model(**batch, replay=other)
        assert torch.equal(changed.expert_indices[i], other[i])
        assert not torch.equal(changed.losses["mtp"][0], first.losses["mtp"][0])
        assert torch.equal(changed.losses["lm"][0], first.losses["lm"][0]) == (i == 3)


def test_swiglu_is_clamped() -> None:
    """Gate at most 10, linear part within 10 either way; no gradient beyond, a plain one within."""
    gate = torch.tensor([-20.0, -3.0, 0.5, 9.5, 10.5, 50.0], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([-20.0, -10.5, -9.5, 3.0, 10.5, 9.9], dtype=torch.float64, requires_grad=True)
    found = clamped_swiglu(gate, up, 10.0)
    a = torch.tensor([-20.0, -3.0, 0.5, 9.5, 10.0, 10.0], dtype=torch.float64)
    b = torch.tensor([-10.0, -10.0, -9.5, 3.0, 10.0, 9.9], dtype=torch.float64)
    sigmoid = 1 / (1 + (-a).exp())
    assert torch.allclose(found, a * sigmoid * b)
    d_gate, d_up = torch.autograd.grad(found.sum(), (gate, up))
    plain = b * sigmoid * (1 + a * (1 - sigmoid))
    inside = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.float64)
    assert torch.allclose(d_gate, plain * inside)
    assert torch.allclose(d_up, a * sigmoid * torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.float64))


def test_both_kinds_of_expert_are_clamped() -> None:
    """Huge inputs, in routed and in shared experts."""
    config = tiny_config("s", vocab_size=40, swiglu_limit=0.01)
    made, (x, ids) = block("moe", config), tokens()
    weights = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    wanted = naive.moe(weights, config, x.flatten(0, 1)).view_as(x)
    assert relative(made(x, ids)[0], wanted) < 1e-12
    assert relative(made(x, ids)[0], naive.moe(weights, CONFIG, x.flatten(0, 1)).view_as(x)) > 0.5


def test_shared_experts_are_wide() -> None:
    """Several shared experts are one of their summed width."""
    made = MoE(tiny_config("s", n_shared_experts=3), "moe")
    assert made.shared_experts.gate_proj.weight.shape == (72, 32)
    assert made.shared_experts.down_proj.weight.shape == (32, 72)


def test_masked_product_is_the_grouped_one() -> None:
    """fp32, empty groups at both ends and in the middle; values and gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight = torch.randn(6, 4, 8, generator=generator, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 7, 10, 10], dtype=torch.int32)
    outs = [product(x, weight, offsets) for product in (_grouped, _grouped_linear_masked)]
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in outs]
    assert relative(*outs) < 1e-6 and all(relative(a, b) < 1e-6 for a, b in zip(*grads))
    by_hand = torch.cat([x[:3] @ weight[1].T, x[3:7] @ weight[3].T, x[7:] @ weight[4].T])
    assert relative(outs[0], by_hand) < 1e-6


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(x, weight, offsets)


@pytest.mark.parametrize(("vocab", "experts", "k"), [(96, 8, 3), (101, 8, 6), (40, 256, 6), (12, 6, 6)])
def test_hash_table(vocab: int, experts: int, k: int) -> None:
    """Distinct experts per token; each full run of E tokens gives every expert exactly K."""
    table = hash_table(vocab, experts, k, 3)
    assert table.shape == (vocab, k) and table.dtype == torch.int64
    assert all(len(set(row)) == k for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=experts)
    full, rest = divmod(vocab, experts)
    assert len(counts) == experts
    assert counts.min() >= full * k and counts.max() <= full * k + min(k, rest)
    assert torch.equal(table, hash_table(vocab, experts, k, 3))
    if k < experts:
        assert not torch.equal(table, hash_table(vocab, experts, k, 4))


def test_hash_table_is_not_by_neighbours() -> None:
    """Consecutive ids are no more alike than any two: of 6 of 256 experts, 0.14 are shared on average."""
    rows = [set(row) for row in hash_table(5120, 256, 6, 0).tolist()]
    shared = sum(len(a & b) for a, b in pairwise(rows)) / (len(rows) - 1)
    assert 0.08 < shared < 0.2


def test_every_hash_layer_has_its_own_table() -> None:
    def tables(seed: int, hash_seed: int) -> list[Tensor]:
        model = initialize(ForCausalLM(tiny_config("sss", hash_layers=3, hash_seed=hash_seed)), seed)
        return [moe.gate.get_buffer("tid2eid") for moe in model.moes()]

    a, b, c = tables(0, 0)
    assert not torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, c)
    assert all(torch.equal(x, y) for x, y in zip((a, b, c), tables(1, 0)))  # of hash_seed, not of the run's
    assert not torch.equal(a, tables(0, 10)[0])


def test_bias_update() -> None:
    """Towards the mean load by a fixed step; at the mean nothing moves; the gate's buffer in place."""
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([0, 4, 10, 2]), 0.001)  # mean 4
    assert torch.allclose(bias, torch.tensor([0.001, 0.0, -0.001, 0.001]))
    update_bias(bias, torch.tensor([7, 7, 7, 7]), 0.001)
    assert torch.allclose(bias, torch.tensor([0.001, 0.0, -0.001, 0.001]))
    large = torch.tensor([2**40, 2**40 + 1, 2**40, 2**40 - 1])  # exact where fp32 counts no more
    update_bias(bias.zero_(), large, 1.0)
    assert bias.tolist() == [0, -1, 0, 1]


def test_bias_update_balances() -> None:
    """Applied again and again, the most loaded expert loses its excess."""
    made, (x, _) = block("moe", dtype=torch.float32).gate, tokens(dtype=torch.float32)
    x, real = (
        torch.cat([x.detach().flatten(0, 1), torch.randn(300, 32)]),
        torch.ones(322, 1, dtype=torch.bool),
    )
    spread = []
    for _ in range(400):
        indices = made(x, torch.zeros(322, dtype=torch.int64)).indices
        loads = expert_loads(indices.unsqueeze(1), 8, real)
        spread.append(loads.max().item() / loads.double().mean().item())
        update_bias(made.get_buffer("e_score_correction_bias"), loads, 0.005)
    assert spread[0] > 1.3 and max(spread[-20:]) < 1.15


def test_loads_ignore_padding() -> None:
    indices = torch.tensor([[[0, 1], [2, 1], [3, 0]], [[1, 2], [0, 3], [0, 3]]])
    real = torch.tensor([[True, True, False], [True, False, False]])
    loads = expert_loads(indices, 5, real)
    assert loads.tolist() == [1, 3, 2, 0, 0] and loads.dtype == torch.int64
    assert expert_loads(indices, 5, torch.ones_like(real)).tolist() == [4, 3, 2, 3, 0]
