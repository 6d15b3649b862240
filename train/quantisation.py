"""What FP8 and FP4 do to a step's numbers: errors, ends of the range, and scales, by class.

A class of FP8 is a kind of product and an operand of it, such as "attention.gradient"; FP4 has one class, the
experts' masters. Names of metrics are in train/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import fp8_expert_mlp, fp8_linear
from model.linear import Linear
from model.model import ForCausalLM
from model.moe import Experts
from model.precision import FP8_KINDS, Precision
from model.quant import (
    E4M3_MAX,
    FP4_VALUES,
    FP8_BLOCK,
    FP8_TILE,
    LEAST,
    Block,
    dequantise,
    dequantise_fp4,
    quantise_fp4,
    quantise_fp8,
    round_fp8,
)

OPERANDS = ("activation", "weight", "gradient")
CLASSES = tuple(f"{kind}.{operand}" for kind in (*FP8_KINDS, "expert") for operand in OPERANDS)
AT_ONCE = 1 << 24  # numbers whose errors are measured at once

See = Callable[[str, Tensor, Block], None]


@contextmanager
def observed(model: ForCausalLM, precision: Precision, sums: dict[str, Tensor]) -> Iterator[None]:
    """Meanwhile add `fp8_statistics` of every FP8 product that `model` computes to `sums`, by class.

    Of experts, activations are the rows that arrive and gradients those of the outputs. Backward has to
    happen inside, too.
    """
    device = model.lm_head.weight.device
    sums |= {name: fp8_statistics(torch.zeros(0, 1, device=device), FP8_TILE) for name in CLASSES}

    def see(name: str, x: Tensor, block: Block) -> None:
        x = x.detach().flatten(0, -2) if block == FP8_TILE else x.detach()
        for part in in_parts(x):
            sums[name] += fp8_statistics(part, block)

    for module in model.modules() if precision.fp8 else ():
        if isinstance(module, Linear) and module.kind in FP8_KINDS:
            module.product = partial(_seen_linear, see)
        elif isinstance(module, Experts):
            module.mlp = partial(_seen_experts, see)
    try:
        with torch.compiler.set_stance("force_eager"):  # to compile once more for this would take minutes
            yield
    finally:
        model.use(precision)


def in_parts(x: Tensor) -> Iterable[Tensor]:
    """Some matrices of a stack at a time, or some rows of a matrix: in 128s, as blocks go."""
    count = max(1, AT_ONCE // max(1, x[:1].numel()))
    return x.split(count if x.dim() > 2 else -(-count // 128) * 128)


def _seen_linear(see: See, x: Tensor, weight: Tensor, kind: str) -> Tensor:
    see(f"{kind}.activation", x, FP8_TILE)
    see(f"{kind}.weight", weight, FP8_BLOCK)
    return _seen_gradient(see, kind, fp8_linear(x, weight, kind))  # type: ignore[arg-type]


def _seen_experts(see: See, rows: Tensor, weights: Tensor, offsets: Tensor, *rest: Tensor) -> Tensor:
    gate_up, down, _ = rest
    see("expert.activation", rows, FP8_TILE)
    see("expert.weight", gate_up, FP8_BLOCK)
    see("expert.weight", down, FP8_BLOCK)
    return _seen_gradient(see, "expert", fp8_expert_mlp(rows, weights, offsets, *rest))  # type: ignore[arg-type]


def _seen_gradient(see: See, kind: str, out: Tensor) -> Tensor:
    if out.requires_grad:
        out.register_hook(lambda grad: see(f"{kind}.gradient", grad, FP8_TILE))
    return out


def fp8_statistics(x: Tensor, block: Block) -> Tensor:
    """What `quantise_fp8` does to x [M, N], as sums in fp64 [5 + 254]: squared error, squares, numbers that
    became zero, numbers at the largest value, numbers; then blocks by the exponent of their scale.
    """
    quantised = quantise_fp8(x, block)
    at_most = quantised.values.float().abs() == E4M3_MAX
    exponent = torch.frexp(quantised.scales).exponent.flatten() - 1 - LEAST
    counts = torch.bincount(exponent.clamp(0, 253), minlength=254)
    return torch.cat((_errors(x, dequantise(quantised), at_most), counts))


def fp4_statistics(x: Tensor) -> Tensor:
    """What `quantise_fp4` does to x [..., M, N], N even, as sums in fp64 [9]: five as in `fp8_statistics`,
    then blocks of 128 x 128, those with a span above 14, the sum of spans, numbers that FP8 changes again.

    FP8 holds E2M1 numbers times 2^d for d from -8 to 6: all of a block whose scales span 2^14 or less. Of
    others it rounds the smallest to nearest, as always: off by 2^-18 of the block's largest number at most.
    """
    packed, scales = quantise_fp4(x)
    kept = dequantise_fp4(packed, scales)
    at_most = kept.abs() == FP4_VALUES[7] * scales.float().repeat_interleave(32, -1)[..., : x.shape[-1]]
    exponent = torch.frexp(scales.float()).exponent.float().view(-1, *scales.shape[-2:])
    used = exponent - 1 > LEAST  # others are of zeros
    high, low = (
        F.max_pool2d(torch.where(used, signed, -torch.inf), (128, 4), ceil_mode=True)
        for signed in (exponent, -exponent)
    )
    span = (high + low).clamp(min=0).double()
    changed = (round_fp8(kept, FP8_BLOCK) != kept).sum()
    blocks = [span.new_tensor(span.numel()), (span > 14).sum(), span.sum(), changed]
    return torch.cat((_errors(x, kept, at_most), torch.stack([x.double() for x in blocks])))


def _errors(x: Tensor, kept: Tensor, at_most: Tensor) -> Tensor:
    x = x.float()
    sums = (kept - x).square().sum(), x.square().sum(), ((kept == 0) & (x != 0)).sum(), at_most.sum()
    return torch.stack([*(value.double() for value in sums), torch.tensor(x.numel()).double().to(x.device)])


def fp8_metrics(sums: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What is logged of `fp8_statistics`, summed over ranks by `reduce`, for every class that has numbers.

    fp8_error/<class>       root mean square of the error over that of the numbers
    fp8_underflow/<class>   share of the numbers that became zero without being it
    fp8_largest/<class>     share of the numbers that became 448 times their scale, the largest
    fp8_span/<class>        largest over smallest scale of blocks that are not zero, as a power of two
    """
    found: dict[str, float] = {}
    table = reduce(torch.stack(list(sums.values()))).tolist() if sums else []
    for name, (error, square, lost, largest, count, _, *blocks) in zip(sums, table, strict=True):
        used = [exponent for exponent, blocks_of in enumerate(blocks) if blocks_of]
        if used:  # the smallest scale, left out above, is that of zeros
            found[f"fp8_error/{name}"] = math.sqrt(error / square)
            found[f"fp8_underflow/{name}"] = lost / count
            found[f"fp8_largest/{name}"] = largest / count
            found[f"fp8_span/{name}"] = used[-1] - used[0]
    return found


def fp4_metrics(sums: Tensor) -> dict[str, Tensor]:
    """What is logged of `fp4_statistics`, summed over experts and ranks.

    fp4_error      root mean square of the error over that of the masters
    fp4_underflow  share of the masters that became zero without being it
    fp4_largest    share of the masters that became 6 times their scale, the largest
    fp4_span       largest over smallest scale in a block of 128 x 128, as a power of two, mean over blocks
    fp4_wide       blocks with a span above 14, which FP8 need not hold exactly
    fp4_changed    masters whose FP4 number is another one in FP8
    """
    error, square, lost, largest, count, blocks, wide, span, changed = sums
    return {
        "fp4_error": (error / square).sqrt(),
        "fp4_underflow": lost / count,
        "fp4_largest": largest / count,
        "fp4_span": span / blocks,
        "fp4_wide": wide,
        "fp4_changed": changed,
    }
