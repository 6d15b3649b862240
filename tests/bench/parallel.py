"""Whole training steps on all GPUs of a host: speed and communication, long sequences, checkpoints.

    torchrun --nproc-per-node N -m tests.bench.parallel throughput [KEY=VALUE ...] [--precision bf16 fp4_qat]
    torchrun --nproc-per-node N -m tests.bench.parallel context [KEY=VALUE ...] [--lengths 131072 262144]
    torchrun --nproc-per-node N -m tests.bench.parallel checkpoint [KEY=VALUE ...] [--folder DIR]
    python -m tests.bench.parallel reshard [KEY=VALUE ...] [--ranks N] [--folder DIR]

throughput   four layers of V4-Flash (sliding with hash routing, CSA, HCA, CSA), experts over all ranks, as
             many on each for every N: N = 1 is what others are compared to (weak scaling)
context      `nano`, whose heads have V4's size, every sequence over all ranks; one length after the other
checkpoint   `nano`: steps without a save in flight, and beside an asynchronous one
reshard      `python -m train` on N ranks, gone on with N / 2, then N ranks again, beside a run that was not
             interrupted: real text, the losses of every step

KEY=VALUE are Hydra overrides, as for training; --out FILE appends what is printed. Random tokens, one batch
for all steps; routing is learned, never forced, so experts' loads are what they come to. One JSON line for
each measurement, of the first rank: medians of steps after warm-up, the peak that torch allocated, losses
of the first and the last step. Communication is of one more step, under torch.profiler: `nccl` are the
seconds with some NCCL kernel on the GPU, waiting for the other ranks included, `exposed` those of them in
which nothing else ran there; by kind, SendRecv is the rows on their way to experts and back, Reduce and
AllReduce mostly ZeRO's gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from configs.compose import compose
from model.flops import training_flops_per_token
from model.precision import NAMED
from tests.bench.memory import random_batch
from train.build import build_engine, make_mesh
from train.checkpoint import all_steps, read_manifest
from train.config import RunConfig
from train.engine import Batch, Engine
from train.loop import train_step
from train.memory import GIB, bucket_bytes, predict
from train.metrics import Timer, memory, peak_flops, read_lines
from train.parallel.mesh import Mesh
from train.ranks import Ranks, join
from train.saving import Saver

Result = dict[str, Any]
Interval = tuple[float, float]

LAYERS = {"s": "sliding_attention", "c": "compressed_sparse_attention", "h": "heavily_compressed_attention"}
SHORT = ["train.compile=false", "train.steps=1000", "optim.warmup_steps=10"]
MOST = 200  # steps beside one save


def throughput_keys(world: int, layers: str = "schc", experts: int = 16) -> list[str]:
    """Layers of V4-Flash, the first one with hash routing, and so many experts on each rank."""
    types = ",".join(LAYERS[kind] for kind in layers)
    routers = ",".join(["hash_moe"] + ["moe"] * (len(layers) - 1))
    return [
        "experiment=v4_flash",
        "precision=fp4_qat",  # prepares for all: `Engine.use` chooses
        "parallel=zero",
        f"parallel.ep={world}",
        f"model.num_hidden_layers={len(layers)}",
        f"model.layer_types=[{types}]",
        f"model.mlp_layer_types=[{routers}]",
        f"model.n_routed_experts={experts * world}",
        "model.num_nextn_predict_layers=0",
        "train.seq_len=4096",
        "train.recompute=none",
        *SHORT,
    ]


def context_keys(world: int) -> list[str]:
    nano = ["experiment=nano", "parallel=zero", f"parallel.cp={world}", "train.micro_batch=1"]
    return [*nano, "train.recompute=full", *SHORT]


@dataclass
class Job:
    """A run without data and folder: its engine on this rank."""

    config: RunConfig
    ranks: Ranks
    mesh: Mesh
    engine: Engine

    @classmethod
    def build(cls, overrides: list[str], ranks: Ranks) -> Job:
        config = compose(overrides)
        config.check_ranks(ranks.world)
        mesh = make_mesh(config, ranks)
        return cls(config, ranks, mesh, build_engine(config, ranks.device, mesh))

    def at(self, micros: int, length: int | None = None) -> RunConfig:
        """The configuration with so many micro-batches on a rank, and sequences of this length."""
        length = length or self.config.train.seq_len
        tokens = micros * self.config.train.micro_batch * length * self.mesh.data_world
        return replace(
            self.config, train=replace(self.config.train, seq_len=length, batch_tokens=tokens, log_every=1000)
        )

    def batch(self, config: RunConfig) -> Batch:
        """Ranks that share sequences out take the same."""
        torch.manual_seed(self.mesh.data_rank)
        rows = config.train.batch_tokens // (config.train.seq_len * self.mesh.data_world)
        return random_batch(config, rows, self.ranks.device)

    def steps(self, config: RunConfig, batch: Batch) -> Iterator[dict[str, float]]:
        """Endlessly: losses and `seconds/…` of a step."""
        step = 0
        while True:
            timer = Timer(self.ranks.device)
            logged = train_step(self.engine, batch, config, step, self.ranks, timer)
            yield logged | timer.stop()
            step += 1


def measured(job: Job, config: RunConfig, warmup: int, steps: int) -> Result:
    """Speed, memory, losses and communication of steps of this configuration."""
    memory(job.ranks.device)  # forgets the peak
    running = job.steps(config, job.batch(config))
    done = [next(running) for _ in range(warmup + steps)]
    found: Result = {
        name: statistics.median(step[name] for step in done[warmup:])
        for name in ("seconds/step", "seconds/forward", "seconds/backward", "seconds/optimizer")
    }
    speed = config.train.batch_tokens / found["seconds/step"] / job.ranks.world
    flops = training_flops_per_token(
        config.model, config.train.seq_len, config.attention_mode, config.indexer_loss
    )
    found |= {"batch_tokens": config.train.batch_tokens, "tokens_per_s_gpu": speed}
    if peak := peak_flops(job.ranks.device):
        found["mfu"] = flops.total * speed / peak
    found |= memory(job.ranks.device)
    found |= {"first_loss": done[0]["lm"], "last_loss": done[-1]["lm"], "max_load": done[-1].get("max_load")}
    return found | communication(traced(running) if job.ranks.device.type == "cuda" else [])


def traced(running: Iterator[Any]) -> list[dict[str, Any]]:
    """What one more step does on the GPU: events of a Chrome trace."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        next(running)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return json.loads(Path(file.name).read_text())["traceEvents"]


