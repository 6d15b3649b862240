"""What hyper-connections read off the streams, products and a mean square, in one pass over them.

    p = x W^T,    m = mean of x^2 over K         in fp32
    dx = dp W + 2 x dm / K,    dW = dp^T x       one pass as well

torch widens x to fp32, twice the memory, and multiplies without tensor cores. Here numbers of fp32 are sums
of three in x's dtype, to their last bit (but for denormals; infinity becomes NaN), and products are of these
parts; dx, which is rounded to x's dtype, is of the largest three of nine. Tensor cores sum up 192 products at
most, and programs in order: results are repeatable.

Legend: T tokens, K numbers of a token's streams (N * D), O outputs, P parts of the tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.gpu import jit, launched, operator, runs_kernels, tl
from model.norm import widen

BLOCK, COLUMNS = 64, 64  # forward: tokens of a program, and columns that it sums up at a time
STRIP, ROWS = 64, 32  # backward: columns of a program, and tokens at a time
FORWARD, BACKWARD = 512, 384  # programs, about


def stream_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K], weight fp32 [O, K] -> x W^T [..., O] and the mean of x's squares [..., 1], both fp32."""
    narrow = x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if runs_kernels(x) and narrow and x.shape[-1] % COLUMNS == 0:
        product, mean = torch.ops.fourfold.stream_product(x.flatten(0, -2), weight)
        return product.view(*x.shape[:-1], len(weight)), mean.view(*x.shape[:-1], 1)
    wide = widen(x)
    return F.linear(wide, weight), wide.square().mean(-1, keepdim=True)


