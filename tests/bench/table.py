"""Benchmark results as Markdown tables, one for each kind of result in the files:

python -m tests.bench.table tests/bench/results/*_h100_*.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Row = tuple[str, ...]

SPEED = ("model", "sequence", "rows × steps", "side", "tokens/s", "MFU", "peak memory", "hardware")
ENGINE = ("model", "rows × steps", "engine", "seconds a step", "over torch", "optimizer", "peak memory")
DATA = ("data", "measured", "of")
MEMORY = ("configuration", "predicted", "measured", "predicted / measured")
KERNELS = ("kernel", "ms", "TFLOP/s or GB/s", "beside", "ratio", "hardware")
ATTENTION = ("attention", "tokens", "heads", "forward", "backward", "torch takes", "transformers takes")
INDEXER = ("indexer and pooling", "ms", "TFLOP/s or GB/s", "torch or a copy takes")
MESHES = ("configuration", "GPUs", *MEMORY[1:], "seconds a step", "tokens/s", "hardware")
SPEEDS = ("seconds a step", "tokens/s a GPU", "of one GPU's", "MFU", "peak memory", "NCCL, exposed")
PARALLEL = ("what", "GPUs", *SPEEDS, "hardware")
HOST = ("throughput", "context", "checkpoint", "reshard")  # kinds of `tests.bench.parallel`
SAVES = ("GPUs", "checkpoint", "written in", "stall", "step", "steps beside it", "hardware")
RECOMPUTE = ("configuration", "train.recompute", *MEMORY[1:], "seconds a step", "tokens/s")


def speed_row(result: Result) -> Row:
    """Of `tests.bench.train_step`."""
    side = result["side"] + (", compiled" if result["compile"] else "")
    shape = f"{result['batch']} × {result['accumulate']}"
    speed = ("out of memory", "", "")
    if "error" not in result:
        speed = (f"{result['tokens_per_s']:,.0f}", f"{result['mfu']:.1%}", f"{result['gib']:.1f} GiB")
    hardware = f"{result['device']}, torch {result['torch']}"
    return (result["model"], str(result["seq_len"]), shape, side, *speed, hardware)


def engine_row(result: Result, bare: Result) -> Row:
    """Of `tests.bench.engine`, beside the bare engine's result of the same shape."""
    model = result["model"] + (", compiled" if result["compile"] else "")
    shape = f"{result['batch']} × {result['accumulate']}"
    if "error" in result:
        return (model, shape, result["engine"], "out of memory", "", "", "")
    times = f"{result['seconds']:.3f}", f"{result['seconds'] / bare['seconds']:.3f}"
    return (
        model,
        shape,
        result["engine"],
        *times,
        f"{result['optimizer_s']:.3f}",
        f"{result['gib']:.1f} GiB",
    )


def memory_row(result: Result) -> Row:
    """Of `tests.bench.memory`."""
    predicted, measured = (f"{result[f'{kind}_total'] / 2**30:.2f} GiB" for kind in ("predicted", "measured"))
    if result["error"]:
        return (result["case"], predicted, "out of memory", "")
    return (result["case"], predicted, measured, f"{result['predicted_over_measured']:.3f}")


def recompute_row(result: Result) -> Row:
    """Of `tests.bench.memory --recompute`."""
    case, how = result["case"].rsplit(" train.recompute=", 1)
    speed = ("", "")
    if not result["error"]:
        speed = (f"{result['seconds']:.3f}", f"{result['tokens_per_s']:,.0f}")
    return (case, how, *memory_row(result)[1:], *speed)