def communication(events: Iterable[dict[str, Any]]) -> Result:
    """Seconds in NCCL's kernels, and of these without any other work on the GPU; in all and by kind."""
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy: list[Interval] = []
    taken: dict[str, list[Interval]] = defaultdict(list)
    for event in on_gpu:  # microseconds
        span, name = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6), event["name"]
        if not name.startswith("nccl"):
            busy.append(span)
            continue
        kind = re.split(r"[_(<]", f"{name}_")[1]  # such as ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)
        for key in ("nccl", f"nccl/{kind}"):
            taken[key].append(span)
    found = {f"seconds/{key}": covered(spans) for key, spans in taken.items()}
    found |= {
        f"seconds/{key}_exposed": covered([*spans, *busy]) - covered(busy) for key, spans in taken.items()
    }
    return found


def covered(spans: Iterable[Interval]) -> float:
    """Length of the union of these intervals."""
    length, until = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


def throughput(ranks: Ranks, options: argparse.Namespace) -> Iterator[Result]:
    """The precisions in turn, with one engine."""
    keys = [*throughput_keys(ranks.world, experts=options.experts), *options.overrides]
    job = Job.build(keys, ranks)
    config = job.at(options.micro_batches)
    need = predict(config, job.mesh, bucket_bytes(config, job.mesh, ranks.device)).total
    for name in options.precision:
        job.engine.use(NAMED[name])
        found = measured(job, config, options.warmup, options.steps)
        what = {"precision": name, "experts": config.model.n_routed_experts, "predicted_gib": need / GIB}
        yield what | {"micro_batch": config.train.micro_batch} | found


def context(ranks: Ranks, options: argparse.Namespace) -> Iterator[Result]:
    """The lengths in turn, with one engine."""
    job = Job.build([*context_keys(ranks.world), *options.overrides], ranks)
    for length in options.lengths:
        found = measured(job, job.at(1, length), options.warmup, options.steps)
        yield {"seq_len": length, "mode": job.config.attention_mode} | found


