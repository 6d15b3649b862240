"""What happens to a run: a pure function of a seed and the run's number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

STEPS = 8
# Where a rank may be killed: in a step, in a save, while it resumes, and after its last step.
PLACES = ("step", "backward", "update", "write", "publish", "published", "load", "finish")
TWO_RANKS = {"kill", "freeze", "replica"}  # these show something only where another rank is
KINDS = {
    "kill": "kill -9 of one of two ranks, at some place of a step or of a save",
    "kill-all": "kill -9 of all processes at such a place",
    "kill-moment": "the same up to half a second after a step began",
    "term": "SIGTERM to torchrun, or to the only process",
    "usr1": "SIGUSR1 to one rank",
    "torn": "a file of the newest checkpoint cut off, or missing, and kill -9 of all",
    "flip": "a bit of such a file flipped, and kill -9 of all",
    "replica": "a bit of one rank's weights or buffers flipped (train.checksum_every=1)",
    "nan": "a loss that is NaN on one rank, once",
    "full": "no file may grow beyond a size (RLIMIT_FSIZE): write(2) fails in the kernel, as on a full disk",
    "freeze": "SIGSTOP of one of two ranks",
}


@dataclass(frozen=True)
class Fault:
    """What `rank` does to itself, or to all, when it comes to `place`, from `step` (counted from 1) on and
    after the run's faults of lower `number`; `skip`: so often it passes there first. `dice`: which file, ...
    """

    number: int
    kind: str
    step: int
    rank: int
    place: str
    skip: int
    dice: int

    def __str__(self) -> str:
        who = f" rank {self.rank}" if self.kind in TWO_RANKS | {"usr1", "nan", "full"} else ""
        where = self.place if self.place in ("load", "finish") else f"{self.step}"
        where += f" {self.place}" if self.place not in ("step", where) and self.kind != "nan" else ""
        return f"{self.kind}{who} @{where}"


@dataclass(frozen=True)
class Plan:
    """A run of `ranks` processes, under torchrun with `max_restarts` or (None) by themselves."""

    seed: int
    number: int
    ranks: int
    max_restarts: int | None
    options: tuple[str, ...]
    faults: tuple[Fault, ...]


def plan(seed: int, number: int) -> Plan:
    """The plan of run `number`. Runs deal all kinds out in turn, so that few runs have every one."""
    dice = random.Random(f"{seed}/{number}")
    kinds = _dealt(seed, 2 * number, 2) + dice.choices(list(KINDS), k=dice.randint(0, 1))
    ranks = 2 if TWO_RANKS & set(kinds) else dice.randint(1, 2)
    max_restarts = dice.choice((0, 3)) if ranks == 2 else dice.choice((None, 3))
    options = [f"train.save_every={dice.randint(1, 2)}", f"train.async_save={dice.choice(('true', 'false'))}"]
    if "replica" in kinds:
        options.append("train.checksum_every=1")
    steps = sorted(dice.sample(range(2, STEPS - 1), len(kinds)))
    if "freeze" in kinds:
        options.append(
            "parallel.timeout_seconds=8"
        )  # more than SILENCE of train/watch.py, on a busy machine too
    faults = [_fault(dice, i, kind, steps, ranks) for i, kind in enumerate(kinds)]
    return Plan(seed, number, ranks, max_restarts, tuple(options), tuple(faults))


def baseline(seed: int, ranks: int) -> Plan:
    """An uninterrupted run."""
    return Plan(seed, -ranks, ranks, 0 if ranks > 1 else None, ("train.save_every=2",), ())


def _dealt(seed: int, start: int, count: int) -> list[str]:
    def deck() -> Iterator[str]:
        dice = random.Random(seed)
        while True:
            yield from dice.sample(list(KINDS), len(KINDS))

    cards = deck()
    return [next(cards) for _ in range(start + count)][start:]


def _fault(dice: random.Random, number: int, kind: str, steps: list[int], ranks: int) -> Fault:
    """Resuming wants a fault before, when a checkpoint is certain; after the last step there is no other."""
    places = [place for place in PLACES if place != "load" or (number and steps[number - 1] > 4)]
    places = [place for place in places if place != "finish" or number == len(steps) - 1]
    place = dice.choice(places) if kind in ("kill", "kill-all") else "backward" if kind == "nan" else "step"
    rank = dice.randrange(ranks)
    if place in ("publish", "published") or kind in ("torn", "flip"):
        rank = 0  # only it passes there, only it is to look
    skip = dice.randrange(30) if place == "write" else 0
    return Fault(number, kind, steps[number], rank, place, skip, dice.getrandbits(32))
