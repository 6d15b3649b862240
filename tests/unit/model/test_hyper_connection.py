"""Hyper-connections: the direction of the mixing, the Sinkhorn steps, what they are at initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from model.hyper_connection import HyperConnection, HyperHead, PlainResidual, collapse, mixed
from model.init import initialize
from model.kernels.sinkhorn import sinkhorn
from model.model import ForCausalLM
from tests.tiny import relative, tiny_config, tiny_model
from tests.unit.model import naive

CONFIG = tiny_config("s", hidden_size=6)


def connection(dtype: torch.dtype = torch.float64) -> HyperConnection:
    """Every parameter of order one, so that comb is far from symmetric."""
    made = HyperConnection(4, 6, 20, 1e-6, 1e-6)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made.to(dtype)


def random_streams(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_against_loops_over_streams() -> None:
    ours, streams = connection(), random_streams(2, 3, 4, 6)
    output = random_streams(5, 3, 6)[:2]
    x, mix = ours.enter(streams)
    new = ours.leave(output, streams, mix)
    weights = dict(ours.named_parameters())
    for b in range(2):
        for t in range(3):
            pre, post, comb = naive.hyper_weights(weights, CONFIG, streams[b, t])
            wanted = naive.mixed(streams[b, t], output[b, t], post, comb)
            assert relative(x[b, t], pre @ streams[b, t]) < 1e-12
            assert relative(new[b, t], wanted) < 1e-12
            transposed = naive.mixed(streams[b, t], output[b, t], post, comb.T)
            assert relative(new[b, t], transposed) > 1e-3  # the direction matters here


def test_direction_by_example() -> None:
    """comb_01 = 1 alone moves stream 0 into stream 1: the sum runs over comb's first axis."""
    comb = torch.zeros(1, 1, 2, 2)
    comb[..., 0, 1] = 1
    streams = torch.tensor([[[[3.0], [5.0]]]])
    post = torch.tensor([[[10.0, 100.0]]])
    new = HyperConnection(2, 1, 20, 1e-6, 1e-6).leave(torch.ones(1, 1, 1), streams, (post, comb))
    assert new.flatten().tolist() == [10.0, 103.0]


def test_streams_are_mixed_alike_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, streams = random_streams(5, 3, 2, 4), random_streams(5, 3, 4, 6)
    wanted = mixed(weights, streams)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative(mixed(weights, streams), wanted) < 1e-14


def test_sinkhorn_by_loops() -> None:
    logits = random_streams(5, 4, 4)
    for iterations in (1, 2, 20):
        found = sinkhorn(logits, iterations, 1e-6)
        for one, got in zip(logits, found):
            rows = one.exp()
            comb = rows / rows.sum(1, keepdim=True) + 1e-6
            for step in range(iterations):
                if step:
                    comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
                comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
            assert relative(got, comb) < 1e-13


def test_sinkhorn_is_transformers_arithmetic() -> None:
    """post, comb and the block's input of the same weights; fp32, 1e-6."""
    ours = connection(torch.float32)
    oracle = DeepseekV4HyperConnection(DeepseekV4Config(**CONFIG.to_hf()))
    oracle.load_state_dict(ours.state_dict())
    streams = random_streams(2, 3, 4, 6, dtype=torch.float32)
    x, (post, comb) = ours.enter(streams)
    for mine, theirs in zip((post, comb, x), oracle(streams)):
        assert relative(mine, theirs) < 2e-6


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_columns_sum_to_one(spread: float) -> None:
    comb = sinkhorn(spread * random_streams(1000, 4, 4, dtype=torch.float32), 20, 1e-6)
    assert (comb.sum(-2) - 1).abs().max() < 1e-5
    assert comb.min() > 0


def initialised(hidden_size: int) -> HyperConnection:
    """As a model of this width starts, from the table of `model.init`."""
    config = tiny_config("s", hidden_size=hidden_size, initializer_range=0.02)
    made = initialize(ForCausalLM(config), 0).layers[0].attn_hc
    assert isinstance(made, HyperConnection)
    return made