@operator("stream_product")
def _stream_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> [T, O], [T]."""
    x, weight = x.contiguous(), weight.contiguous()
    if not len(x):
        return _empty(x, weight)
    (tokens, count), outputs = x.shape, len(weight)
    blocks, parts = -(-tokens // BLOCK), count // COLUMNS
    while parts % 2 == 0 and blocks * parts > FORWARD:
        parts //= 2
    products = weight.new_empty(parts, tokens, outputs)
    squares = weight.new_empty(parts, tokens)
    _forward_kernel[(blocks, parts)](
        x, weight, products, squares, tokens, count, outputs, padded(outputs), BLOCK, COLUMNS,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return products.sum(0), squares.sum(0) / count


@torch.library.register_fake("fourfold::stream_product")
def _empty(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(len(x), len(weight), dtype=torch.float32),
        x.new_empty(len(x), dtype=torch.float32),
    )


@operator("stream_product_backward")
def _stream_product_backward(
    x: Tensor, weight: Tensor, product_grad: Tensor, mean_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """dx [T, K], and dW of each part of the tokens [P, O, K]."""
    x, weight = x.contiguous(), weight.contiguous()
    x_grad, weight_grads = _empty_backward(x, weight, product_grad, mean_grad)
    if len(x):
        (tokens, count), outputs = x.shape, len(weight)
        grads = x.new_empty(3, tokens, padded(outputs))
        _split_kernel[(-(-tokens // BLOCK),)](
            product_grad.contiguous(), grads, tokens, outputs, padded(outputs), BLOCK
        )
        _backward_kernel[(count // STRIP, len(weight_grads))](
            x, weight, grads, mean_grad.contiguous(), x_grad, weight_grads, tokens, count, outputs,
            padded(outputs), STRIP, ROWS, num_warps=4, num_stages=3,
        )  # fmt: skip
    return x_grad, weight_grads


@torch.library.register_fake("fourfold::stream_product_backward")
def _empty_backward(
    x: Tensor, weight: Tensor, product_grad: Tensor, mean_grad: Tensor
) -> tuple[Tensor, Tensor]:
    parts = max(1, BACKWARD * STRIP // x.shape[1]) if len(x) else 0
    return x.new_empty(x.shape), weight.new_empty(parts, *weight.shape)


def padded(outputs: int) -> int:
    """So many rows of products that tensor cores compute for them."""
    return max(16, 1 << (outputs - 1).bit_length())


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, product_grad: Tensor, mean_grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    x_grad, weight_grads = torch.ops.fourfold.stream_product_backward(x, weight, product_grad, mean_grad)
    return x_grad, weight_grads.sum(0)


torch.library.register_autograd("fourfold::stream_product", _backward, setup_context=_save)


@launched
@jit(varying=("T",))
def _forward_kernel(
    x, weight, products, squares, T, K, O,  # noqa: E741
    OUT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the columns, for 64 tokens."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    rows, outs, columns = tl.arange(0, BLOCK), tl.arange(0, OUT), tl.arange(0, COLUMNS)
    there, known = (begin + rows < T)[:, None], (outs < O)[:, None]
    length = tl.multiple_of(K // tl.num_programs(1), COLUMNS)
    first_column = tl.program_id(1) * length
    tiles = x + begin * K + first_column + rows[:, None] * K + columns[None, :]
    weights = weight + first_column + outs[:, None] * K + columns[None, :]
    total = tl.zeros([BLOCK, OUT], tl.float32)
    square = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, length, COLUMNS):
        tile = tl.load(tiles + start, mask=there, other=0.0)
        w = tl.load(weights + start, mask=known, other=0.0)
        first, second, third = parts_of(w, tile.dtype)
        part = tl.dot(tile, tl.trans(third))
        part = tl.dot(tile, tl.trans(second), part)
        total += tl.dot(tile, tl.trans(first), part)
        wide = tile.to(tl.float32)
        square += wide * wide
    own = tl.program_id(1).to(tl.int64) * T + begin
    tl.store(products + own * O + rows[:, None] * O + outs[None, :], total, mask=there & (outs < O)[None, :])
    tl.store(squares + own + rows, tl.sum(square, 1), mask=begin + rows < T)


@launched
@jit(varying=("T",))
def _split_kernel(x, parts, T, O, OUT: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    """x fp32 [T, O] -> its three parts [3, T, OUT], filled up with zeros."""
    rows, outs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, OUT)
    inside = (rows < T)[:, None]
    numbers = tl.load(x + rows[:, None] * O + outs[None, :], mask=inside & (outs < O)[None, :], other=0.0)
    first, second, third = parts_of(numbers, parts.dtype.element_ty)
    place, size = parts + rows[:, None] * OUT + outs[None, :], T.to(tl.int64) * OUT
    tl.store(place, first, mask=inside)
    tl.store(place + size, second, mask=inside)
    tl.store(place + 2 * size, third, mask=inside)


@launched
@jit(varying=("T",))
def _backward_kernel(
    x, weight, grads, mean_grad, x_grad, weight_grads, T, K, O,  # noqa: E741
    OUT: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """64 columns of dx for a part of the tokens, and that part's sum of dW."""
    columns, outs, rows = (
        tl.program_id(0) * STRIP + tl.arange(0, STRIP),
        tl.arange(0, OUT),
        tl.arange(0, ROWS),
    )
    known = (outs < O)[:, None]
    at = outs[:, None] * K + columns[None, :]
    first, second, _ = parts_of(tl.load(weight + at, mask=known, other=0.0), x.dtype.element_ty)
    total = tl.zeros([OUT, STRIP], tl.float32)
    size = T.to(tl.int64) * OUT
    place, small = rows[:, None] * K + columns[None, :], rows[:, None] * OUT + outs[None, :]
    for start in range(tl.program_id(1) * ROWS, T, tl.num_programs(1) * ROWS):
        inside = (start + rows < T)[:, None]
        corner = tl.cast(start, tl.int64) * K
        tile = tl.load(x + corner + place, mask=inside, other=0.0)
        own = grads + tl.cast(start, tl.int64) * OUT
        high = tl.load(own + small, mask=inside, other=0.0)
        middle = tl.load(own + size + small, mask=inside, other=0.0)
        low = tl.load(own + 2 * size + small, mask=inside, other=0.0)
        scale = tl.load(mean_grad + start + rows, mask=start + rows < T, other=0.0) * (2.0 / K)
        part = tl.dot(tl.trans(low), tile)
        part = tl.dot(tl.trans(middle), tile, part)
        total += tl.dot(tl.trans(high), tile, part)
        back = tl.dot(middle, first)
        back = tl.dot(high, second, back)
        back = tl.dot(high, first, back) + scale[:, None] * tile.to(tl.float32)
        tl.store(x_grad + corner + place, back.to(tile.dtype), mask=inside)
    tl.store(weight_grads + tl.program_id(1).to(tl.int64) * O * K + at, total, mask=known)


@jit
def parts_of(x, dtype: tl.constexpr):
    """x fp32 as a sum of three numbers of `dtype`, the largest first: bf16 holds 8 of its 24 bits."""
    first = top_of(x, dtype)
    rest = x - first.to(tl.float32)
    second = top_of(rest, dtype)
    return first, second, top_of(rest - second.to(tl.float32), dtype)


@jit
def top_of(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:  # cut off: rounding takes longer than all else
        return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