def kernel_row(result: Result) -> Row:
    """Of `tests.bench.kernels`."""
    part, time = result["part"], result["ms"]
    if part == "casts":
        speed, beside, ratio = f"{result['gb_per_s']:,.0f} GB/s", "a copy of as many bytes", "over_floor"
    elif part == "dense":
        what = f"scales by row, {result['rowwise_tflops']:,.0f} TFLOP/s"
        speed, beside, ratio = f"{result['tflops']:,.0f} TFLOP/s", what, "of_rowwise"
    elif part == "grouped":
        what = f"bf16, {result['bf16_tflops']:,.0f} TFLOP/s"
        speed, beside, ratio = f"{result['tflops']:,.0f} TFLOP/s", what, "over_bf16"
    else:
        speed, beside, ratio = "", f"bf16, {result['bf16_ms']:.2f} ms", "over_bf16"
    how = "of its time" if part == "casts" else "as fast"
    name = f"{part}: {result['case'].replace('^3', '³')}"
    return (name, f"{time:.3f}", speed, beside, f"{result[ratio]:.2f} × {how}", result["device"])


def attention_rows(results: list[Result]) -> list[Row]:
    """Of `tests.bench.attention`: forward and backward of every case, and how much longer peers take."""
    cases: dict[tuple[Any, ...], Result] = {}
    for result in (r for r in results if r.get("part") != "tune"):
        case = cases.setdefault((result["case"], result["length"], result["heads"]), {})
        case[result.get("peer") or result.get("part") or "ours"] = result
    rows = []
    for (name, length, heads), case in cases.items():
        ours = case["ours"]
        speeds = (
            f"{ours[f'{way}_ms']:.2f} ms, {ours[f'{way}_tflops']:.0f} TFLOP/s"
            for way in ("forward", "backward")
        )
        peers = (case.get(peer) for peer in ("torch", "transformers"))
        times = (
            "" if peer is None else peer.get("error") or
            f"{peer['forward_over']:.1f} ×, {peer['backward_over']:.1f} ×"
            for peer in peers
        )  # fmt: skip
        rows.append((name.replace("_", " "), f"{length:,}", str(heads), *speeds, *times))
    return rows


def indexer_row(result: Result) -> Row:
    """Of `tests.bench.indexer`."""
    pooled = result["part"] == "pooling"
    speed = f"{result['gb_per_s']:,.0f} GB/s" if pooled else f"{result['tflops']:.0f} TFLOP/s"
    peer = result["over_floor"] if pooled else result.get("over_reference")
    beside = "" if peer is None else f"{1 / peer if pooled else peer:.2f} ×"
    return (f"{result['part']}: {result['case']}", f"{result['ms']:.3f}", speed, beside)


def mesh_row(result: Result) -> Row:
    """Of `tests.bench.memory` under torchrun, or beside it in one file."""
    speed = (f"{result['seconds']:.3f}", f"{result['tokens_per_s']:,.0f}")
    return (result["case"], str(result["world"]), *memory_row(result)[1:], *speed, result["device"])


def parallel_row(result: Result, alone: Result | None) -> Row:
    """Of `tests.bench.parallel throughput` and `context`, and the same on one GPU."""
    name = result.get("precision") or f"{result['seq_len']:,} tokens, {result['mode']}"
    name = " ".join(filter(None, [result["bench"], name, result["case"]]))
    nccl, exposed = (result.get(f"seconds/nccl{part}") for part in ("", "_exposed"))
    return (
        name,
        str(result["world"]),
        f"{result['seconds/step']:.3f}",
        f"{result['tokens_per_s_gpu']:,.0f}",
        f"{result['tokens_per_s_gpu'] / alone['tokens_per_s_gpu']:.2f}" if alone else "",
        f"{result['mfu']:.1%}" if "mfu" in result else "",
        f"{result['memory_allocated_gib']:.1f} GiB" if "memory_allocated_gib" in result else "",
        f"{nccl:.3f} s, {exposed:.3f} s" if nccl is not None else "",
        result["device"],
    )


def parallel_rows(results: list[Result]) -> list[Row]:
    """With more than one GPU beside one; what did not fit is left out."""
    results = [r for r in results if r["bench"] in ("throughput", "context") and "error" not in r]
    keys = ("bench", "case", "precision", "seq_len", "device")
    alone = {tuple(map(r.get, keys)): r for r in results if r["world"] == 1}
    return [parallel_row(r, alone.get(tuple(map(r.get, keys)))) for r in results]