@pytest.mark.parametrize("hidden_size", [512, 7168])
def test_doubly_stochastic_at_initialisation(hidden_size: int) -> None:
    """Rows and spectral norm within 1e-4 of 1, up to V4-Pro's width."""
    _, (_, comb) = initialised(hidden_size).enter(random_streams(2, 64, 4, hidden_size, dtype=torch.float32))
    assert (comb.sum(-2) - 1).abs().max() < 1e-5
    assert (comb.sum(-1) - 1).abs().max() < 1e-4
    norm = torch.linalg.matrix_norm(comb.double(), ord=2)
    assert (norm - 1).abs().max() < 1e-4
    assert comb.diagonal(dim1=-2, dim2=-1).min() > 0.5  # near identity


def test_plain_residual_at_initialisation() -> None:
    """The mean of the streams gets the output added once; equal streams stay what a residual would be."""
    made, output = initialised(256), random_streams(2, 5, 256, dtype=torch.float32)
    streams = random_streams(2, 5, 4, 256, dtype=torch.float32)
    x, mix = made.enter(streams)
    assert relative(x, streams.mean(2)) < 0.02
    new = made.leave(output, streams, mix)
    assert relative(new.mean(2), streams.mean(2) + output) < 0.02
    equal = streams[:, :, :1].expand_as(streams)
    x, mix = made.enter(equal)
    assert relative(x, equal[:, :, 0]) < 0.02
    assert relative(made.leave(output, equal, mix), equal + output.unsqueeze(2)) < 0.02
    torch.nn.init.zeros_(made.scale)  # without the small dynamic part: to rounding
    x, mix = made.enter(streams)
    assert relative(x, streams.mean(2)) < 1e-5
    assert relative(made.leave(output, streams, mix).mean(2), streams.mean(2) + output) < 1e-5


def test_head() -> None:
    made = HyperHead(4, 6, 1e-6, 1e-6).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    streams = random_streams(2, 3, 4, 6)
    wanted = torch.stack([naive.head(dict(made.named_parameters()), CONFIG, x) for x in streams])
    assert relative(made(streams), wanted) < 1e-12


def test_head_starts_as_the_mean() -> None:
    model = initialize(ForCausalLM(tiny_config("s", initializer_range=0.02)), 0)
    streams = random_streams(2, 3, 4, 32, dtype=torch.float32)
    assert relative(model.hc_head(streams), streams.mean(2)) < 0.02


def test_plain_residual() -> None:
    streams, output = random_streams(2, 3, 1, 6), random_streams(7, 3, 6)[:2]
    x, mix = PlainResidual().enter(streams)
    assert torch.equal(x, streams[:, :, 0])
    assert torch.equal(PlainResidual().leave(output, streams, mix), streams + output.unsqueeze(2))


def test_collapse_in_bf16() -> None:
    """Streams keep their dtype; the mixing weights are computed in fp32."""
    made, streams = connection(torch.float32), random_streams(1, 2, 4, 6, dtype=torch.float32).bfloat16()
    x, (post, comb) = made.enter(streams)
    assert x.dtype == torch.bfloat16 and post.dtype == comb.dtype == torch.float32
    assert made.leave(x, streams, (post, comb)).dtype == torch.bfloat16
    assert collapse(torch.ones(1, 2, 4), streams).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes", [{"residual": "plain", "hc_mult": 1}, {"hc_mult": 1}, {"hc_mult": 2}, {}], ids=str
)
def test_every_residual_trains(changes: dict) -> None:
    """A batch is learned by heart: the loss falls to a third within 30 steps."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1, initializer_range=0.1, **changes))
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 96, (2, 2, 24), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss, count = model(ids, labels).losses["lm"]
        losses.append((loss / count).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3
