"""Context parallelism equals one rank: every loss part, expert loads, every gradient."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionMode
from model.model import ForCausalLM
from tests.distributed.ranks import DEVICES, spawn
from tests.tiny import packed_batch, relative, tiny_config, tiny_model
from train.parallel.context import context_of
from train.parallel.mesh import build_mesh
from train.ranks import Ranks

MODULE = "tests.distributed.test_context"
LENGTH = 256
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
Case = tuple[str, AttentionMode, int, torch.dtype, bool]  # layers, mode, seed of the rows, dtype, recompute
CASES: list[Case] = [
    ("sch", "sparse", 0, torch.float64, False),
    ("hc", "dense", 1, torch.float64, False),
    ("fsc", "sparse", 2, torch.float64, True),
    ("hsc", "sparse", 3, torch.float32, False),
]


def rows_of(seed: int) -> list[list[int]]:
    """A row of one document, one over all borders between short ones, and random ones with padding."""
    pick = random.Random(seed)
    rows = [[LENGTH], [1, 7, LENGTH - 20, 2, 1], [63, 1, 64, 66]]
    sizes: list[int] = []
    while sum(sizes) < LENGTH - 40:
        sizes.append(min(pick.choice([1, 2, 3, 5, 15, 16, 33, 70, 100]), LENGTH - sum(sizes)))
    return [*rows, sizes]


def recomputed(model: ForCausalLM) -> None:
    """Backward computes every layer again."""
    layers: list[Any] = [*model.layers, *(mtp.block for mtp in model.mtp)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def losses_and_gradients(
    model: ForCausalLM, batch: dict[str, Tensor], mode: AttentionMode
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Sums and counts of all loss parts, chosen experts, gradients of a weighted sum."""
    out = model(**batch, mode=mode, indexer_loss=True)
    weights = {"lm": 1.0, "mtp": 0.3, "balance": 0.1, "indexer": 0.5}
    assert out.losses.keys() == weights.keys()
    sum(weights[part] * loss for part, (loss, _) in out.losses.items()).backward()
    values = torch.stack(
        [torch.stack([x.double() for x in part]) for part in out.losses.values()]
    ).detach()  # [parts, 2]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values, out.expert_indices, grads


def compare(ranks: Ranks, cp: str) -> None:
    mesh = build_mesh(ranks.rank, ranks.world, cp=int(cp))
    parts = context_of(mesh)
    for layers, mode, seed, dtype, recompute in CASES:
        few = {"num_nextn_predict_layers": 1, "hc_sinkhorn_iters": 2}
        config = tiny_config(layers, 1, compress_rates=RATES, **few)
        batch = packed_batch(rows_of(seed), LENGTH, depth=1)
        whole = {name: x.to(ranks.device) for name, x in batch.items()}
        each = len(whole["input_ids"]) // mesh.data_world
        mine = {name: x[mesh.data_rank * each :][:each] for name, x in whole.items()}
        model = tiny_model(config).to(ranks.device, dtype)
        wanted, experts, expected = losses_and_gradients(model, whole, mode)
        model.zero_grad()
        model.context = parts
        if recompute:
            recomputed(model)
        found, chosen, grads = losses_and_gradients(model, mine, mode)
        dist.all_reduce(found)
        exact = dtype == torch.float64
        assert relative(found, wanted) <= (1e-12 if exact else 1e-6), (layers, found, wanted)
        for ours, theirs in zip(chosen, experts, strict=True):
            assert torch.equal(ours, parts.part(theirs[mesh.data_rank * each :][:each]))
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            dist.all_reduce(grad)
            assert relative(grad, expected[name]) <= (1e-9 if exact else 1e-5), (layers, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("world", "cp"), [(2, "2"), (4, "4"), (4, "2")])
def test_equals_one_rank(world: int, cp: str, device: str, tmp_path: Path) -> None:
    spawn(world, MODULE, "compare", cp, folder=tmp_path, device=device)