def checkpoint(ranks: Ranks, options: argparse.Namespace) -> Iterator[Result]:
    """The second save, for which memory on the host is there already, and the first one's stall."""
    job = Job.build(["experiment=nano", "parallel=zero", *SHORT, *options.overrides], ranks)
    config = job.at(options.micro_batches)
    running = job.steps(config, job.batch(config))
    saver = Saver(options.folder, keep_last=1, group=ranks.files)
    seconds = [next(running)["seconds/step"] for _ in range(options.warmup + options.steps)]
    first = saver.save(1, job.engine.state(), {})
    saver.wait()
    began = time.perf_counter()
    stall = saver.save(2, job.engine.state(), {})
    beside: list[float] = []
    while ranks.any(not saver.done) and len(beside) < MOST:
        beside.append(next(running)["seconds/step"])
    saver.wait()
    whole = time.perf_counter() - began  # up to the end of the step in which it was found complete
    (newest,) = all_steps(options.folder)
    yield {
        "gb": sum(file["bytes"] for file in read_manifest(newest)["files"].values()) / 1e9,
        "seconds/save": whole,
        "seconds/first_stall": first,
        "seconds/stall": stall,
        "seconds/step": statistics.median(seconds[options.warmup :]),
        "seconds/steps_beside": beside,
    }


def reshard(options: argparse.Namespace) -> Iterator[Result]:
    """Losses of six steps, two on each number of ranks, over those of six steps on N."""
    few = ["train.save_every=2", "train.eval_every=6", "train.log_every=1", "train.batch_tokens=16384"]
    few += ["train.seq_len=512", "train.micro_batch=4", "train.sample_tokens=0", "train.checksum_every=1"]
    few += ["optim=adamw", "optim.warmup_steps=0", "optim.decay_fraction=0"]
    n, folder = options.ranks, options.folder

    def train(name: str, ranks: int, steps: int, *more: str) -> float:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        keys = [*few, f"train.steps={steps}", f"run.dir={folder}", f"run.name={name}"]
        began = time.perf_counter()
        command = [sys.executable, *launcher, "-m", "train", *keys, *options.overrides, *more]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return time.perf_counter() - began

    train("straight", n, 6)
    seconds = [train("moved", ranks, 2 * i, "resume=auto") for i, ranks in enumerate((n, n // 2, n), start=1)]
    losses = [
        {line["step"]: line["lm"] for line in read_lines(folder / name / "metrics.jsonl") if "lm" in line}
        for name in ("straight", "moved")
    ]
    straight, moved = losses
    apart = max(abs(moved[step] / straight[step] - 1) for step in straight)
    yield {
        "world": n,
        "ranks": [n, n // 2, n],
        "losses": list(moved.values()),
        "apart": apart,
        "seconds": seconds,
    }


BENCHES = {"throughput": throughput, "context": context, "checkpoint": checkpoint}


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=[*BENCHES, "reshard"])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--precision", nargs="+", choices=NAMED, default=["bf16", "fp4_qat"])
    parser.add_argument("--experts", type=int, default=16, help="of a layer on each rank")
    parser.add_argument("--lengths", nargs="+", type=int, default=[131072, 262144])
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step on each rank")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2, help="of reshard")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written", default="runs/bench")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    return parser.parse_intermixed_args(argv)


def write(result: Result, options: argparse.Namespace) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = {"bench": options.bench, "case": " ".join(options.overrides)}
    line = json.dumps({**what, **result, "device": gpu, "torch": torch.__version__})
    print(line, flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    options = options_of(sys.argv[1:])
    if options.bench == "reshard":
        for result in reshard(options):
            write(result, options)
        return
    ranks = join("auto")
    try:
        for result in BENCHES[options.bench](ranks, options):
            if ranks.first:
                write({"world": ranks.world, **result}, options)
    except torch.OutOfMemoryError:
        write({"world": ranks.world, "rank": ranks.rank, "error": "out of memory"}, options)
        os._exit(1)  # the others wait in a collective: torchrun ends them


if __name__ == "__main__":
    main()
