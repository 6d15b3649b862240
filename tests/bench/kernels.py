"""FP8 kernels beside what they replace, on one Hopper GPU.

    python -m tests.bench.kernels [--out FILE] [--only dense casts grouped layer] [--tune]

    dense    one product: FP8 in tiles and blocks, FP8 with a scale a row, bf16; TFLOP/s
    casts    casts, SwiGLU with its casts: seconds beside a copy of as many bytes on the device, the floor
    grouped  V4-Flash's experts as one of 8 ranks holds them: forward and both products of backward, beside
             bf16; rows are routed as a softmax router without balance does, so unevenly
    layer    the same experts end to end, `model.moe.expert_mlp` beside `model.fp8.fp8_expert_mlp`

Every line of JSON is one measurement: milliseconds are medians between CUDA events over calls in a row,
after warm-up, of random numbers. Before it is timed an FP8 result is compared with fp64 of the same
quantised operands (`error`, a relative norm), and a cast with its reference bit for bit. `--tune` tries
settings of the kernels first and says which was best; the rest then runs with the settings in the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time as clock
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import fp8_expert_mlp
from model.kernels import cast, cast_hopper, hopper, swiglu
from model.kernels import product as products
from model.kernels.cast import cast_activation, cast_weight, fp4_values
from model.kernels.product import grouped_outer_product, grouped_product, product
from model.kernels.swiglu import cast_swiglu, cast_swiglu_backward
from model.moe import expert_mlp
from model.quant import FP8_BLOCK, Quantised, dequantise, quantise_fp8, round_fp4

WARM_UP = 0.5  # seconds
PAUSE = 5_000_000  # cycles of a GPU, some 3 ms
EXPERTS, HIDDEN, WIDTH, ROWS, TOP_K, LIMIT = 32, 4096, 2048, 32768, 6, 10.0
Row = dict[str, Any]
Part = Callable[[], Iterator[Row]]


def main() -> None:
    parts = {"dense": dense, "casts": casts, "grouped": grouped, "layer": layer}
    run("kernels", __doc__, parts, tune)


def run(bench: str, description: str | None, parts: dict[str, Part], tune: Part) -> None:
    """Measure those `parts` of `bench` that the command line names, after `tune` where it asks for that."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--tune", action="store_true", help="try settings of the kernels")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = {"bench": bench, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    chosen = [parts[name] for name in args.only]
    for part in [tune, *chosen] if args.tune else chosen:
        for row in part():
            line = json.dumps({key: _short(value) for key, value in (row | machine).items()})
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")
        torch.cuda.empty_cache()


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def milliseconds(
    *calls: Callable[[], Any], samples: int = 9, in_a_row: int = 5, queued: bool = False
) -> list[float]:
    """Median of every call, each after WARM_UP seconds of itself: a GPU's clock falls as it gets warm, by how
    much depends on what it computes. Several in a row, so that the GPU does not wait for Python; `queued`
    behind a pause, for calls that take less time than Python does."""
    return [_median(call, samples, in_a_row, queued) for call in calls]


def _median(call: Callable[[], Any], samples: int, in_a_row: int, queued: bool) -> float:
    times: list[float] = []
    heated = clock.perf_counter() + WARM_UP
    while len(times) < samples:
        warm = clock.perf_counter() > heated
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if queued:
            torch.cuda._sleep(PAUSE)
        start.record()
        for _ in range(in_a_row):
            call()
        end.record()
        end.synchronize()
        if warm:
            times.append(start.elapsed_time(end) / in_a_row)
    return statistics.median(times)


def random(*shape: int) -> Tensor:
    """bf16 whose rows differ in magnitude."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return x * torch.exp2(torch.randint(-4, 4, (*shape[:-1], 1), device="cuda")).bfloat16()


def exact(quantised: Quantised) -> Tensor:
    return dequantise(quantised, torch.float64)


def first(quantised: Quantised, rows: int) -> Quantised:
    return quantised._replace(values=quantised.values[:rows], scales=quantised.scales[:rows])


def distance(x: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - wanted) / torch.linalg.vector_norm(wanted))


def checked(error: float) -> float:
    """bf16 keeps 2^-9 of a number; tensor cores sum up tiles of 128 in about 14 bits."""
    if not error < 4e-3:
        raise AssertionError(f"relative error {error}")
    return error


def dense() -> Iterator[Row]:
    for n in (4096, 8192):
        yield from square(n)


def square(n: int) -> Iterator[Row]:
    x, w, tera = random(n, n), random(n, n), 2 * n**3 / 1e12
    (a, columns), (b, _) = cast_activation(x), cast_weight(w)
    one = torch.ones(n, 1, device="cuda")
    everything = torch.tensor([n], device="cuda", dtype=torch.int32)
    stack = b._replace(values=b.values.unsqueeze(0), scales=b.scales.unsqueeze(0))
    cases: list[tuple[str, Quantised, Quantised, Callable[[], Tensor]]] = [
        ("blocks", a, b, lambda: product(a, b, torch.bfloat16)),
        ("tiles", columns, columns, lambda: product(columns, columns, torch.bfloat16)),
        ("blocks, our kernel", a, b, lambda: grouped_product(a, stack, everything, torch.bfloat16)),
    ]
    errors = [
        checked(distance(call()[:256], exact(first(left, 256)) @ exact(right).T))
        for _, left, right, call in cases
    ]
    bfloat, rowwise, *times = milliseconds(
        lambda: F.linear(x, w),
        lambda: torch._scaled_mm(a.values, b.values.mT, one, one.mT, out_dtype=torch.bfloat16),
        *(call for *_, call in cases),
        in_a_row=30,
    )
    for (name, *_), time, error in zip(cases, times, errors, strict=True):
        yield {
            "part": "dense", "case": f"{n}^3 {name}", "ms": time, "tflops": tera / time * 1e3,
            "rowwise_tflops": tera / rowwise * 1e3, "bf16_tflops": tera / bfloat * 1e3,
            "of_rowwise": rowwise / time, "over_bf16": bfloat / time, "error": error,
        }  # fmt: skip


def cast_cases() -> Iterator[tuple[str, Callable[[], Any], tuple[Tensor, ...], Callable[[Any], bool]]]:
    """Name, call, its inputs, and whether its result is right, judged by the first 256 rows."""
    x, offsets = random(ROWS, HIDDEN), routed()
    yield (
        "activation",
        lambda: cast_activation(x, offsets),
        (x,),
        lambda y: _same(y[0], quantise_fp8(x[:256])),
    )
    weight = random(8, 2 * WIDTH, HIDDEN)
    one = quantise_fp8(weight[0], FP8_BLOCK)
    yield (
        "weight",
        lambda: cast_weight(weight),
        (weight,),
        lambda y: _same(Quantised(y[0].values[0], y[0].scales[0], FP8_BLOCK), one),
    )
    master = weight[:4].float()
    yield (
        "fp4",
        lambda: fp4_values(master, torch.bfloat16),
        (master,),
        lambda y: torch.equal(y[0], round_fp4(master[0]).bfloat16()),
    )
    both, weights, grad = random(ROWS, 2 * WIDTH), torch.rand(ROWS, device="cuda"), random(ROWS, WIDTH)
    head = both[:256], weights[:256], LIMIT
    yield (
        "swiglu",
        lambda: cast_swiglu(both, weights, LIMIT, offsets),
        (both, weights),
        lambda y: _close(y[0], quantise_fp8(swiglu._weighted(*head))),
    )
    yield (
        "swiglu backward",
        lambda: cast_swiglu_backward(grad, both, weights, LIMIT, offsets),
        (grad, both, weights),
        lambda y: _close(y[0], _gradient(grad[:256], both[:256], weights[:256])),
    )


def _gradient(grad: Tensor, gate_up: Tensor, weights: Tensor) -> Quantised:
    gate_up = gate_up.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu._weighted(gate_up, weights, LIMIT), gate_up, grad)
    return quantise_fp8(gradient)


def _same(quantised: Quantised, wanted: Quantised) -> bool:
    ours = first(quantised, len(wanted.values))
    values = torch.equal(ours.values.view(torch.uint8), wanted.values.view(torch.uint8))
    return values and torch.equal(ours.scales, wanted.scales)


def _close(quantised: Quantised, wanted: Quantised) -> bool:
    return distance(exact(first(quantised, len(wanted.values))), exact(wanted)) < 2e-3


def casts() -> Iterator[Row]:
    for name, call, inputs, right in cast_cases():
        result = call()
        if not right(result):
            raise AssertionError(f"{name}: not what the reference returns")
        size = sum(x.nbytes for x in (*inputs, *_tensors(result)))
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        time, floor = milliseconds(call, partial(target.copy_, source), queued=True)
        yield {
            "part": "casts", "case": name, "ms": time, "gb_per_s": size / time / 1e6,
            "copy_gb_per_s": size / floor / 1e6, "over_floor": time / floor,
        }  # fmt: skip


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of nested tuples of tensors and what else there is."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in _tensors(part)] if isinstance(result, tuple) else []


def routed() -> Tensor:
    """Offsets [E] of ROWS rows: random tokens through a random gate, the first TOP_K, nothing balanced."""
    tokens = -(-ROWS // TOP_K)
    x = torch.randn(tokens, 256, device="cuda") + 0.5 * torch.randn(256, device="cuda")  # tokens have a mean
    chosen = (x @ torch.randn(256, EXPERTS, device="cuda")).softmax(-1).topk(TOP_K).indices
    counts = chosen.flatten().bincount(minlength=EXPERTS)
    counts[counts.argmax()] -= TOP_K * tokens - ROWS
    return counts.cumsum(0).int()


def expert_products(offsets: Tensor) -> Iterator[tuple[str, Callable, Callable, Callable]]:
    """Name, FP8 call, bf16 call, and the exact result of one expert from the FP8 operands."""
    x, grad = random(ROWS, HIDDEN), random(ROWS, 2 * WIDTH)
    weight = random(EXPERTS, 2 * WIDTH, HIDDEN)
    (rows, columns), (grads, grad_columns) = (cast_activation(y, offsets) for y in (x, grad))
    w, back = cast_weight(weight)

    def of_expert(e: int) -> slice:
        return slice(int(offsets[e - 1]) if e else 0, int(offsets[e]))

    def forward(a: Quantised, b: Quantised, e: int) -> tuple[Any, Tensor]:
        own = of_expert(e)
        left = exact(a._replace(values=a.values[own], scales=a.scales[own]))
        right = exact(Quantised(b.values[e], b.scales[e], b.block))
        return own, left @ right.T

    def outer(e: int) -> tuple[Any, Tensor]:
        own = cast.places_in_tiles(ROWS, offsets)[of_expert(e)]
        return e, exact(grad_columns)[:, own] @ exact(columns)[:, own].T

    bf16 = torch.bfloat16
    yield (
        "forward",
        lambda: grouped_product(rows, w, offsets, bf16),
        lambda: F.grouped_mm(x, weight.mT, offs=offsets),
        lambda e: forward(rows, w, e),
    )
    yield (
        "input gradient",
        lambda: grouped_product(grads, back, offsets, bf16),
        lambda: F.grouped_mm(grad, weight, offs=offsets),
        lambda e: forward(grads, back, e),
    )
    yield (
        "weight gradient",
        lambda: grouped_outer_product(grad_columns, columns, offsets, bf16),
        lambda: F.grouped_mm(grad.mT, x, offs=offsets),
        outer,
    )


def grouped() -> Iterator[Row]:
    offsets = routed()
    counts, tera = offsets.diff(prepend=offsets.new_zeros(1)), 4 * ROWS * HIDDEN * WIDTH / 1e12
    total, theirs_total = 0.0, 0.0
    for name, ours, theirs, wanted in expert_products(offsets):
        part, value = wanted(EXPERTS // 2)
        error = checked(distance(ours()[part], value))
        time, bfloat = milliseconds(ours, theirs)
        total, theirs_total = total + time, theirs_total + bfloat
        yield {
            "part": "grouped", "case": name, "ms": time, "tflops": tera / time * 1e3,
            "bf16_tflops": tera / bfloat * 1e3, "over_bf16": bfloat / time, "error": error,
            "rows_of_experts": [int(counts.min()), int(counts.max())],
        }  # fmt: skip
    yield {
        "part": "grouped", "case": "all three", "ms": total, "tflops": 3 * tera / total * 1e3,
        "bf16_tflops": 3 * tera / theirs_total * 1e3, "over_bf16": theirs_total / total,
    }  # fmt: skip


def layer() -> Iterator[Row]:
    offsets, limit = routed(), LIMIT
    shapes = (ROWS, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (ROWS, HIDDEN)
    x, gate_up, down, upstream = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    weights = torch.rand(ROWS, device="cuda")
    leaves = [y.requires_grad_() for y in (x, weights, gate_up.div_(64), down.div_(45))]

    def forward(mlp: Callable[..., Tensor]) -> Tensor:
        return mlp(x, weights, offsets, gate_up, down, limit)

    def both(mlp: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(mlp), leaves, upstream)

    found, plain = both(fp8_expert_mlp), both(expert_mlp)
    with ExitStack() as stack:
        for module in (cast, swiglu, products):
            stack.enter_context(patch.object(module, "runs_kernels", _no))
        emulated = both(fp8_expert_mlp)
    error = max(distance(a, b.double()) for a, b in zip(found, emulated, strict=True))
    if error > 0.01:  # sums in other orders round to other FP8 numbers here and there
        raise AssertionError(f"the kernels are {error} from their emulation")
    apart = max(distance(a, b.double()) for a, b in zip(found, plain, strict=True))
    del found, plain, emulated
    for name, call in (("forward", forward), ("forward and backward", both)):
        fp8, bfloat = milliseconds(partial(call, fp8_expert_mlp), partial(call, expert_mlp), in_a_row=3)
        yield {
            "part": "layer", "case": name, "ms": fp8, "bf16_ms": bfloat, "over_bf16": bfloat / fp8,
            "from_emulation": error, "from_bf16": apart,
        }  # fmt: skip


def _no(_: Tensor) -> bool:
    return False


def tune() -> Iterator[Row]:
    """Settings of the grouped kernels, and numbers of warps of the casts."""
    for name, call, _, _ in expert_products(routed()):
        if name != "input gradient":  # the same kernel on the same shape as forward
            yield from compared(name, hopper, "GROUP", [4, 8, 16, 32], call)
            yield from compared(name, hopper, "STAGES", [2, 3, 4], call)
    kinds = {
        "activation": cast_hopper.CAST,
        "swiglu": cast_hopper.SWIGLU,
        "swiglu backward": cast_hopper.BACKWARD,
    }
    for name, call, _, _ in cast_cases():
        if name == "weight":
            yield from compared(name, cast, "WARPS", [4, 8, 16], call)
        elif name != "fp4":
            settings = [(8, 32, 3), (8, 32, 4), (8, 64, 2), (8, 64, 3), (16, 64, 2), (16, 64, 3)]
            tried = [cast_hopper.SETTINGS | {kinds[name]: setting} for setting in settings]
            yield from compared(name, cast_hopper, "SETTINGS", tried, call, queued=True)


def compared(
    name: str, module: Any, attribute: str, values: list, call: Callable[[], Any], queued: bool = False
) -> Iterator[Row]:
    usual, times = getattr(module, attribute), {}
    for value in values:
        setattr(module, attribute, value)
        row = {"part": "tune", "case": f"{name}: {attribute} {value}", "usual": value == usual}
        try:
            (times[str(value)],) = milliseconds(call, queued=queued)
            yield row | {"ms": times[str(value)]}
        except Exception as error:  # too much shared memory, say: the others are still worth knowing
            yield row | {"error": str(error)[:200]}
    setattr(module, attribute, usual)
    yield {"part": "tune", "case": f"{name}: best {attribute}", "setting": min(times, key=times.__getitem__)}


if __name__ == "__main__":
    main()
