"""What DeepSpeed's engine costs over the bare one: seconds and memory of whole optimizer steps on one GPU.

    python -m tests.bench.engine --model ref_1b7 --batch 2 --accumulate 16 --out FILE

Every engine has a process of its own, one after the other: the bare TorchEngine, ZeRO 1 and ZeRO 2. All train
the same initial weights (without MTP) on the same uniformly random tokens in bf16 with fp32 accumulation and
Muon; routing is learned. Times are medians over steps between CUDA events, split into micro-batches and the
optimizer step; losses are reported so that it can be seen that all three compute the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from configs.compose import compose
from model.init import initialize
from model.model import ForCausalLM
from tests.bench.train_step import random_batch
from train.config import RunConfig
from train.engine import Engine, TorchEngine
from train.ranks import join
from train.zero import ZeroEngine

ENGINES = ("torch", "zero1", "zero2")


def build(name: str, config: RunConfig, device: torch.device) -> Engine:
    with device:
        model = initialize(ForCausalLM(config.model), 0)
    options = (config.optim, torch.bfloat16)
    compiled = config.train.compile
    return (
        TorchEngine(model, *options, compiled)
        if name == "torch"
        else ZeroEngine(model, *options, stage=int(name[-1]), compiled=compiled)
    )


def steps(engine: Engine, config: RunConfig, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    """Medians in seconds, peaks in GiB."""
    rows, tokens = config.train.micro_batch, config.train.batch_tokens
    torch.manual_seed(0)
    batch = {k: v.to(device) for k, v in random_batch(config, tokens // config.train.seq_len).items()}
    micros = [
        {k: v[i : i + rows] for k, v in batch.items()} for i in range(0, tokens // config.train.seq_len, rows)
    ]
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(warmup + steps):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        total = torch.zeros((), device=device)
        for number, micro in enumerate(micros, start=1):
            parts = engine(micro).losses
            loss = (parts["lm"][0] + 1e-4 * parts["balance"][0]) / tokens
            engine.backward(loss, number == len(micros))
            total += loss.detach()
        events[1].record()
        engine.step(1e-4)
        events[2].record()
        events[2].synchronize()
        times.append((events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3))
        losses.append(total.item())
    counted = times[warmup:]
    micro, update = (statistics.median(column) for column in zip(*counted))
    return {
        "seconds": statistics.median(a + b for a, b in counted),
        "micro_batches_s": micro,
        "optimizer_s": update,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ref_1b7")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=16, help="micro-batches of a step")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, help="only this one, in this process")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    if args.engine is None:
        for name in ENGINES:
            subprocess.run([sys.executable, "-m", "tests.bench.engine", *sys.argv[1:], "--engine", name])
        return
    config = compose(
        [
            "experiment=ref_1b7",
            f"model={args.model}",
            "model.num_nextn_predict_layers=0",
            f"train.seq_len={args.seq_len}",
            f"train.micro_batch={args.batch}",
            f"train.batch_tokens={args.batch * args.accumulate * args.seq_len}",
            f"train.compile={str(args.compile).lower()}",
        ]
    )
    ranks = join("cuda")
    result: dict[str, Any] = {"engine": args.engine, "model": args.model, "batch": args.batch}
    result |= {"accumulate": args.accumulate, "seq_len": args.seq_len, "compile": args.compile}
    result |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    try:
        result |= steps(
            build(args.engine, config, ranks.device), config, ranks.device, args.warmup, args.steps
        )
        result["tokens_per_s"] = config.train.batch_tokens / result["seconds"]
    except torch.OutOfMemoryError as error:
        result["error"] = str(error).splitlines()[0]
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})
    print(line, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
