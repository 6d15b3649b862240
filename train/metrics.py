"""What a run measures of itself and writes down, and how fast it is against its hardware.

Names are stable; train/README.md lists them. `metrics.jsonl` holds what one seed repeats exactly on a CPU,
`timing.jsonl` all that depends on time or memory.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import naming, sealed
from model.model import ForCausalLM

# Dense bf16 peak, FLOP/s, from the makers' data sheets (SXM parts, without sparsity).
PEAK_BF16 = {
    "A100": 312e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H20": 148e12,
    "B200": 2250e12,
    "B300": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of the GPU for MFU, or None where it is not known (and on CPUs)."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if {"PCIe", "NVL"} & set(words):  # slower parts of the same name
        return None
    return next((PEAK_BF16[word] for word in words if word in PEAK_BF16), None)


def floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """0-d tensors as numbers; those on a GPU come with one transfer, which waits for all work before it."""
    remote = {name: x for name, x in values.items() if isinstance(x, Tensor) and x.device.type != "cpu"}
    host = torch.stack([x.detach().double() for x in remote.values()]).tolist() if remote else []
    known = {**values, **dict(zip(remote, host, strict=True))}
    return {name: float(x) if isinstance(x, Tensor) else x for name, x in known.items()}


@torch.no_grad()
def expert_metrics(model: ForCausalLM, loads: Sequence[Tensor]) -> dict[str, Tensor]:
    """How evenly the learned routers use their experts, as 0-d tensors on the model's device.

    `loads`: choices of each expert [E] over the whole step, one tensor a MoE in the order of `model.moes()`.
    A layer is called by its number, an MTP block mtp0, mtp1, ...

    load_max/<layer>       the busiest expert over the mean: 1 is balanced, E / K the worst
    load_entropy/<layer>   entropy of the choices over log E: 1 is balanced
    router_bias/<layer>    the largest absolute load-balancing bias
    max_load               the largest load_max
    """
    names = [str(i) for i in range(len(model.layers))] + [f"mtp{i}" for i in range(len(model.mtp))]
    rows = [
        (name, load, moe.gate.e_score_correction_bias)
        for name, load, moe in zip(names, loads, model.moes(), strict=True)
        if not moe.gate.is_hash
    ]
    if not rows:
        return {}
    layers, counts, biases = zip(*rows, strict=True)
    count = torch.stack(counts).double()  # [layers, E]
    share = count / count.sum(-1, keepdim=True).clamp(min=1)
    experts = share.shape[-1]
    measured = {
        "load_max": share.amax(-1) * experts,
        "load_entropy": -torch.special.xlogy(share, share).sum(-1) / math.log(max(experts, 2)),
        "router_bias": torch.stack(biases).abs().amax(-1),
    }
    named = {
        f"{kind}/{layer}": value
        for kind, values in measured.items()
        for layer, value in zip(layers, values, strict=True)
    }
    return {**named, "max_load": measured["load_max"].max()}


def memory(device: torch.device) -> dict[str, float]:
    """Peaks in GiB: what torch allocated and reserved on a GPU since the last call; a CPU process's ever."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {
            "memory_allocated_gib": stats["allocated_bytes.all.peak"] / 2**30,
            "memory_reserved_gib": stats["reserved_bytes.all.peak"] / 2**30,
        }
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return {"memory_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


class Timer:
    """Seconds of the parts of a step: the wall clock on a CPU, events in the GPU's own stream on a GPU.

    `start()`; `with timer("forward"):` as often as wanted, parts do not nest; `stop()` once the host has read
    the step's values (`floats`): every event lies before them, so that reading the events waits for nothing.
    """

    def __init__(self, device: torch.device):
        self._events = device.type == "cuda"
        self.start()

    def start(self) -> None:
        self._began = time.perf_counter()
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before = self._mark()
        try:
            yield
        finally:
            self._marks.append((part, before, self._mark()))

    def stop(self) -> dict[str, float]:
        """`seconds/<part>` of every part, `seconds/other` and the whole as `seconds/step`."""
        step = time.perf_counter() - self._began
        parts: dict[str, float] = {}
        for part, before, after in self._marks:
            parts[f"seconds/{part}"] = parts.get(f"seconds/{part}", 0.0) + self._between(before, after)
        return {**parts, "seconds/other": max(0.0, step - sum(parts.values())), "seconds/step": step}

    def _mark(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self._events:
            return after - before
        after.synchronize()  # has happened already, see above
        return before.elapsed_time(after) / 1e3


class JsonLines:
    """Appends one JSON object a line. A line is handed to the system at once and whole: a killed process
    leaves at most a last one that is torn, which `keep_until` drops."""

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("a")

    def write(self, **values: Any) -> None:
        with naming(self.path):
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole objects of a JSON-lines file; a torn line is left out."""
    return [value for line in path.read_bytes().splitlines() if isinstance(value := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def validation_losses(path: Path) -> list[float]:
    """The next-token losses of every validation in a run's metrics, oldest first."""
    return [line["valid_lm"] for line in read_lines(path) if "valid_lm" in line]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file after `step`: a resumed run writes them anew.

    Whatever happens, the file is the one before or the one after.
    """
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        with sealed(path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)
