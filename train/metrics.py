"""What a run writes about itself, and how fast it is against its hardware."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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


class JsonLines:
    """Appends one JSON object a line; every line is flushed. `metrics.jsonl` holds what one seed repeats
    exactly, `timing.jsonl` what it does not."""

    def __init__(self, path: Path):
        self.file = path.open("a")

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def validation_losses(path: Path) -> list[float]:
    """The next-token losses of every validation in a run's metrics, oldest first."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["valid_lm"] for line in lines if "valid_lm" in line]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file after `step`: a resumed run writes them anew."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)
