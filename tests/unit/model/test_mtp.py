"""Multi-token prediction against a loop over documents, written from its equations in plain tensor code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.model import ForCausalLM, further_ids
from tests.tiny import documents, packed_batch, relative, tiny_config, tiny_model
from tests.unit.model import naive

ROWS, LENGTH = [[1, 2, 3, 4, 7], [22, 5]], 30


def streams_of(model: ForCausalLM, tokens: Tensor) -> Tensor:
    """The main model's streams [S, N, D] of one document, before its head."""
    caught: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda module, args, out: caught.append(out[0]))
    model(tokens.unsqueeze(0))
    hook.remove()
    return caught[0][0]


def loss_by_document(model: ForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Depth k at t sees tokens up to t + k and predicts t + k + 1; there are no other positions."""
    config, head, embedding = model.config, model.lm_head.weight, model.embed_tokens.weight
    total, count = head.new_zeros(()), 0
    for b, start, size, _ in documents(ROWS):
        tokens = batch["input_ids"][b, start : start + size]
        streams = streams_of(model, tokens)
        for k, predictor in enumerate(model.mtp, start=1):
            w = {**dict(predictor.named_parameters()), **dict(predictor.named_buffers())}
            left = size - 1 - k  # positions whose token t + k + 1 is in the document
            if left <= 0:
                break
            following = naive.norm(embedding[tokens[k : k + left]], w["enorm.weight"]) @ w["e_proj.weight"].T
            carried = naive.norm(streams[:left], w["hnorm.weight"]) @ w["h_proj.weight"].T
            streams = naive.sliding_block(naive.part(w, "block"), config, carried + following.unsqueeze(1))
            hidden = naive.norm(naive.head(naive.part(w, "hc_head"), config, streams), w["norm.weight"])
            log_p = (hidden @ head.T).log_softmax(-1)
            total = total - log_p[range(left), tokens[k + 1 :]].sum()
            count += left
    return total, count


@pytest.mark.parametrize("depth", [1, 2])
def test_against_a_loop_over_documents(depth: int) -> None:
    """Value and every gradient; fp64, in which only the rotations' fp32 remains."""
    model = tiny_model(tiny_config("sc", num_nextn_predict_layers=depth)).double()
    batch = packed_batch(ROWS, LENGTH, depth=depth)
    ours, count = model(**batch).losses["mtp"]
    wanted, expected = loss_by_document(model, batch)
    assert (
        int(count)
        == expected
        == sum(max(size - 1 - k, 0) for r in ROWS for size in r for k in range(1, depth + 1))
    )
    assert relative(ours, wanted) < 1e-7
    parameters = dict(model.named_parameters())
    mine = torch.autograd.grad(ours, list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, mine, theirs):
        assert (a is None) == (b is None) or not a.any(), name
        assert a is None or b is None or relative(a, b) < 1e-6, name
    assert all(grad is not None and grad.any() for n, grad in zip(parameters, mine) if n.startswith("mtp."))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_next_ids_are_derived_from_labels(depth: int) -> None:
    batch = packed_batch(ROWS, LENGTH, depth=depth)
    assert torch.equal(further_ids(batch["labels"], depth), batch["next_ids"])


def test_next_ids_given_or_derived() -> None:
    model = tiny_model(tiny_config("s", num_nextn_predict_layers=2))
    batch = packed_batch(ROWS, LENGTH, depth=2)
    given, count = model(**batch).losses["mtp"]
    derived, same = model(**{**batch, "next_ids": None}).losses["mtp"]
    assert torch.equal(given, derived) and count == same
    batch["next_ids"][1, 3, 0] = 5  # what is given is used
    assert not torch.equal(given, model(**batch).losses["mtp"][0])


def test_nothing_beyond_a_document() -> None:
    """Two-token documents have nothing to predict at depth 1: no loss, no gradient, no NaN."""
    model = tiny_model(tiny_config("s", num_nextn_predict_layers=1))
    batch = packed_batch([[2, 2, 1, 2]], 9, depth=1)
    loss, count = model(**batch).losses["mtp"]
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_block_is_sliding_and_learned() -> None:
    """Whatever the model's own last layer is; embedding and output head are shared."""
    model = ForCausalLM(tiny_config("hc", hash_layers=2, num_nextn_predict_layers=2))
    blocks: list[Any] = [predictor.block for predictor in model.mtp]
    for block in blocks:
        assert block.self_attn.layer_type == "sliding_attention"
        assert not block.mlp.gate.is_hash
    names = [name for name, _ in model.named_parameters() if "embed" in name or "lm_head" in name]
    assert names == ["embed_tokens.weight", "lm_head.weight"]


def test_main_loss_does_not_see_mtp() -> None:
    with_mtp = tiny_model(tiny_config("sc", num_nextn_predict_layers=1))
    without = tiny_model(tiny_config("sc"))
    without.load_state_dict({n: w for n, w in with_mtp.state_dict().items() if not n.startswith("mtp.")})
    batch = packed_batch(ROWS, LENGTH, depth=1)
    assert torch.equal(with_mtp(**batch).losses["lm"][0], without(**batch).losses["lm"][0])
    assert "mtp" not in without(**batch).losses
    assert with_mtp(batch["input_ids"]).losses == {}  # without labels there is no loss to compute
