"""Products of FP8 numbers: references by hand, kernels beside fp64 of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.fp8 import fp8_expert_mlp, fp8_linear
from model.kernels import grouped, hopper
from model.kernels import product as module
from model.kernels.cast import cast_activation, cast_weight, places_in_tiles
from model.kernels.product import grouped_outer_product, grouped_product, product
from model.quant import Quantised
from tests.unit.model.kernels.cases import distance, ends, exact, plain

COUNTS = [
    [0], [1], [127, 0, 1, 2], [0, 129, 130, 0], [0, 0, 1000, 0], [100, 28, 0, 200, 5, 0], [128, 128, 256],
    [64, 64, 64, 1, 383, 424],
]  # fmt: skip
SHAPES = [(64, 64), (128, 192), (512, 128), (192, 512), (256, 384), (72, 1000)]
# Tensor cores add up a tile of 128 in about 14 bits, so fp32 outputs are that close, not as fp32 sums are;
# bf16 outputs are rounded once, by at most 2^-9.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 3e-3, torch.float64: 1e-12}


def by_group(x: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(x.tensor_split(offsets.tolist())[:-1])


def forward(a: Quantised, b: Quantised, offsets: Tensor) -> Tensor:
    parts = zip(by_group(exact(a), offsets), exact(b), strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


def outer(a: Quantised, b: Quantised, offsets: Tensor) -> Tensor:
    place = places_in_tiles(int(offsets[-1]), offsets)
    parts = zip(*(by_group(exact(x)[:, place].T, offsets) for x in (a, b)), strict=True)
    return torch.stack([own.T @ other for own, other in parts])


def operands(counts: list[int], inner: int, outputs: int, device: str = "cpu") -> tuple:
    x, grad = plain(sum(counts), inner), plain(sum(counts), outputs, seed=1)
    weight = plain(len(counts), outputs, inner, seed=2)
    offsets = ends(counts).to(device)
    rows = (cast_activation(y.to(device), offsets) for y in (x, grad))
    return *rows, cast_weight(weight.to(device)), offsets


@pytest.mark.parametrize("counts", COUNTS[1:])
def test_references(counts: list[int]) -> None:
    (x, columns), (grad, grad_columns), (w, w_transposed), offsets = operands(counts, 64, 96)
    for dtype in (torch.float64, torch.bfloat16):
        limit = max(CLOSE[dtype], 1e-12)
        assert distance(grouped_product(x, w, offsets, dtype), forward(x, w, offsets)) < limit
        back = grouped_product(grad, w_transposed, offsets, dtype)
        assert distance(back, forward(grad, w_transposed, offsets)) < limit
        weight_grad = grouped_outer_product(grad_columns, columns, offsets, dtype)
        assert distance(weight_grad, outer(grad_columns, columns, offsets)) < limit
        assert not weight_grad[[e for e, count in enumerate(counts) if not count]].any()


def test_shapes_without_data() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fp8, scales = torch.empty(200, 64).to(torch.float8_e4m3fn), torch.empty(200, 1)
        stack, offsets = torch.empty(3, 96, 64).to(torch.float8_e4m3fn), torch.empty(3, dtype=torch.int32)
        out = torch.ops.fourfold.product(fp8, scales, stack[0], torch.empty(1, 1), False, torch.bfloat16)
        assert out.shape == (200, 96) and out.dtype == torch.bfloat16
        out = torch.ops.fourfold.grouped_product(
            fp8, scales, stack, torch.empty(3, 1, 1), offsets, torch.bfloat16
        )
        assert out.shape == (200, 96) and out.dtype == torch.bfloat16
        out = torch.ops.fourfold.grouped_outer_product(fp8, scales, fp8, scales, offsets, torch.float32)
        assert out.shape == (3, 200, 200)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inner", "outputs"), SHAPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_kernels(counts: list[int], inner: int, outputs: int, dtype: torch.dtype) -> None:
    (x, columns), (grad, grad_columns), (w, w_transposed), offsets = operands(counts, inner, outputs, "cuda")
    limit = CLOSE[dtype]
    assert distance(grouped_product(x, w, offsets, dtype), forward(x, w, offsets)) < limit
    back = grouped_product(grad, w_transposed, offsets, dtype)
    assert distance(back, forward(grad, w_transposed, offsets)) < limit
    weight_grad = grouped_outer_product(grad_columns, columns, offsets, dtype)
    assert distance(weight_grad, outer(grad_columns, columns, offsets)) < limit
    assert not weight_grad[[e for e, count in enumerate(counts) if not count]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(128, 384), (256, 128)])
def test_portable_kernels_where_the_others_would_run(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "suits", lambda *_: False)
    test_grouped_kernels([100, 28, 0, 200, 5, 0], *sizes, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9")
def test_sizes_of_models_take_the_kernels_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(grouped, "_launch")
    test_grouped_kernels([100, 28, 0, 200, 5, 0], 256, 384, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [192, 256])
def test_nan_stays_in_its_group(inner: int) -> None:
    counts = [100, 28, 0, 200]
    x, grad = plain(328, inner), plain(328, 128, seed=1)
    x[3, 5], grad[300, 7] = float("nan"), float("inf")
    offsets = ends(counts).cuda()
    (rows, columns), (_, grad_columns) = (cast_activation(y.cuda(), offsets) for y in (x, grad))
    w, _ = cast_weight(plain(4, 128, inner, seed=2).cuda())
    out = grouped_product(rows, w, offsets, torch.float32)
    assert distance(out, forward(rows, w, offsets)) < CLOSE[torch.float32]
    out = grouped_outer_product(grad_columns, columns, offsets, torch.float32)
    assert distance(out, outer(grad_columns, columns, offsets)) < CLOSE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1024])
@pytest.mark.parametrize(("inner", "outputs"), [(64, 64), (128, 128), (384, 256), (512, 576), (1000, 72)])
def test_dense(rows: int, inner: int, outputs: int, dtype: torch.dtype) -> None:
    """cuBLAS and the kernel, by what the shapes allow: forward, and both products of backward."""
    x, columns = cast_activation(plain(rows, inner).cuda())
    grad, grad_columns = cast_activation(plain(rows, outputs, seed=1).cuda())
    w, w_transposed = cast_weight(plain(outputs, inner, seed=2).cuda())
    for a, b in ((x, w), (grad, w_transposed), (grad_columns, columns)):
        out = product(a, b, dtype)
        assert out.dtype == dtype and distance(out, exact(a) @ exact(b).T) < CLOSE[dtype]


@pytest.mark.gpu
def test_cublas_takes_the_shapes_of_models() -> None:
    x, columns = cast_activation(plain(256, 384).cuda())
    grad, grad_columns = cast_activation(plain(256, 512, seed=1).cuda())
    w, w_transposed = cast_weight(plain(512, 384, seed=2).cuda())
    takes = module._library_takes
    hopper = torch.cuda.get_device_capability()[0] == 9
    for a, b in ((x, w), (grad, w_transposed), (grad_columns, columns)):
        assert takes(a, b, torch.bfloat16) == hopper


@pytest.mark.gpu
def test_layers_are_as_close_to_fp64_as_their_emulation() -> None:
    """Forward and every gradient of FP8 layers, kernels beside the references on the CPU."""
    counts, width, dim = [100, 0, 300, 112], 256, 384
    rows, weights = plain(512, dim), torch.rand(512)
    stacks = [plain(4, 2 * width, dim, seed=1) / 64, plain(4, dim, width, seed=2) / 64]

    def experts(device: str) -> list[Tensor]:
        leaves = [x.to(device).requires_grad_() for x in (rows, weights, *stacks)]
        x, w, gate_up, down = leaves
        out = fp8_expert_mlp(x, w, ends(counts).to(device), gate_up, down, 10.0)
        return [out, *torch.autograd.grad(out, leaves, plain(512, dim, seed=3).to(device))]

    def linear(device: str) -> list[Tensor]:
        leaves = [x.to(device).requires_grad_() for x in (rows, stacks[0][0])]
        out = fp8_linear(leaves[0].view(2, 256, dim), leaves[1], "attention")
        return [out, *torch.autograd.grad(out, leaves, plain(2, 256, 2 * width, seed=3).to(device))]

    for layer in (experts, linear):
        for ours, wanted in zip(layer("cuda"), layer("cpu"), strict=True):
            assert distance(ours, wanted) < 0.02
