"""Shared-KV attention's kernels on one Hopper GPU, at V4's shapes.

    python -m tests.bench.attention [--out FILE] [--heads 64] [--lengths 4096 16384] [--only csa] [--no-peer]

    sliding    a window of 128 tokens
    hca        and all entries, one for 128 tokens
    csa_dense  and all entries, one for 4 tokens
    csa        and the indexer's 512 of those (of 128 heads 1024), here at random, as GATHER_ABOVE has it
    csa_masked, csa_gathered, csa_repeatable    the same by each way to read them

Rows are one document. Every line of JSON is one measurement: milliseconds are medians between CUDA events,
after warm-up. TFLOP/s are useful: of the pairs that are attended to alone, two products of them forward, five
backward, one for the mass. Peers where they fit: the torch reference, and transformers' eager attention.
Before anything is timed, output and all gradients are compared with fp64 at SAMPLE queries (`errors`,
relative norms; the output's gradient is zero at all others). `--tune` tries settings of every kernel first
and says which was best; the rest then runs with the settings in the code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels import attention as module
from model.kernels import shared_kv, shared_kv_backward
from model.kernels.attention import Seen, attention_and_mass, shared_kv_attention
from model.kernels.shared_kv import Setting
from tests.bench.kernels import Row, _short, compared, distance, milliseconds

CHANNELS, WINDOW, SAMPLE = 512, 128, 64
RATES = {"sliding": 0, "hca": 128}  # tokens for each entry; others 4
CASES = ("sliding", "hca", "csa_dense", "csa", "csa_masked", "csa_gathered", "csa_repeatable")
USUAL = module.GATHER_ABOVE
SETTINGS: dict[str, list[Setting]] = {
    "FORWARD": [
        Setting(64, 32, 8, 2), Setting(64, 32, 8, 3), Setting(64, 32, 8, 4), Setting(64, 64, 8, 2),
        Setting(64, 32, 4, 3), Setting(64, 16, 8, 4),
    ],
    "GATHERED_FORWARD": [
        Setting(64, 32, 8, 3), Setting(64, 32, 8, 5), Setting(64, 32, 8, 7), Setting(64, 64, 8, 2),
        Setting(64, 64, 8, 3),
    ],
    "MASS": [
        Setting(128, 32, 8, 2), Setting(128, 32, 4, 2), Setting(128, 64, 8, 1), Setting(64, 64, 8, 2),
        Setting(64, 64, 4, 2), Setting(64, 32, 4, 3),
    ],
    "GATHERED_MASS": [
        Setting(64, 64, 8, 2), Setting(64, 64, 4, 2), Setting(64, 32, 4, 3), Setting(64, 32, 4, 5),
    ],
    "DQ": [Setting(64, 32, 8, 2), Setting(64, 32, 8, 1), Setting(64, 16, 8, 4), Setting(64, 64, 8, 1)],
    "DKV": [Setting(32, 64, 8, 2), Setting(16, 64, 8, 4), Setting(16, 64, 8, 3), Setting(64, 64, 8, 1)],
    "GATHERED": [Setting(64, 64, 8, 1), Setting(32, 64, 8, 1), Setting(32, 64, 8, 2)],
}  # fmt: skip


class Problem(NamedTuple):
    q: Tensor  # [1, S, H, C]
    kv: Tensor  # [1, S, C]
    entries: Tensor | None  # [1, T, C]
    seen: Seen | None
    sinks: Tensor
    positions: Tensor
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.kv, self.entries, self.sinks) if x is not None]

    def attend(self) -> Tensor:
        known = self.sinks, self.positions, WINDOW
        return shared_kv_attention(self.q, self.kv, self.entries, self.seen, *known)

    def pairs(self) -> tuple[int, int]:
        """Of queries and window tokens, and of queries and entries, over the row."""
        near, far = int((self.positions + 1).clamp(max=WINDOW).sum()), 0
        if self.seen is not None and self.seen.chosen is not None:
            far = int((self.seen.chosen >= 0).sum())
        elif self.seen is not None:
            far = int((self.seen.end - self.seen.first).sum())
        return near, far


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument(
        "--tune", action="store_true", help="try settings of the kernels, at the first length"
    )
    parser.add_argument("--no-peer", action="store_true", help="kernels alone")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = {"bench": "attention", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for row in rows(args):
        line = json.dumps({key: _short(value) for key, value in (row | machine).items()})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    if args.tune:
        yield from tune(args.lengths[0], args.heads)
    for length in args.lengths:
        for case in args.only:
            use(case)
            yield from measured(case, length, args.heads, not args.no_peer)
            torch.cuda.empty_cache()


def use(case: str) -> None:
    """Have selected entries read as the case says."""
    module.GATHER_ABOVE = {"csa_masked": 1 << 30, "csa": USUAL}.get(case, -1)
    torch.use_deterministic_algorithms(case == "csa_repeatable", warn_only=True)


def problem(case: str, length: int, heads: int) -> Problem:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    positions, rate = torch.arange(length, device="cuda").unsqueeze(0), RATES.get(case, 4)
    entries = seen = None
    if rate:
        entries = random(1, length // rate, CHANNELS)
        seen = Seen(torch.zeros_like(positions), (positions + 1) // rate)
        if case not in ("hca", "csa_dense"):
            seen = seen._replace(chosen=selected(seen.end, length // rate, 512 * heads // 64))
    sinks = torch.randn(heads, device="cuda").requires_grad_()
    q, kv = random(1, length, heads, CHANNELS), random(1, length, CHANNELS)
    return Problem(q, kv, entries, seen, sinks, positions, random(*q.shape).detach())


def selected(end: Tensor, slots: int, count: int) -> Tensor:
    """`count` random visible entries of each query [1, S, k], ascending, then -1."""
    parts = []
    for own in end.split(4096, 1):
        score = torch.rand(1, own.shape[1], slots, device="cuda")
        score.masked_fill_(torch.arange(slots, device="cuda") >= own.unsqueeze(-1), -1)
        best = score.topk(min(count, slots), dim=-1)
        chosen = torch.where(best.values >= 0, best.indices, slots).sort(-1).values
        parts.append(torch.where(chosen < slots, chosen, -1).int())
    return torch.cat(parts, dim=1)


def measured(case: str, length: int, heads: int, peers: bool = True) -> Iterator[Row]:
    p = problem(case, length, heads)
    near, far = p.pairs()
    tera = 2 * CHANNELS * heads * (near + far) / 1e12  # of one product
    errors, row = checked(p), {"case": case, "length": length, "heads": heads}
    with torch.no_grad():
        (forward,) = milliseconds(p.attend)
    backward = of_backward(p.attend(), p)
    yield row | {
        "forward_ms": forward, "forward_tflops": 2 * tera / forward * 1e3,
        "backward_ms": backward, "backward_tflops": 5 * tera / backward * 1e3, "errors": errors,
    }  # fmt: skip
    if p.entries is not None and p.seen is not None:
        known = (p.q, p.kv, p.entries, p.seen, p.sinks, p.positions, WINDOW)
        with torch.no_grad():
            (both,) = milliseconds(lambda: attention_and_mass(*known))
        mass = tera * far / (near + far) / (both - forward) * 1e3
        yield row | {"part": "mass", "ms": both - forward, "tflops": mass}
    for name, attend in (("torch", in_torch), ("transformers", in_transformers)) if peers else ():
        try:
            with torch.no_grad():
                (theirs,) = milliseconds(partial(attend, p), samples=3, in_a_row=1)
            theirs_back = of_backward(attend(p), p)
        except torch.OutOfMemoryError:
            yield row | {"peer": name, "error": "out of memory"}
            continue
        yield row | {
            "peer": name, "forward_ms": theirs, "backward_ms": theirs_back,
            "forward_over": theirs / forward, "backward_over": theirs_back / backward,
        }  # fmt: skip


def of_backward(out: Tensor, p: Problem) -> float:
    leaves = p.leaves()
    return milliseconds(lambda: torch.autograd.grad(out, leaves, p.grad, retain_graph=True), in_a_row=1)[0]


def in_torch(p: Problem) -> Tensor:
    """Our reference, in bf16."""
    entries, seen = p.entries, p.seen
    if entries is None or seen is None:
        entries, seen = p.kv[:, :0], Seen(p.positions, p.positions)
    mask = seen.mask(entries.shape[1])
    return module._in_blocks(p.q, p.kv, entries, mask, p.sinks, p.positions, WINDOW, False)[0]


def in_transformers(p: Problem) -> Tensor:
    """Eager attention over all tokens and entries with an additive mask, as its layers call it."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    distance = p.positions.unsqueeze(-1) - p.positions.unsqueeze(1)  # [1, S, S]
    allowed, keys = (distance >= 0) & (distance < WINDOW), p.kv
    if p.entries is not None and p.seen is not None:
        keys = torch.cat((keys, p.entries), dim=1)
        allowed = torch.cat((allowed, p.seen.mask(p.entries.shape[1])), dim=-1)
    mask = torch.zeros_like(allowed, dtype=p.q.dtype).masked_fill_(~allowed, -torch.inf).unsqueeze(1)
    layer: Any = SimpleNamespace(
        num_key_value_groups=p.q.shape[2], sinks=p.sinks.to(p.q.dtype), training=True
    )
    heads, keys = p.q.transpose(1, 2), keys.unsqueeze(1)
    return eager_attention_forward(layer, heads, keys, keys, mask, CHANNELS**-0.5, 0.0)[0]


