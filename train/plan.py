"""`python -m train.plan`: memory and traffic of a run over any number of ranks; nothing is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from configs.compose import compose
from configs.errors import ConfigError
from model.kernels.gpu import planned_for_kernels
from model.precision import products
from train import cli
from train.build import mesh_of
from train.memory import GIB, bucket_bytes, predict
from train.memory import table as memory_table
from train.parallel.volume import volume
from train.sections import PrecisionConfig

HELP = """\
What a run will need and send, from shapes alone: python -m train.plan ranks=N [KEY=VALUE ...]

  ranks=N        how many ranks; the other arguments are those of python -m train
  gpu_gib=79     memory of one GPU, in GiB: 79 of an 80 GB H100 are free
  gpu=hopper     what it is: hopper and newer run Fourfold's kernels; older ones torch's operations

First come the numbers that matrix products multiply: activation or gradient, then weight or activation, FP8
and FP4 with the block that shares a scale. Memory is that of the rank with most; routing is taken to be
balanced. Traffic is what all ranks together put into collectives in one step of the last phase
(train/README.md, "What travels").

Examples:
  python -m train.plan ranks=8 experiment=ref_1b7 parallel=ep8
  python -m train.plan ranks=64 model=v4_flash data=python_v4 precision=bf16 parallel=ep8 \\
      train.seq_len=4096 train.batch_tokens=4194304 train.micro_batch=1 train.recompute=selective
"""


@dataclass(frozen=True)
class Options:
    """The command's own arguments; see HELP."""

    ranks: int
    gpu_gib: float = 79.0
    gpu: str = "hopper"

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"ranks is {self.ranks}; it must be 1 or more")
        if self.gpu not in ("hopper", "older"):
            raise ConfigError(f"gpu is {self.gpu!r}; it must be hopper or older")


def main(argv: list[str]) -> None:
    others: list[str] = []
    options = cli.read(Options, argv, others)
    config = compose(others)
    config = config.at(config.train.steps)
    config.check_ranks(options.ranks)
    mesh = mesh_of(config, options.ranks)
    buckets = bucket_bytes(config, mesh, torch.device("cuda"))
    console = Console(highlight=False)
    console.print(precision_table(config.precision))
    with planned_for_kernels(options.gpu == "hopper" and config.train.device != "cpu"):
        memory = predict(config, mesh, buckets)
    console.print(memory_table(memory, round(options.gpu_gib * GIB)))
    found, tokens = volume(config, mesh), config.train.batch_tokens
    rows = Table("sent in a step", "GB", "MB a rank", "kB a token", title="traffic", title_justify="left")
    for purpose, count in (*found.items(), ("all", sum(found.values()))):
        per = (count / 1e9, count / options.ranks / 1e6, count / tokens / 1e3)
        rows.add_row(purpose, *(f"{number:,.3f}" for number in per))
    console.print(rows)


def precision_table(precision: PrecisionConfig) -> Table:
    """The operands of every matrix product once all of `precision` is in effect."""
    since = f", from step {precision.qat_start} on" if precision.qat_start else ""
    table = Table(
        "product", "forward", "gradient of input", "of weight", title=f"precision: {precision.name}{since}"
    )
    table.title_justify = "left"
    for row in products(precision.at(precision.qat_start), precision.compute_dtype):
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1:], HELP, main))
