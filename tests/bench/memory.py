"""Predicted and measured GPU memory of two training steps.

    python -m tests.bench.memory [--out FILE]                      every case below, each in its own process
    python -m tests.bench.memory [--out FILE] experiment=nano ...  one case: Hydra overrides, as for training

Every line of JSON has the prediction by category and, for every stage, the most bytes that were allocated to
tensors and reserved from the driver: `build` (the engine), then in both steps `micro_1` and `micro_2`
(forward and backward) and `step` (the optimizer). Moments are made in the first step, so that the second is
what a run keeps repeating. Random tokens; the bytes do not depend on them. `parallel=single` is the bare
engine, `parallel=zero` DeepSpeed's; under torchrun rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.compose import compose
from train.config import RunConfig
from train.memory import predict
from train.ranks import join
from train.run import bucket_bytes, build_engine

MODELS = (
    "experiment=nano",
    "experiment=nano train.compile=false",
    "experiment=ref_1b7 train.micro_batch=1",
    "experiment=ref_1b7 train.micro_batch=2",
    "experiment=ref_1b7 train.micro_batch=1 model.num_nextn_predict_layers=0",
    "experiment=ref_1b7 train.micro_batch=2 model.num_nextn_predict_layers=0 train.compile=false",
)
CASES = [f"{case} parallel={engine}" for engine in ("single", "zero") for case in MODELS]


def random_batch(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """One micro-batch of one document a row."""
    rows, length = config.train.micro_batch, config.train.seq_len
    depth = config.model.num_nextn_predict_layers
    ids = torch.randint(config.model.vocab_size, (rows, length + 1 + depth), device=device)
    position = torch.arange(length, device=device).expand(rows, -1).contiguous()
    further = [ids[:, i : i + length] for i in range(2, 2 + depth)]
    return {
        "input_ids": ids[:, :length].contiguous(),
        "labels": ids[:, 1 : 1 + length].contiguous(),
        "position_ids": position,
        "document_ids": torch.zeros_like(position),
        "next_ids": torch.stack(further, -1) if further else position.new_zeros(rows, length, 0),
    }


def stages(config: RunConfig, ranks: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured, in order: name and work."""
    engines = []
    yield "build", lambda: engines.append(build_engine(config, ranks))
    (engine,) = engines

    def micro_batch(last: bool) -> None:
        output = engine(random_batch(config, ranks.device), mode=config.attention_mode)
        engine.backward(torch.stack([loss for loss, _ in output.losses.values()]).sum(), last)

    for step in (1, 2):
        yield f"micro_1_of_step_{step}", lambda: micro_batch(last=False)
        yield f"micro_2_of_step_{step}", lambda: micro_batch(last=True)
        yield f"step_{step}", lambda: engine.step(1e-4, measure=True)


def measure(overrides: list[str]) -> dict[str, Any]:
    """One case on this rank; bytes, and the prediction over the measured peak."""
    config = compose(overrides)
    tokens = config.train.seq_len * config.train.micro_batch
    ranks = join("cuda")
    config = replace(config, train=replace(config.train, batch_tokens=2 * tokens * ranks.world))
    memory = predict(config, ranks.world, bucket_bytes(config, ranks))
    found: dict[str, Any] = {"case": " ".join(overrides), "world": ranks.world}
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"predicted": asdict(memory), "predicted_total": memory.total, "error": None}
    peaks: dict[str, dict[str, int]] = {}
    try:
        for name, work in stages(config, ranks):
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            peaks[name] = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "left": torch.cuda.memory_allocated(),
            }
    except torch.OutOfMemoryError as error:
        found["error"] = str(error).splitlines()[0]
    found["measured"] = peaks
    found["measured_total"] = max(stage["allocated"] for stage in peaks.values())
    found["predicted_over_measured"] = round(memory.total / found["measured_total"], 4)
    return found if ranks.first else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    if not args.overrides:
        out = ["--out", str(args.out)] if args.out else []
        for case in CASES:
            subprocess.run([sys.executable, "-m", "tests.bench.memory", *out, *case.split()], check=False)
        return
    found = measure(args.overrides)
    if not found:
        return
    line = json.dumps(found)
    print(line, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