def checked(p: Problem) -> list[float]:
    """Relative errors of the output and of gradients at some queries, from fp64 by the equations."""
    at = torch.randperm(p.q.shape[1], device="cuda")[:SAMPLE]
    upstream = torch.zeros_like(p.grad)
    upstream[:, at] = p.grad[:, at]
    out = p.attend()
    ours = [out.detach()[:, at], *torch.autograd.grad(out, p.leaves(), upstream)]
    ours[1] = ours[1][:, at]
    q, kv, sinks = (x.detach().double().requires_grad_() for x in (p.q[0, at], p.kv[0], p.sinks))
    back = at.unsqueeze(1) - torch.arange(WINDOW, device="cuda")  # [n, W]
    keys, allowed = kv[back.clamp(min=0)], back >= 0
    leaves = [q, kv, sinks]
    if p.entries is not None and p.seen is not None:
        entries = p.entries[0].detach().double().requires_grad_()
        leaves.insert(2, entries)
        seen = Seen(*(None if x is None else x[:, at] for x in p.seen)).mask(len(entries))  # type: ignore[arg-type]
        keys, allowed = torch.cat((keys, entries.expand(SAMPLE, -1, -1)), 1), torch.cat((allowed, seen[0]), 1)
    logits = (q @ keys.mT * CHANNELS**-0.5).masked_fill(~allowed.unsqueeze(1), -torch.inf)
    sink = sinks.view(1, -1, 1).expand(SAMPLE, -1, 1)
    exact = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1] @ keys  # [n, H, C]
    wanted = [exact, *torch.autograd.grad(exact, leaves, p.grad[0, at].double())]
    errors = [distance(a.flatten(), b.detach().flatten()) for a, b in zip(ours, wanted, strict=True)]
    if not max(errors) < 2e-2:
        raise AssertionError(f"relative errors {errors}")
    return [float(f"{error:.2g}") for error in errors]


def tune(length: int, heads: int) -> Iterator[Row]:
    """Every setting of every kernel, on the case that it is for."""
    for name, settings in SETTINGS.items():
        gathered = name.startswith("GATHERED")
        case = "csa_gathered" if gathered else "csa_dense"
        use(case)
        p = problem(case, length, heads)
        place: Any = shared_kv if hasattr(shared_kv, name) else shared_kv_backward
        yield from compared(f"{name.lower()} {case}", place, name, list(settings), call_of(name, p))


def call_of(name: str, p: Problem) -> Callable[[], Any]:
    """What runs the kernel of a setting, others perhaps too."""
    out = p.attend()
    if name.endswith("FORWARD"):
        return torch.no_grad()(p.attend)
    if name.endswith("MASS"):
        assert p.entries is not None and p.seen is not None
        known = (p.q, p.kv, p.entries, p.seen, p.sinks, p.positions, WINDOW)
        return torch.no_grad()(lambda: attention_and_mass(*known))
    return lambda: torch.autograd.grad(out, p.leaves(), p.grad, retain_graph=True)


if __name__ == "__main__":
    main()