def save_row(result: Result) -> Row:
    """Of `tests.bench.parallel checkpoint`."""
    names = ("save", "stall", "step")
    written, stall, step = (f"{result[f'seconds/{name}']:.3f} s" for name in names)
    beside = ", ".join(f"{seconds:.3f}" for seconds in result["seconds/steps_beside"])
    size = f"{result['gb']:.2f} GB"
    return (str(result["world"]), size, written, stall, step, f"{beside} s", result["device"])


def data_rows(result: Result) -> list[Row]:
    """Of `tests.bench.data`."""
    hardware = f"one core of {result['machine']}"
    if result["kind"] == "tokenize":
        fuzz = f"{result['strings_that_differ']} of {result['strings_compared']:,} strings have other ids"
        ours = (f"{result['mb_per_s']:.1f} MB/s", f"{result['megabytes']:.0f} MB of text, {hardware}")
        theirs = (f"{result['tokenizers_mb_per_s']:.1f} MB/s", fuzz)
        return [("V4's tokenizer, with `tiktoken`", *ours), ("V4's tokenizer, with `tokenizers`", *theirs)]
    if result["kind"] == "assemble":
        what = f"batches of 64 × {result['seq_len']:,}, checksums verified"
        speed = f"{result['mtok_per_s']:.1f} Mtok/s ({result['with_planning_mtok_per_s']:.1f} with planning)"
        return [(what, speed, hardware)]
    if result["kind"] == "padding":
        what = f"padding at {result['seq_len']:,} tokens"
        return [(what, f"{result['padding']:.3%}", f"an epoch of {result['tokens']:,} tokens")]
    if result["kind"] == "resume":
        what = f"{result['documents']:,} documents, a fresh process, {result['state_bytes']} bytes of state"
        return [("first batch of a resumed run", f"{result['first_batch_s']:.2f} s", what)]
    first, more = (f"{result[f'{name}_s_4096']:.2f} s" for name in ("first_window", "window"))
    size = f"{result['documents']:,} documents, {result['tokens'] / 1e9:.0f} G tokens"
    memory = f"{result['index_gb']:.1f} GB of index"
    return [("plan at 4,096 tokens", f"{more} for 8M tokens, {first} for the first", f"{size}, {memory}")]


def print_table(columns: Row, rows: Iterable[Row]) -> None:
    """Nothing where there are no rows."""
    if rows := list(rows):
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")


def main(paths: list[str]) -> None:
    files = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in paths]
    whole = [result for file in files for result in file if result.get("bench") in HOST]
    files = [[result for result in file if result not in whole] for file in files]
    attention, indexer = (
        [result for file in files for result in file if result.get("bench") == name]
        for name in ("attention", "indexer")
    )
    files = [[result for result in file if result not in attention + indexer] for file in files]
    kernels = [result for file in files for result in file if "part" in result]
    meshes = [file for file in files if any(result.get("world", 1) > 1 for result in file)]
    results = [result for file in files if file not in meshes for result in file]
    engines = [result for result in results if "engine" in result]
    bare = {(r["model"], r["batch"], r["compile"]): r for r in engines if r["engine"] == "torch"}
    print_table(SPEED, (speed_row(result) for result in results if "side" in result))
    print_table(ENGINE, (engine_row(r, bare[r["model"], r["batch"], r["compile"]]) for r in engines))
    print_table(DATA, (row for result in results if "machine" in result for row in data_rows(result)))
    memory = [result for result in results if "predicted_total" in result]
    compared = [result for result in memory if " train.recompute=" in result["case"]]
    print_table(MEMORY, (memory_row(result) for result in memory if result not in compared))
    print_table(KERNELS, map(kernel_row, kernels))
    print_table(ATTENTION, attention_rows(attention))
    print_table(INDEXER, (indexer_row(result) for result in indexer if result["part"] != "tune"))
    print_table(MESHES, (mesh_row(result) for file in meshes for result in file))
    print_table(PARALLEL, parallel_rows(whole))
    print_table(SAVES, (save_row(result) for result in whole if "gb" in result))
    print_table(RECOMPUTE, (recompute_row(result) for result in compared))


if __name__ == "__main__":
    main(sys.argv[1:])
