"""Callbacks: what they are told, and that none of them can harm the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.monitoring.observation import Handle, Observation
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.cluster.trainer.callbacks import SLOW_S, Callback, CallbackSink

CHECKPOINT = Checkpoint(number=2, updates=10, elapsed_s=1.0, files=())


class Watched:
    """A handle whose lines are kept, and a clock that the test moves."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.finishes: list[str] = []
        self.now = 0.0
        self.handle = Handle(
            folder=Path("runs/a"),
            config=recipes.find("mnist-bn"),
            finish=self.finishes.append,
            tell=self.told.append,
        )

    def sink(self, *callbacks: Any) -> CallbackSink:
        return CallbackSink(callbacks, self.handle, clock=lambda: self.now)


class Only:
    """Any object with one of the methods will do."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_evaluation(self, run: Any, metrics: dict[str, Any]) -> None:
        self.heard.append(metrics)


def test_an_evaluation_brings_the_newest_of_all_figures() -> None:
    only, watched = Only(), Watched()
    sink = watched.sink(Callback(), only)
    observed = {"updates": 5, "loss": 0.7, "learning_rate": 0.1}
    sink.observed(Observation(values=observed, reports=[], replicas={}))
    sink.evaluated({"updates": 4, "accuracy": 0.5})
    sink.observed(Observation(values={"updates": 9, "loss": 0.6}, reports=[], replicas={}))
    sink.evaluated({"updates": 8, "accuracy": 0.6})
    sink.saved(CHECKPOINT)
    sink.close()
    sink.end(None, "stopped")
    assert only.heard == [
        {"updates": 4, "loss": 0.7, "learning_rate": 0.1, "accuracy": 0.5},
        {"updates": 8, "loss": 0.6, "learning_rate": 0.1, "accuracy": 0.6},
    ]
    assert watched.told == []


class Failing(Callback):
    def on_start(self, run: Any) -> None:
        raise KeyError("a\nb")

    def on_evaluation(self, run: Any, metrics: Any) -> None:
        metrics["accuracy"] = 9
        raise ValueError("no")

    def on_checkpoint(self, run: Any, checkpoint: Any) -> None:
        raise AssertionError

    def on_end(self, run: Any, result: Any) -> None:
        raise OSError("disk")


def test_one_that_raises_is_told_of_in_a_line_each_and_the_others_are_called() -> None:
    only, watched = Only(), Watched()
    sink = watched.sink(Failing(), only)
    for _ in range(3):
        sink.evaluated({"updates": 1, "accuracy": 0.5})
    sink.saved(CHECKPOINT)
    sink.end(None, None)
    assert len(only.heard) == 3
    starts = [
        r"callback Failing.on_start raised KeyError: 'a\nb' at test_callbacks.py:",
        "callback Failing.on_evaluation raised ValueError: no at test_callbacks.py:",
        "callback Failing.on_checkpoint raised AssertionError: AssertionError at",
        "callback Failing.on_end raised OSError: disk at test_callbacks.py:",
    ]
    assert len(watched.told) == len(starts), "each is told once"
    for line, start in zip(watched.told, starts, strict=True):
        assert line.startswith(start)
        assert "\n" not in line
    assert watched.told[1].endswith("training goes on")
    assert watched.told[3].endswith("the result stands")


def test_one_that_ends_the_process_does() -> None:
    """Ray Tune ends a trial so, and Ctrl-C a script."""

    class Exits(Callback):
        def on_evaluation(self, run: Any, metrics: Any) -> None:
            raise SystemExit(0)

    with pytest.raises(SystemExit):
        Watched().sink(Exits()).evaluated({"updates": 1, "accuracy": 0.5})


def test_one_that_takes_long_is_told_of_once() -> None:
    watched = Watched()

    class Slow(Callback):
        def on_evaluation(self, run: Any, metrics: Any) -> None:
            watched.now += 2 * SLOW_S

    sink = watched.sink(Slow())
    for _ in range(2):
        sink.evaluated({"updates": 1, "accuracy": 0.5})
    assert watched.told == [
        "callback Slow.on_evaluation takes seconds: replicas run out of work while it does, "
        f"{2 * SLOW_S:.1f} s this time"
    ]
