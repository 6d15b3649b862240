"""`python -m tests.faults --runs N --seed S`: tiny runs that random faults happen to."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.plan import KINDS, STEPS, Plan, baseline, plan

os.environ["OMP_NUM_THREADS"] = "1"  # before torch


def parse(argv: list[str]) -> argparse.Namespace:
    kinds = "\n".join(f"  {kind:<11} {what}" for kind, what in KINDS.items())
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Trains tiny models for {STEPS} steps on one or two CPU ranks, has two or three random faults happen to every
run, and starts it again, by resume=auto or `torchrun --max-restarts`, until it ends. It passes if every fault
happened and was reported, and its last checkpoint (weights, moments, biases, random numbers) and its metrics
are bitwise those of a run that nothing happened to.""",
        epilog=f"""\
faults:
{kinds}

Faults, steps, places, ranks and options follow from --seed; only kill-moment depends on time. A run that
fails prints the command that repeats it alone; with --keep its output is in DIR/output-N.txt, its folder in
DIR/runs/run-N.

  python -m tests.faults --runs 50 --seed 1
  python -m tests.faults --seed 1 --only 17 --keep /tmp/seventeen
  python -m tests.faults --runs 2 --broken      what a bug looks like: exit code 1""",
    )
    parser.add_argument("--runs", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults (0)")
    parser.add_argument("--only", type=int, metavar="I", help="only run I of this seed")
    parser.add_argument(
        "--jobs",
        type=int,
        default=2 * (os.cpu_count() or 1),
        metavar="J",
        help="runs at once (twice the cores)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep everything in this new folder")
    parser.add_argument("--broken", action="store_true", help="do not restore routers' biases")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit code: 0 if all runs passed, else 1."""
    arguments = parse(argv)
    numbers = range(arguments.runs) if arguments.only is None else [arguments.only]
    plans = [plan(arguments.seed, number) for number in numbers]
    with tempfile.TemporaryDirectory() as temporary:
        return carry_all_out(plans, arguments.keep or Path(temporary), arguments.jobs, arguments.broken)


def carry_all_out(plans: list[Plan], folder: Path, jobs: int, broken: bool) -> int:
    """Run the plans after one uninterrupted run for each number of ranks, and report."""
    from tests.faults.runs import Result, Scratch, carry_out  # imports torch

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    scratch = Scratch(folder)
    whole = [baseline(plans[0].seed, ranks) for ranks in sorted({plan.ranks for plan in plans})]
    table = Table("run", "ranks", "under", "faults", "restarts", "seconds", "result")
    results: list[Result] = []
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for result in pool.map(partial(carry_out, scratch=scratch), whole):
            if result.wrong:
                console.print(f"the uninterrupted run of {result.plan.ranks} ranks: {result.wrong}")
                return 1
        for result in pool.map(partial(carry_out, scratch=scratch, broken=broken), plans):
            results.append(result)
            table.add_row(*row(result.plan, result.restarts, result.seconds, result.wrong))
    console.print(table)
    failed = [result for result in results if result.wrong]
    for result in failed:
        number, seed = result.plan.number, result.plan.seed
        console.print(f"run {number}: {result.wrong}")
        for line in result.said:
            console.print(f"  {line}", soft_wrap=True)
        console.print(
            f"  seed {seed}; again: python -m tests.faults --seed {seed} --only {number}", soft_wrap=True
        )
    console.print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def row(plan: Plan, restarts: int, seconds: float, wrong: str) -> Iterable[str]:
    under = "-" if plan.max_restarts is None else f"torchrun, {plan.max_restarts} restarts"
    faults = ", ".join(map(str, plan.faults))
    return (
        str(plan.number),
        str(plan.ranks),
        under,
        faults,
        str(restarts),
        f"{seconds:.0f}",
        "failed" if wrong else "passed",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
