"""Tokens per second of whole training steps on one GPU, beside transformers on the same shape.

    python -m tests.bench.train_step --model ref_1b7 --seq-len 4096 --batch 1 2 [--compile] [--no-peer]

A step is `--accumulate` micro-batches of `--batch` sequences and one optimizer step. All sides: bf16
compute, uniformly random tokens, learned routing (nothing forced), no MTP (transformers has none), weights
drawn by each side's own initialisation, the same process, one after the other. Fourfold: TorchEngine with
fp32 masters, Muon, balance loss and bias update; `--reference` adds it with torch's operations in place of
our kernels, `--anticipate` with experts that a forward pass chose beforehand, as after a spike
(`train.recovery`), `--precision` in FP8 or FP4. transformers: eager attention, grouped_mm experts and fused
AdamW on bf16 weights. Times are medians over steps between CUDA events, after warm-up. MFU is over the GPU's
dense bf16 peak with `model.flops` for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from configs.compose import compose
from model.flops import training_flops_per_token
from model.init import initialize
from model.kernels import gpu
from model.model import ForCausalLM
from train.config import RunConfig
from train.engine import TorchEngine
from train.loop import micro_batches, train_step
from train.metrics import peak_flops
from train.ranks import Ranks
from train.recovery import choose_experts

CUDA = torch.device("cuda")


def timed(step: Callable[[int], Any], warmup: int, steps: int) -> dict[str, float]:
    """Median seconds of `step(i)` and peak memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(warmup + steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    counted = times[warmup:]
    return {
        "seconds": statistics.median(counted),
        "spread": max(counted) / min(counted),
        "gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def random_batch(config: RunConfig, rows: int) -> dict[str, torch.Tensor]:
    length = config.train.seq_len
    ids = torch.randint(config.model.vocab_size, (rows, length + 1))
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(rows, -1),
        "document_ids": torch.zeros(rows, length, dtype=torch.int64),
        "next_ids": torch.zeros(rows, length, 0, dtype=torch.int64),
    }


def fourfold(
    config: RunConfig, rows: int, warmup: int, steps: int, anticipate: bool = False
) -> dict[str, float]:
    with CUDA:
        model = ForCausalLM(config.model)
    bf16, fp4 = torch.bfloat16, config.fp4_experts
    engine = TorchEngine(initialize(model, 0), config.optim, bf16, config.train.compile, fp4)
    engine.use(config.precision.at(0))
    batches, ranks = [random_batch(config, rows) for _ in range(4)], Ranks(0, 1, CUDA)

    def step(i: int) -> None:
        batch = batches[i % 4]
        routing = choose_experts(engine, batch, config, ranks) if anticipate else []
        train_step(engine, batch, config, i, ranks, routing=routing)

    return timed(step, warmup, steps)


def in_precision(keys: list[str], _: RunConfig, *arguments: Any) -> dict[str, float]:
    return fourfold(compose(keys), *arguments)


def reference(*arguments: Any) -> dict[str, float]:
    """`fourfold` as on a GPU that runs no kernels of ours."""
    with patch.object(gpu, "has_kernels", lambda device: False):
        return fourfold(*arguments)


def peer(config: RunConfig, rows: int, warmup: int, steps: int) -> dict[str, float]:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    hf = DeepseekV4Config(**config.model.to_hf())
    hf._experts_implementation = "grouped_mm"
    with CUDA:
        model = DeepseekV4ForCausalLM._from_config(hf, attn_implementation="eager", dtype=torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = [random_batch(config, rows) for _ in range(4)]

    def step(i: int) -> None:
        for micro in micro_batches(batches[i % 4], config.train.micro_batch):
            micro = {name: x.to(CUDA) for name, x in micro.items()}
            logits = model(micro["input_ids"], use_cache=False).logits.flatten(0, 1)
            torch.nn.functional.cross_entropy(logits.float(), micro["labels"].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, warmup, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ref_1b7")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--reference", action="store_true", help="also without our kernels")
    parser.add_argument("--anticipate", action="store_true", help="also with routing chosen beforehand")
    parser.add_argument(
        "--precision", nargs="*", default=[], choices=["fp8", "fp4_qat"], help="also in these"
    )
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    for rows in args.batch:
        keys = [
            "experiment=ref_1b7",
            f"model={args.model}",
            "model.num_nextn_predict_layers=0",
            f"train.seq_len={args.seq_len}",
            f"train.micro_batch={rows}",
            f"train.batch_tokens={rows * args.accumulate * args.seq_len}",
            f"train.compile={str(args.compile).lower()}",
        ]
        config = compose(keys)
        flops = training_flops_per_token(config.model, args.seq_len, indexer_trains=config.indexer_loss).total
        sides: dict[str, Callable[..., dict[str, float]]] = {"fourfold": fourfold}
        if args.reference:
            sides["fourfold without kernels"] = reference
        if args.anticipate:
            sides["fourfold, anticipating"] = partial(fourfold, anticipate=True)
        for name in args.precision:
            sides[f"fourfold, {name}"] = partial(in_precision, [*keys, f"precision={name}"])
        if not args.no_peer:
            sides["transformers"] = peer
        for name, side in sides.items():
            result: dict[str, Any] = {
                "side": name,
                "model": args.model,
                "seq_len": args.seq_len,
                "batch": rows,
            }
            result |= {"accumulate": args.accumulate, "compile": args.compile and name != "transformers"}
            result |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            try:
                result |= side(config, rows * args.accumulate, args.warmup, args.steps)
                result["tokens_per_s"] = config.train.batch_tokens / result["seconds"]
                result["mfu"] = flops * result["tokens_per_s"] / (peak_flops(CUDA) or float("nan"))
            except torch.OutOfMemoryError:
                result["error"] = "out of memory"
            torch.cuda.empty_cache()
            torch.compiler.reset()
            line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
