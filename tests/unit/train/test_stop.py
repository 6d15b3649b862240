"""Signals are noted until the step is done; one that takes too long is ended, with a line."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from train import stop
from train.stop import Stop


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines with which the process would have ended."""
    lines: list[str] = []
    monkeypatch.setattr(stop, "speak", lambda error, line: lines.append(line))
    monkeypatch.setattr(stop, "leave", lambda: lines.append("left"))
    return lines


def countdown() -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == "stop")


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals, ended: list[str]) -> None:
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    with Stop(60, lambda: None) as asked:
        assert not asked.asked and not asked.interrupted
        os.kill(os.getpid(), number)
        assert asked.asked and asked.interrupted == (number == signal.SIGINT)
        thread = countdown()
    assert not thread.is_alive() and not ended  # so that it is not the last to refer to the run
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before


def test_what_takes_too_long_ends_with_the_newest_checkpoint_named(ended: list[str]) -> None:
    with Stop(0.1, lambda: Path("runs/a/checkpoints/step-00000003")):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        countdown().join(10)
    assert ended[0].startswith("SIGTERM, SIGUSR1: the step was not saved within 0.1 s (train.stop_seconds)")
    assert "step-00000003 remains" in ended[0] and ended[1:] == ["left"]


def test_a_person_has_time_and_may_insist(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock)
    with Stop(0.0, lambda: None) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        clock += 1
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, through torchrun
        assert asked.interrupted and not ended
        clock += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not ended
