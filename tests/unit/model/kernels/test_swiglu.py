"""SwiGLU with its casts: the borders of the clamps, and kernels beside the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.kernels import cast_hopper
from model.kernels.cast import places_in_tiles
from model.kernels.swiglu import cast_swiglu, cast_swiglu_backward
from model.quant import Quantised, dequantise
from tests.unit.model.kernels.cases import distance, ends, exact

LIMIT = 2.0


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up with many numbers at, below and above the limits, weights, dh."""
    generator = torch.Generator().manual_seed(rows + width)
    gate_up = 2 * torch.randn(rows, 2 * width, generator=generator)
    if rows > 10:
        gate_up[3, ::3], gate_up[4, ::2] = LIMIT, -LIMIT
        gate_up[5], gate_up[6], gate_up[7] = 50, -100, 0
        gate_up[8, 5] = gate_up[9, width + 3] = float("nan")
    weights, grad = torch.rand(rows, generator=generator), torch.randn(rows, width, generator=generator)
    return gate_up.to(dtype), weights, grad.to(dtype)


def test_borders_of_the_clamps() -> None:
    """At a limit the gradient passes, beyond it it does not; a gate far below its limit is not clamped."""
    gates = torch.tensor([LIMIT, LIMIT + 0.25, -50.0, 1.0, 1.0, 1.0, 1.0])
    ups = torch.tensor([1.0, 1.0, 1.0, LIMIT, LIMIT + 0.25, -LIMIT, -LIMIT - 0.25])
    gate_up = torch.cat((gates, ups)).unsqueeze(0)
    gradient, _, _ = cast_swiglu_backward(torch.ones(1, 7), gate_up, torch.ones(1), LIMIT)
    of_gates, of_ups = dequantise(gradient)[0].chunk(2)
    assert (of_gates != 0).tolist() == [True, False, False, True, True, True, True]  # silu'(-50) is nothing
    assert (of_ups != 0).tolist() == [True, True, False, True, False, True, False]


def test_no_rows() -> None:
    hidden, transposed = cast_swiglu(torch.empty(0, 128), torch.empty(0), LIMIT)
    assert hidden.values.shape == (0, 64) and transposed.values.shape == (64, 0)
    *_, sums = cast_swiglu_backward(torch.empty(0, 64), torch.empty(0, 128), torch.empty(0), LIMIT)
    assert sums.shape == (0,)


def close(ours: Quantised, wanted: Quantised) -> bool:
    """The same scales and numbers, but for a few that exp rounded to a neighbour."""
    assert ours.block == wanted.block and ours.values.shape == wanted.values.shape
    other = exact(ours).cpu() != exact(wanted)
    nan = exact(wanted).isnan()
    few = int((other & ~nan).sum()) <= 5e-3 * other.numel()
    return few and distance(exact(ours), exact(wanted)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("width", [64, 128, 192, 512])
def test_kernels(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up, weights, grad = inputs(rows, width, dtype)
    on_gpu, weights_on_gpu, grad_on_gpu = gate_up.cuda(), weights.cuda(), grad.cuda()
    ours, wanted = cast_swiglu(on_gpu, weights_on_gpu, LIMIT), cast_swiglu(gate_up, weights, LIMIT)
    assert close(ours[0], wanted[0]) and close(ours[1], wanted[1])
    gradients = cast_swiglu_backward(grad_on_gpu, on_gpu, weights_on_gpu, LIMIT)
    emulated = cast_swiglu_backward(grad, gate_up, weights, LIMIT)
    assert close(gradients[0], emulated[0]) and close(gradients[1], emulated[1])
    assert gradients[2].dtype == torch.float32 and distance(gradients[2], emulated[2]) < 1e-5


@pytest.mark.gpu
def test_groups() -> None:
    gate_up, weights, grad = inputs(300, 256, torch.bfloat16)
    offsets, used = ends([100, 0, 200]), places_in_tiles(300, ends([100, 0, 200]))

    def transposed(device: str) -> tuple[Quantised, Quantised]:
        x, w, dh, groups = (y.to(device) for y in (gate_up, weights, grad, offsets))
        return cast_swiglu(x, w, LIMIT, groups)[1], cast_swiglu_backward(dh, x, w, LIMIT, groups)[1]

    ours, wanted = transposed("cuda"), transposed("cpu")
    for x, y in zip(ours, wanted):
        assert distance(exact(x)[:, used.cuda()], exact(y)[:, used]) < 2e-3


@pytest.mark.gpu
def test_repeatable_bit_for_bit() -> None:
    gate_up, weights, grad = (x.cuda() for x in inputs(1000, 512, torch.bfloat16))
    first = cast_swiglu_backward(grad, gate_up, weights, LIMIT)
    again = cast_swiglu_backward(grad, gate_up, weights, LIMIT)
    assert torch.equal(first[2].nan_to_num(0), again[2].nan_to_num(0))
    assert torch.equal(first[0].values.view(torch.uint8), again[0].values.view(torch.uint8))


def test_limits_that_the_kernel_for_hopper_takes() -> None:
    assert [cast_hopper._is_bf16(x) for x in (10.0, 7.0, math.inf, 10.01)] == [True, True, True, False]


COUNTS = [129, 0, 1, 127, 128, 300, 0]  # rows of groups


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9")
@pytest.mark.parametrize("counts", [[685], COUNTS, 8 * COUNTS], ids=["one", "few", "many"])
@pytest.mark.parametrize("width", [128, 384, 1024])
def test_the_kernel_for_hopper_computes_the_same_bits(
    width: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many groups and columns a program casts several tiles."""
    gate_up, weights, grad = (x.cuda() for x in inputs(sum(counts), width, torch.bfloat16))
    offsets = None if len(counts) == 1 else ends(counts).cuda()
    used = slice(None) if offsets is None else places_in_tiles(sum(counts), offsets)

    def results() -> tuple[list[Tensor], Tensor]:
        forward = cast_swiglu(gate_up, weights, LIMIT, offsets)
        *backward, sums = cast_swiglu_backward(grad, gate_up, weights, LIMIT, offsets)
        straight = [exact(x[0]) for x in (forward, backward)]
        return [*straight, *(exact(x[1])[:, used] for x in (forward, backward))], sums

    assert cast_hopper.suits(grad, gate_up, limit=LIMIT) and not cast_hopper.suits(gate_up, limit=10.01)
    ours, sums = results()
    monkeypatch.setattr(cast_hopper, "suits", lambda *_, **__: False)
    wanted, wanted_sums = results()
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(ours, wanted, strict=True))
    assert distance(sums.nan_to_num(7), wanted_sums.double().nan_to_num(7)) < 1e-6  # in another order
