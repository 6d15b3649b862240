"""Casts: tails and empty inputs of the references, shapes for the compiler, kernels bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from model.kernels.cast import cast_activation, cast_weight, ends_in_tiles, fp4_values, places_in_tiles
from model.quant import FP8_BLOCK, dequantise, quantise_fp8, round_fp4
from tests.unit.model.kernels.cases import ends, hard, same, same_cast

ROWS, COLUMNS = [0, 1, 127, 128, 129, 1000], [64, 128, 192, 512, 1000]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (1, 64), (129, 192), (200, 130)])
def test_activations_on_any_device(rows: int, columns: int) -> None:
    """Each operand's tiles are its own: a tail's scale comes from the tail alone."""
    x = hard(rows, columns, torch.float32)
    straight, transposed = cast_activation(x)
    assert straight.values.shape == (rows, columns) and transposed.values.shape == (columns, rows)
    assert straight.scales.shape == (rows, -(-columns // 128))
    assert transposed.scales.shape == (columns, -(-rows // 128))
    for quantised, wanted in ((straight, x), (transposed, x.T)):
        for start in range(0, wanted.shape[1], 128):
            tile = wanted[:, start : start + 128].contiguous()
            alone = quantise_fp8(tile)
            assert same(quantised.values[:, start : start + 128], alone.values)
            assert same(quantised.scales[:, start // 128], alone.scales[:, 0])


GROUPS = [[129], [127, 0, 1, 2], [0, 129, 130, 0], [128, 128, 256], [64, 64, 64, 1, 383, 424]]


@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_tiles_along_rows_hold_rows_of_one_group(counts: list[int]) -> None:
    """As if each group had been cast by itself; zeros elsewhere."""
    x, offsets = hard(sum(counts), 64, torch.float32), ends(counts)
    _, transposed = cast_activation(x, offsets)
    place, stops = places_in_tiles(len(x), offsets), ends_in_tiles(offsets).tolist()
    starts = [0, *stops[:-1]]
    for rows, start, stop, count in zip(x.split(counts), starts, stops, counts):
        alone = cast_activation(rows)[1]
        assert same(transposed.values[:, start : start + count], alone.values)
        assert same(transposed.scales[:, start // 128 :][:, : -(-count // 128)], alone.scales)
        assert stop - start >= count and start % 128 == 0
    assert place.tolist() == [start + i for start, count in zip(starts, counts) for i in range(count)]
    rest = torch.ones(transposed.values.shape[1], dtype=torch.bool).index_fill(0, place, False)
    assert stops[-1] == len(rest) and not transposed.values.float()[:, rest].nan_to_num(0).any()


def test_weights_on_any_device() -> None:
    weight = torch.randn(3, 200, 130)
    straight, transposed = cast_weight(weight)
    assert transposed.values.shape == (3, 130, 200) and transposed.scales.shape == (3, 2, 2)
    assert torch.equal(dequantise(straight).mT, dequantise(transposed))


@pytest.mark.parametrize("shape", [(0, 64), (3, 33), (2, 5, 96)])
def test_fp4_on_any_device(shape: tuple[int, ...]) -> None:
    master = torch.randn(shape)
    assert same(fp4_values(master, torch.bfloat16), round_fp4(master))


def test_shapes_without_data() -> None:
    """What compilers and `meta` see of the kernels."""
    with FakeTensorMode():
        x, stack = torch.empty(200, 130, dtype=torch.bfloat16), torch.empty(3, 200, 130)
        values, scales, transposed, transposed_scales = torch.ops.fourfold.cast_activation(x, None)
        assert values.shape == (200, 130) and scales.shape == (2, 200)
        assert transposed.shape == (130, 256) and transposed_scales.shape == (2, 130)
        groups = torch.empty(5, dtype=torch.int32)
        assert torch.ops.fourfold.cast_activation(x, groups)[2].shape == (130, 6 * 128)
        shapes = [part.shape for part in torch.ops.fourfold.cast_weight(stack)]
        assert shapes == [(3, 200, 130), (3, 2, 2), (3, 130, 200), (3, 2, 2)]
        assert torch.ops.fourfold.fp4_values(stack, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_activations_bit_for_bit(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = hard(rows, columns, dtype)
    for ours, wanted in zip(cast_activation(x.cuda()), cast_activation(x), strict=True):
        assert same_cast(ours, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [*GROUPS, 10 * GROUPS[-1]], ids=str)  # at last several tiles a program
@pytest.mark.parametrize("columns", [128, 192, 1024])
def test_activations_of_groups_bit_for_bit(columns: int, counts: list[int]) -> None:
    """But for tiles without rows, which nobody writes, as nobody reads them."""
    x, offsets = hard(sum(counts), columns, torch.bfloat16), ends(counts)
    ours, wanted = cast_activation(x.cuda(), offsets.cuda()), cast_activation(x, offsets)
    assert same_cast(ours[0], wanted[0]) and ours[1].values.shape == wanted[1].values.shape
    tile = places_in_tiles(len(x), offsets).div(128, rounding_mode="floor").unique()
    assert same(ours[1].scales.cpu()[:, tile], wanted[1].scales[:, tile])
    values = [y.values.cpu().float().unflatten(1, (-1, 128))[:, tile] for y in (ours[1], wanted[1])]
    assert same(*values)


@pytest.mark.gpu
def test_layouts_that_products_read_without_copies() -> None:
    straight, transposed = cast_activation(hard(200, 192, torch.bfloat16).cuda())
    assert straight.values.is_contiguous() and straight.scales.stride() == (1, 200)
    assert transposed.values.stride() == (256, 1) and transposed.scales.stride() == (1, 192)
    filling = torch.as_strided(transposed.values.view(torch.uint8), (192, 56), (256, 1), 200)
    assert not filling.any()
    for quantised in cast_weight(torch.randn(3, 200, 192, device="cuda").bfloat16()):
        assert quantised.values.is_contiguous() and quantised.scales.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize("columns", COLUMNS)
def test_weights_bit_for_bit(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.stack([hard(rows, columns, dtype, seed) for seed in range(3)])
    straight, transposed = cast_weight(weight.cuda())
    wanted = quantise_fp8(weight, FP8_BLOCK)
    assert same_cast(straight, wanted) and same_cast(transposed, wanted.mT)
    assert same_cast(cast_weight(weight[1].cuda())[0], quantise_fp8(weight[1], FP8_BLOCK))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (1, 32), (129, 192), (1000, 1000), (70, 33)])
def test_fp4_bit_for_bit(rows: int, columns: int, dtype: torch.dtype) -> None:
    master = hard(rows, columns, torch.float32)
    assert same(fp4_values(master.cuda(), dtype), round_fp4(master).to(dtype))
    stack = master.expand(2, -1, -1)
    assert same(fp4_values(stack.cuda(), dtype), round_fp4(stack).to(dtype))


@pytest.mark.gpu
def test_operators() -> None:
    """Schemas hold, and shapes without data are those with."""
    x = hard(200, 192, torch.bfloat16).cuda()
    checks = ("test_schema", "test_faketensor")
    for offsets in (None, ends([150, 50]).cuda()):
        torch.library.opcheck(torch.ops.fourfold.cast_activation, (x, offsets), test_utils=checks)
    torch.library.opcheck(torch.ops.fourfold.cast_weight, (x,), test_utils=checks)
    torch.library.opcheck(torch.ops.fourfold.fp4_values, (x.float(), torch.bfloat16), test_utils=checks)
