"""Which products are computed in which numbers: a choice made on a built model; no torch.

Always in fp32: routers, hyper-connections, norms, softmax. Always in the compute dtype: the embedding, the
output head, the grouped half of attention's output, compressors, the indexer's head weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FP8_KINDS = ("attention", "indexer", "shared_expert", "mtp")  # of model.linear, beside the routed experts


@dataclass(frozen=True)
class Precision:
    """What is rounded in forward and backward; masters stay fp32 (V4 report, on FP8 and FP4 training).

    fp8          products of `FP8_KINDS` and of routed experts, forward and backward, are of FP8 numbers
    fp4_experts  routed experts compute with their weights rounded to FP4; gradients go to the masters as
                 they are
    fp4_indexer  the indexer compares queries and keys that are rotated and rounded to FP4, in bf16
    fp8_kv       attention reads window and compressed entries as an FP8 cache would return them
    """

    fp8: bool = False
    fp4_experts: bool = False
    fp4_indexer: bool = False
    fp8_kv: bool = False


NAMED = {
    "bf16": Precision(),
    "fp8": Precision(fp8=True),
    "fp4_qat": Precision(fp8=True, fp4_experts=True, fp4_indexer=True, fp8_kv=True),
}


def products(precision: Precision, compute: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows of a table: which products; operands forward; of the input's gradient; of the weight's gradient.

    `compute` is the name of the compute dtype. Operands: activation or gradient · weight or activation, with
    their blocks; FP4 weights are multiplied as FP8 in blocks of 128 × 128 where activations are FP8.
    """
    plain = (compute,) * 3
    eight = ("FP8 1×128 · 128×128", "FP8 1×128 · 128×128", "FP8 128×1 · 128×1")
    linear = expert = eight if precision.fp8 else plain
    if precision.fp4_experts:
        with_weight = f"{'FP8 1×128' if precision.fp8 else compute} · FP4 1×32"
        expert = (with_weight, with_weight, linear[2])
    scores = "FP4 1×32 · 1×32" if precision.fp4_indexer else compute
    entries = f"{compute} · FP8 1×64" if precision.fp8_kv else compute
    yield "attention: q_a, q_b, kv, o_b", *linear
    yield "attention: with entries", entries, entries, "none"
    yield "attention: o_a", *plain
    yield "compressors", *plain
    yield "indexer: q_b", *linear
    yield "indexer: scores", scores, "none", "none"
    yield "indexer: scores, to learn", "float32", "float32", "none"
    yield "indexer: head weights", *plain
    yield "routers, hyper-connections", *("float32",) * 3
    yield "routed experts", *expert
    yield "shared experts", *linear
    yield "MTP: e, h", *linear
    yield "output head", *plain
