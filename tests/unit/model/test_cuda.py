"""The same model on a GPU: equal to the CPU in fp32, close to it in bf16, the same every time."""

from __future__ import annotations

import pytest
import torch

from model.linear import _grouped_linear_masked, grouped_linear
from model.model import ForCausalLM
from tests.tiny import FLASH, PRO, tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def packed(vocab: int, length: int = 300) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(vocab, (2, length + 1))
    documents = torch.zeros(2, length, dtype=torch.int64)
    documents[0, 41:] = 1
    documents[1, 130:] = 1
    documents[1, 290:] = -1
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "document_ids": documents}


def losses_and_gradients(
    model: ForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    device = model.lm_head.weight.device
    model.zero_grad()
    output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    loss = sum(part / count for part, count in output.losses.values())
    loss.backward()
    grads = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), grads


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-20))


@pytest.mark.parametrize("layers", [FLASH, PRO])
def test_bf16_on_gpu_is_as_close_to_fp64_as_bf16_on_cpu(layers: str) -> None:
    config = tiny_config(layers, 2, num_nextn_predict_layers=1)
    batch = packed(config.vocab_size)
    exact, exact_grads = losses_and_gradients(tiny_model(config).double(), batch)
    cpu, cpu_grads = losses_and_gradients(tiny_model(config).cast(torch.bfloat16), batch)
    gpu, gpu_grads = losses_and_gradients(tiny_model(config).cast(torch.bfloat16).cuda(), batch)
    assert abs(gpu - exact) <= 2 * abs(cpu - exact) + 2e-3 * abs(exact)
    errors = {n: (relative(gpu_grads[n], g), relative(cpu_grads[n], g)) for n, g in exact_grads.items()}
    worse = {n: e for n, e in errors.items() if e[0] > 2 * e[1] + 0.05}
    assert not worse


def test_repeatable_bit_for_bit() -> None:
    config = tiny_config(FLASH, 2, num_nextn_predict_layers=1)
    model = tiny_model(config).cast(torch.bfloat16).cuda()
    batch = packed(config.vocab_size)
    first, first_grads = losses_and_gradients(model, batch)
    for _ in range(5):
        again, grads = losses_and_gradients(model, batch)
        assert again == first
        assert not [name for name, grad in grads.items() if not torch.equal(grad, first_grads[name])]


@pytest.mark.parametrize("counts", [[7, 0, 130, 1, 0, 62], [0, 0, 200, 0, 0, 0]])
def test_grouped_product_with_empty_and_crowded_experts(counts: list[int]) -> None:
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    x = torch.randn(200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(6, 32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(200, 32, device="cuda", dtype=torch.bfloat16)
    grads = []
    for product in (
        lambda: grouped_linear(x, weight, offsets),
        lambda: _grouped_linear_masked(x, weight, offsets),
    ):
        out = product()
        grads.append((out, *torch.autograd.grad(out, (x, weight), upstream)))
    for ours, reference in zip(*grads, strict=True):
        assert relative(ours.double(), reference.double()) < 1e-2


def test_long_sequences_fit() -> None:
    """One CSA layer of V4-Flash's attention at S = 16384: no [S, H, S] logits are ever held."""
    config = tiny_config(
        "c", 0, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, sliding_window=128, index_topk=512,
        index_n_heads=64, index_head_dim=128, max_position_embeddings=65536,
    )  # fmt: skip
    model = tiny_model(config).cast(torch.bfloat16).cuda()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(config.vocab_size, (1, 16384), device="cuda")
    output = model(ids, ids)
    output.losses["lm"][0].backward()
    assert torch.isfinite(output.losses["lm"][0])
    assert torch.cuda.max_memory_allocated() < 16384 * 64 * 16384 * 2
