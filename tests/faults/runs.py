"""A run with its faults, started again until it is through, and what has to be true of it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from configs import compose
from tests.e2e.runs import options
from tests.faults.inject import Injector, forget_biases, mark_of, replace
from tests.faults.jobs import Ended, launch
from tests.faults.plan import STEPS, Plan
from train import checkpoint

CHANGES = [
    f"train.steps={STEPS}",
    "train.eval_every=100",
    "train.sample_tokens=0",
    "train.bias_update_rate=0.01",  # biases matter within these steps, and none is back at 0
    "resume=auto",
]
# What is printed when a fault has happened; a kill of all leaves nobody to say it.
SAYS = {
    "kill": "rank {rank} is gone: killed",
    "term": "stopped after step|told to end",
    "usr1": "stopped after step {step}, saved",
    "torn": "is skipped: ",
    "flip": "is skipped: ",
    "replica": "is not the same on rank",
    "nan": "not finite",
    "full": "free space, then go on with resume=auto",
    "freeze": "rank {rank} is not answering",
}


@dataclass(frozen=True)
class Result:
    """What became of a run: `wrong` is empty where all is as it has to be."""

    plan: Plan
    restarts: int  # from a checkpoint
    seconds: float
    wrong: str
    said: tuple[str, ...]  # the lines that tell how the run went


class Scratch:
    """Where runs are: below `folder`, with a text to train on."""

    def __init__(self, folder: Path):
        self.folder, self.corpus = folder, folder / "corpus"
        self.corpus.mkdir(parents=True, exist_ok=True)
        for number in range(60):
            words = ["root", "sum", "cube"] * 12
            lines = [f"The {word} of number {number} is {number * k}." for k, word in enumerate(words)]
            (self.corpus / f"{number}.txt").write_text("\n".join(lines))

    def run(self, number: int) -> Path:
        return self.folder / "runs" / f"run-{number}"


def carry_out(plan: Plan, scratch: Scratch, broken: bool = False) -> Result:
    """Start jobs until one is through, then judge."""
    began, folder, marks = time.monotonic(), scratch.run(plan.number), scratch.folder / f"marks-{plan.number}"
    marks.mkdir()
    argv = [*options(scratch.corpus, folder.parent), *CHANGES, *plan.options, f"run.name={folder.name}"]

    config = compose.compose(argv)

    def setup() -> None:
        replace((compose, "compose", lambda *_: config))
        Injector(plan.faults, marks, folder, plan.max_restarts is None).install()
        if broken:
            forget_biases()

    ended: list[Ended] = []
    while len(ended) <= len(plan.faults) and not (ended and ended[-1].code == 0 and _through(folder)):
        ended.append(launch(argv, plan.ranks, plan.max_restarts, setup))
    (scratch.folder / f"output-{plan.number}.txt").write_text("\n".join(job.output for job in ended))
    wrong = _judge(plan, ended, folder, marks, scratch.run(-plan.ranks))
    lines = [line for job in ended for line in job.output.splitlines()]
    said = tuple(line for line in lines if re.match("error: |warning: |resume  |stopped after", line))
    starts = sum(line.startswith("resume  ") for line in said)
    return Result(plan, starts, time.monotonic() - began, wrong, said)


def _through(folder: Path) -> bool:
    return (folder / "model").is_dir() and (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir()


def _judge(plan: Plan, ended: list[Ended], folder: Path, marks: Path, expected: Path) -> str:
    """The first thing that is not as it has to be; "" if there is none."""
    if ended[-1].code or not _through(folder):
        last = ended[-1].output.strip().splitlines()[-1:]
        return f"not through after {len(ended)} jobs, exit code {ended[-1].code}: {last}"
    output = "".join(job.output for job in ended)
    for fault in plan.faults:
        if not mark_of(fault, marks).exists():
            return f"{fault} did not happen"
        says = SAYS.get(fault.kind, "").format(rank=fault.rank, step=mark_of(fault, marks).read_text())
        if not re.search(says, output):
            return f"nothing was said about {fault}"
    left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    if left:
        return f"{left[0]} was left over"
    return _difference(folder, expected)


def _difference(folder: Path, expected: Path) -> str:
    """Between the last checkpoints and metrics of a run and the uninterrupted one, to the bit."""
    ends = [checkpoint.all_steps(run / "checkpoints")[-1] for run in (expected, folder)]
    checkpoint.verify(ends[1])
    with checkpoint.open_tensors(ends[0]) as whole, checkpoint.open_tensors(ends[1]) as found:
        if whole.keys() != found.keys():
            return f"{min(whole.keys() ^ found.keys())} is in one of {ends[0]}, {ends[1]}"
        for key in sorted(whole):
            if not whole[key].equal(found[key]):
                return f"{key} differs from the uninterrupted run's"
    same = (folder / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    return "" if same else "metrics.jsonl differs from the uninterrupted run's"
