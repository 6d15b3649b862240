"""The one door of matrix products: values, dtypes, and that every product with a weight goes through it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from model.attention import GroupedOutput
from model.linear import Kind, Linear, grouped_linear, linear
from model.model import ForCausalLM
from model.moe import Experts, expert_mlp
from tests.tiny import packed_batch, relative, tiny_config, tiny_model

# Products that never leave higher precision: not through the door.
OUTSIDE = ("embed_tokens", "lm_head", "mlp.gate", "o_a_proj")


def recorded(model: ForCausalLM) -> list[tuple[str, tuple[int, ...]]]:
    """Replace the products of all modules by ones that note (kind, weight's shape); returns the notes."""
    notes: list[tuple[str, tuple[int, ...]]] = []

    def one(x, weight, kind):
        notes.append((kind, tuple(weight.shape)))
        return linear(x, weight, kind)

    def mlp(rows, weights, offsets, gate_up, down, limit):
        notes.extend(("expert", tuple(stack.shape)) for stack in (gate_up, down))
        return expert_mlp(rows, weights, offsets, gate_up, down, limit)

    for module in model.modules():
        if isinstance(module, Linear):
            module.product = one
        elif isinstance(module, Experts):
            module.mlp = mlp
    return notes


def test_every_projection_goes_through_the_door() -> None:
    """Once a forward, with its own kind; replacing the product on built modules is enough."""
    model = tiny_model(tiny_config("sch", num_nextn_predict_layers=1))
    batch = packed_batch([[40]], 40, depth=1)
    before = model(**batch).losses["mtp"][0]
    notes = recorded(model)
    assert torch.equal(before, model(**batch).losses["mtp"][0])
    through = [shape for _, shape in notes]
    expected = [
        tuple(weight.shape)
        for name, weight in model.named_parameters()
        if ("_proj" in name) and not any(part in name for part in OUTSIDE)
    ]
    assert sorted(through) == sorted(expected)
    assert {kind for kind, _ in notes} == {*get_args(Kind), "expert"}


def test_kinds() -> None:
    """Which role each projection plays: precision policies decide by it."""
    model = ForCausalLM(tiny_config("c", num_nextn_predict_layers=1))
    kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, Linear)}
    attention = {"q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"}
    for name, kind in kinds.items():
        parent, leaf = name.split(".")[-2:]
        if parent == "compressor":
            expected = "compressor"
        elif parent == "indexer":
            expected = {"q_b_proj": "indexer", "weights_proj": "indexer_weights"}[leaf]
        elif parent == "shared_experts":
            expected = "shared_expert"
        elif parent == "self_attn":
            expected = "attention" if leaf in attention else ""
        else:
            expected = "mtp" if leaf in ("e_proj", "h_proj") else ""
        assert kind == expected, name
    assert len(kinds) == 2 * 4 + 2 * 2 + 2 + 2 * 3 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_in_the_activations_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 16, generator=generator), torch.randn(3, 8, 16, generator=generator)
    out = linear(x.to(dtype), weight[0], "attention")
    assert out.dtype == dtype and relative(out, x @ weight[0].T) < 0.02
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    out = grouped_linear(x.to(dtype), weight, offsets)
    assert out.dtype == dtype
    assert relative(out, torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])) < 0.02


def test_grouped_output_by_hand() -> None:
    """Each group of heads has its own matrix: the g-th slice of rows, the g-th slice of channels."""
    module = GroupedOutput(in_features=12, groups=3, rank=2)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 5, 12)
    parts = [x[..., 4 * g : 4 * g + 4] @ module.weight[2 * g : 2 * g + 2].T for g in range(3)]
    assert relative(module(x), torch.cat(parts, dim=-1)) < 1e-6
