"""What the one line about a job that hangs says."""

from __future__ import annotations

import pytest

from train.watch import State, named, who_hangs


def state(place: str, waits: bool) -> State:
    return {"place": place, "waits": waits}


@pytest.mark.parametrize(
    ("states", "silent", "line"),
    [
        ([("a", True), ("b", False), ("a", True)], [], "rank 1 is in b, ranks 0, 2 are waiting in a"),
        ([("a", True), ("a", True), ("b", True)], [], "rank 2 is waiting in b, ranks 0, 1 are waiting in a"),
        ([("a", True), ("a", True), ("b", False)], [0], "rank 0 is not answering"),
        ([("a", False), ("a", False)], [], "ranks 0, 1 are in a"),
    ],
)
def test_who_hangs(states: list[tuple[str, bool]], silent: list[int], line: str) -> None:
    assert who_hangs({rank: state(*what) for rank, what in enumerate(states)}, silent) == line


def test_many_ranks_are_shortened() -> None:
    assert named(range(9)) == "ranks 0, 1, 2, 3 and 5 more are"
