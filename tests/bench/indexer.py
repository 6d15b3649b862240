"""The lightning indexer's kernels and gated pooling beside their torch references, on one Hopper GPU.

    python -m tests.bench.indexer [--out FILE] [--only scores select dense sparse pooling] [--tune]

    scores   all scores that queries of one document need, 64 heads of 128 channels; useful TFLOP/s
    select   scores and the best 512: `select_indices`
    dense    loss and gradients over all visible entries; TFLOP/s of scores and both gradients
    sparse   the same over 512 selected ones; also with dk added up `in_order`
    pooling  CSA's and HCA's compressors and the indexer's: GB/s of what must be read and written, beside
             a copy of as many bytes

Times as in `tests.bench.kernels`. Before it is timed everything is compared with fp64 on 64 queries, for
gradients with a loss of these alone (`error`, the largest relative norm; `reference_error` is that of the
reference from the same bf16 numbers), and selections with a stable sort of the kernel's scores, exactly;
`recall` is their share of fp64's. References are timed where they fit. `--tune` tries settings first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.kernels import gated_pool, index_loss, index_select
from model.kernels.gated_pool import pool
from model.kernels.indexer import index_loss as loss_of
from model.kernels.indexer import index_scores, keep_best, mask_of, select_entries, select_indices
from model.kernels.pooling import gated_pool as reference_pool
from tests.bench.kernels import Row, compared, distance, milliseconds, run

LENGTHS, RATE, HEADS, CHANNELS, TOPK, SAMPLED = (4096, 16384, 65536), 4, 64, 128, 512, 64
BF16 = torch.bfloat16


def main() -> None:
    parts = {"scores": scores, "select": select, "dense": dense, "sparse": sparse, "pooling": pooling}
    run("indexer", __doc__, parts, tune)


def operands(length: int) -> tuple[Tensor, ...]:
    """q, k and weights of one document; the slots that its queries see, from first to end."""
    q = torch.randn(1, length, HEADS, CHANNELS, device="cuda").to(BF16)
    k = (torch.randn(1, length // RATE, CHANNELS, device="cuda") + torch.randn(CHANNELS, device="cuda")).to(
        BF16
    )
    weights = (torch.randn(1, length, HEADS, device="cuda") * (HEADS * CHANNELS) ** -0.5).to(BF16)
    end = ((torch.arange(1, length + 1, device="cuda") // RATE).int()).unsqueeze(0)
    return q, k, weights, torch.zeros_like(end), end


def sample(length: int) -> Tensor:
    return torch.randperm(length, device="cuda")[:SAMPLED].sort().values


def tera(pairs: Tensor) -> float:
    """TFLOP of one product of all heads for as many pairs of queries and entries."""
    return int(pairs.long().sum()) * 2 * HEADS * CHANNELS / 1e12


def checked(error: float, limit: float) -> float:
    if not error < limit:
        raise AssertionError(f"relative error {error}")
    return error


def write_all(q: Tensor, k: Tensor, weights: Tensor, first: Tensor, end: Tensor, out: Tensor) -> None:
    """All scores, in turn into out [1, C, T]."""
    for start in range(0, q.shape[1], out.shape[1]):
        index_select.write_scores(out, q, k, weights, first, end, start=start)


def chunk_of(length: int) -> Tensor:
    slots = length // RATE
    return torch.empty(1, min(length, index_select.SCORES_AT_ONCE // slots), slots, device="cuda")


def scores() -> Iterator[Row]:
    for length in LENGTHS:
        q, k, weights, first, end = operands(length)
        out, some = chunk_of(length), sample(length)
        every = index_scores(q[:, some].double(), k.double(), weights[:, some].double())
        errors = []
        for start in range(0, length, out.shape[1]):
            index_select.write_scores(out, q, k, weights, first, end, start=start)
            for i in (some - start).tolist():
                if 0 <= i < out.shape[1] and end[0, start + i]:
                    seen = slice(0, int(end[0, start + i]))
                    errors.append(distance(out[0, i, seen], every[0, some == start + i][0, seen]))
        (time,) = milliseconds(partial(write_all, q, k, weights, first, end, out), in_a_row=3)
        yield {
            "part": "scores", "case": f"S {length}", "ms": time, "tflops": tera(end) / time * 1e3,
            "error": checked(max(errors), 1e-4),
        }  # fmt: skip


def select() -> Iterator[Row]:
    for length in LENGTHS:
        for ranked_in in (torch.float32, BF16):
            yield selection(length, ranked_in)


def selection(length: int, ranked_in: torch.dtype) -> Row:
    q, k, weights, first, end = operands(length)
    call = partial(select_indices, q, k, weights, first, end, TOPK, ranked_in)
    slots, some = k.shape[1], sample(length)
    visible = torch.arange(slots, device="cuda") < end[:, some].unsqueeze(-1)
    kept = mask_of(call()[:, some], slots)
    out = torch.empty(1, SAMPLED, slots, device="cuda", dtype=ranked_in)
    alone = q[:, some], k, weights[:, some], first[:, some], end[:, some]
    index_select.write_scores(out, *(x.contiguous() for x in alone))
    if not torch.equal(kept, keep_best(out, visible, TOPK)):
        raise AssertionError("not the best of the kernel's scores")
    exact = keep_best(index_scores(alone[0].double(), k.double(), alone[2].double()), visible, TOPK)
    (time,) = milliseconds(call, in_a_row=3)
    row: Row = {
        "part": "select", "case": f"S {length} {ranked_in}", "ms": time,
        "tflops": tera(end[end > TOPK]) / time * 1e3, "recall": float((kept & exact).sum() / exact.sum()),
    }  # fmt: skip
    if length <= 16384:
        everything = torch.arange(slots, device="cuda") < end.unsqueeze(-1)
        theirs = partial(select_entries, q, k, weights, everything, TOPK, ranked_in)
        (row["reference_ms"],) = milliseconds(theirs, samples=3, in_a_row=1)
        row["over_reference"] = row["reference_ms"] / time
    return row


def dense() -> Iterator[Row]:
    for length in LENGTHS[:2]:
        q, k, weights, _, end = operands(length)
        attended = torch.arange(k.shape[1], device="cuda") < end.unsqueeze(-1)
        yield losses("dense", q, k, weights, attended, end)


def sparse() -> Iterator[Row]:
    for length in LENGTHS:
        q, k, weights, first, end = operands(length)
        indices = select_indices(q, k, weights, first, end, TOPK)
        for how in (at_once, in_order):
            yield losses("sparse", q, k, weights, indices, end.clamp(max=TOPK), how)


def at_once(call: Callable[[], Any]) -> Any:
    """As it comes."""
    return call()


def in_order(call: Callable[[], Any]) -> Any:
    """With the same bits every time."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def losses(
    part: str, q: Tensor, k: Tensor, weights: Tensor, attended: Tensor, pairs: Tensor, how: Any = at_once
) -> Row:
    """The loss and its gradients by the kernels, and by the reference at the smallest length."""
    length = q.shape[1]
    flags = attended if attended.dtype == torch.bool else attended >= 0
    mass, real = torch.rand(attended.shape, device="cuda") ** 4 * flags, torch.ones_like(flags[..., 0])
    leaves = [x.detach().requires_grad_() for x in (q, k, weights)]

    def both(divergence: Callable[..., Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(divergence(*leaves, mass, attended, real), leaves))

    def forward() -> Tensor:
        with torch.no_grad():
            return by_kernels(q, k, weights, mass, attended, real)

    error, reference_error = of_some(q, k, weights, mass, attended, how)
    whole = partial(how, partial(both, by_kernels))
    ours = milliseconds(forward, whole, in_a_row=3)
    row: Row = {
        "part": part, "case": f"S {length} {how.__name__}", "ms": ours[1], "forward_ms": ours[0],
        "tflops": 3 * tera(pairs) / ours[1] * 1e3, "forward_tflops": tera(pairs) / ours[0] * 1e3,
        "error": checked(error, 2.5 * reference_error), "reference_error": reference_error,
    }  # fmt: skip
    if length == LENGTHS[0]:
        (row["reference_ms"],) = milliseconds(partial(both, by_reference), samples=3, in_a_row=1)
        row["over_reference"] = row["reference_ms"] / ours[1]
    return row


def by_kernels(*inputs: Tensor) -> Tensor:
    return torch.ops.fourfold.index_divergence(*inputs)[0].sum()


def by_reference(q: Tensor, k: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
    """Operands in fp32, which kernels do not take, from the same bf16 numbers."""
    return loss_of(q.float(), k.float(), weights.float(), *rest)


def of_some(
    q: Tensor, k: Tensor, weights: Tensor, mass: Tensor, attended: Tensor, how: Any
) -> tuple[float, float]:
    """Largest errors of loss and gradients of sampled queries' losses: the kernels', the reference's."""
    some = sample(q.shape[1])
    real = torch.zeros(q.shape[:2], dtype=torch.bool, device="cuda")
    real[:, some] = True

    def found(divergence: Callable[..., Tensor], few: bool, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        loss = divergence(*leaves, *inputs[3:])
        dq, dk, dw = torch.autograd.grad(loss, leaves)
        return [loss.detach(), dk] + ([dq, dw] if few else [dq[:, some], dw[:, some]])

    ours = how(partial(found, by_kernels, False, q, k, weights, mass, attended, real))
    few = q[:, some], k, weights[:, some], mass[:, some], attended[:, some], real[:, some]
    exact = found(loss_of, True, *(x.double() for x in few[:4]), *few[4:])
    near = found(by_reference, True, *few)
    return tuple(max(distance(x, y) for x, y in zip(xs, exact)) for xs in (ours, near))  # type: ignore[return-value]


def pooled_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name, and the inputs of `gated_pool` for one document."""
    for length in LENGTHS:
        for name, rate, channels, overlap in (
            ("CSA", 4, 512, 1),
            ("indexer", 4, 128, 1),
            ("HCA", 128, 512, 0),
        ):
            width = channels * (1 + overlap)
            kv, gate = (torch.randn(1, length, width, device="cuda").to(BF16) for _ in range(2))
            tokens = torch.arange(length, device="cuda").view(1, -1, rate)
            chained = (torch.arange(length // rate, device="cuda") > 0).unsqueeze(0) if overlap else None
            yield f"{name} S {length}", (kv, gate, torch.randn(rate, width, device="cuda"), tokens, chained)


def pooling() -> Iterator[Row]:
    for name, (*inputs, tokens, chained) in pooled_cases():
        leaves = [x.requires_grad_() for x in inputs]
        upstream = torch.randn_like(pool(*leaves, tokens, chained))
        few = max(tokens.shape[2], 2048)  # tokens that are compared
        links = None if chained is None else chained[:, : few // tokens.shape[2]]
        head = leaves[0][:, :few], leaves[1][:, :few], leaves[2], tokens[:, : few // tokens.shape[2]], links
        exact = reference_pool(head[0].double(), head[1].double(), head[2].double(), head[3], head[4])
        error = checked(distance(pool(*head), exact), 4e-3)
        forward = partial(pool, *(x.detach() for x in leaves), tokens, chained)
        backward = partial(gated_pool.pool_backward, upstream, *(x.detach() for x in leaves), tokens, chained)
        size = 2 * leaves[0].nbytes + upstream.nbytes
        for step, call, moved in (
            ("forward", forward, size),
            ("backward", backward, 2 * size - upstream.nbytes),
        ):
            source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_()
            time, floor = milliseconds(call, partial(torch.empty_like(source).copy_, source))
            yield {
                "part": "pooling", "case": f"{name} {step}", "ms": time, "gb_per_s": moved / time / 1e6,
                "copy_gb_per_s": moved / floor / 1e6, "over_floor": time / floor, "error": error,
            }  # fmt: skip


def tune() -> Iterator[Row]:
    """Settings of every kernel: of the loss at 4096 tokens, of the others at 16384."""
    q, k, weights, first, end = operands(16384)
    settings = [
        index_select.Setting(entries, queries, together, warps, stages)
        for entries, together, warps in (
            (128, 2, 8),
            (128, 1, 4),
            (128, 1, 8),
            (256, 1, 8),
            (256, 2, 8),
            (128, 4, 8),
        )
        for queries in (32, 64, 128)
        for stages in (2, 3)
    ]
    call = partial(write_all, q, k, weights, first, end, chunk_of(16384))
    yield from compared("scores", index_select, "SCORES", settings, call)
    q, k, weights, first, end = operands(4096)
    attended = torch.arange(k.shape[1], device="cuda") < end.unsqueeze(-1)
    indices = select_indices(q, k, weights, first, end, TOPK)
    leaves = [x.requires_grad_() for x in (q, k, weights)]
    cuts = [
        index_loss.Setting(entries, warps, stages)
        for entries, warps in ((64, 4), (64, 8), (128, 4), (128, 8))
        for stages in (2, 3)
    ]
    for name, chosen in (
        ("SELECTED", indices), ("OF_SELECTED", indices), ("OF_QUERIES", attended), ("OF_KEYS", attended),
    ):  # fmt: skip
        flags = chosen if chosen.dtype == torch.bool else chosen >= 0
        inputs = *leaves, torch.rand(flags.shape, device="cuda") * flags, chosen, flags[..., 0]

        def both(inputs: tuple[Tensor, ...] = inputs) -> tuple[Tensor, ...]:
            return torch.autograd.grad(by_kernels(*inputs), leaves)

        yield from compared(f"loss, {name}", index_loss, name, cuts, both)
    pools = [
        gated_pool.Setting(elements, channels, blocks, warps)
        for elements, channels in ((1024, 32), (2048, 64), (4096, 64), (4096, 128), (8192, 64))
        for blocks in (1, 4)
        for warps in (4, 8)
    ]
    for name, (*tensors, tokens, chained) in pooled_cases():
        if "16384" in name:
            grad = torch.randn_like(pool(*tensors, tokens, chained))
            forward = partial(pool, *tensors, tokens, chained)
            backward = partial(gated_pool.pool_backward, grad, *tensors, tokens, chained)
            yield from compared(f"pooling {name}", gated_pool, "FORWARD", pools, forward)
            yield from compared(f"pooling backward {name}", gated_pool, "BACKWARD", pools, backward)


if __name__ == "__main__":
    main()
