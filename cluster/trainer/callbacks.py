"""Callbacks: the user's own code, told of a run while it trains.

They are called in the thread that called `fit`, one after the other. Meanwhile replicas go on with
the windows that they hold. Here: the base class, what it is told, and who calls it. Not here:
callbacks for other programs (`trackers`).
"""

from __future__ import annotations

import difflib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line
from downpour.cluster.monitoring.observation import Handle, Observation
from downpour.cluster.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from downpour.cluster.trainer.result import Result
    from downpour.workers.replica.replicas import WindowReport

EVENTS = ("on_start", "on_evaluation", "on_checkpoint", "on_end")
SLOW_S = 2.0
"""A callback that takes longer is told of: the controller waits for it."""


class CurrentRun:
    """The run that trains, as callbacks see it."""

    def __init__(self, handle: Handle) -> None:
        """See `Handle`."""
        self._handle = handle
        self.path: Path = handle.folder
        """The run's folder."""
        self.name: str = handle.folder.name
        """The run's name."""
        self.config: RunConfig = handle.config
        """The configuration, with every value."""
        self.error: str | None = None
        """In `on_end`: why the run is not finished, in a line, if it is not."""

    def finish(self, reason: str = "a callback asked for it") -> None:
        """Have the run finished as it stands: its last weights are scored and kept."""
        self._handle.finish(reason)

    def tell(self, text: str) -> None:
        """Show people a line, and keep it among the run's events."""
        self._handle.tell(text)


class Callback:
    """What is told of a run. Any object with some of these methods will do."""

    def on_start(self, run: CurrentRun) -> None:
        """The run begins, or goes on."""

    def on_evaluation(self, run: CurrentRun, metrics: Mapping[str, Any]) -> None:
        """Weights were scored.

        Args:
            run: the run; `run.finish()` ends it early.
            metrics: the newest figures: `accuracy`, `evaluation_loss`, `best_accuracy`, `epoch`,
                `updates`, `examples`, `elapsed_s`, `loss`, `learning_rate` and more, under the
                names that `metrics.jsonl` has.
        """

    def on_checkpoint(self, run: CurrentRun, checkpoint: Checkpoint) -> None:
        """A checkpoint is whole: `resume` can go on from it."""

    def on_end(self, run: CurrentRun, result: Result | None) -> None:
        """The run is over; no result says that it was stopped or failed, see `run.error`."""


def checked(callbacks: object) -> list[Any]:
    """The callbacks that were given, each looked at.

    Raises:
        UserError: one of them cannot be a callback, or has an event that there is not.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise UserError(f"callbacks is {callbacks!r}: give a list of them")
    for callback in callbacks:
        if isinstance(callback, type):
            raise UserError(
                f"callback {callback.__name__} is a class: give an instance, {callback.__name__}()"
            )
        handlers = [name for name in dir(callback) if name.startswith("on_")]
        for name in handlers:
            if name not in EVENTS:
                close = difflib.get_close_matches(name, EVENTS, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise UserError(
                    f"callback {type(callback).__name__} has {name}, which nothing calls: {hint}"
                    f"there are {', '.join(EVENTS)}"
                )
        if not handlers:
            raise UserError(
                f"callback {callback!r} has none of {', '.join(EVENTS)}: derive it from "
                "downpour.callbacks.Callback"
            )
    return list(callbacks)


class CallbackSink:
    """Calls callbacks; none of them can end the training by what it raises."""

    def __init__(
        self,
        callbacks: Sequence[Any],
        handle: Handle,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`callbacks` are those that `checked` gave."""
        self._callbacks = callbacks
        self._run = CurrentRun(handle)
        self._clock = clock
        self._told: set[str] = set()
        self._newest: dict[str, Any] = {}
        self._call("on_start")

    def trained(self, report: WindowReport) -> None:
        """See `Sink`."""

    def observed(self, observation: Observation) -> None:
        """See `Sink`."""
        self._newest |= observation.values

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._newest |= values
        self._call("on_evaluation", dict(self._newest))

    def saved(self, checkpoint: Checkpoint) -> None:
        """See `Sink`."""
        self._call("on_checkpoint", checkpoint)

    def close(self) -> None:
        """See `Sink`. Whether the run has a result is known later: see `end`."""

    def end(self, result: Result | None, error: str | None) -> None:
        """The run is over.

        Args:
            result: what came out, if it is finished.
            error: why it is not, if so.
        """
        self._run.error = error
        self._call("on_end", result)

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            handler = getattr(callback, event, None)
            if handler is None:
                continue
            name, began_s = f"{type(callback).__name__}.{event}", self._clock()
            try:
                handler(self._run, *arguments)
            except Exception as error:
                after = "the result stands" if event == "on_end" else "training goes on"
                self._tell_once(f"callback {name} raised {_described(error)}: {after}")
            if event != "on_end" and (took_s := self._clock() - began_s) > SLOW_S:
                self._tell_once(
                    f"callback {name} takes seconds: replicas run out of work while it does",
                    f", {took_s:.1f} s this time",
                )

    def _tell_once(self, text: str, more: str = "") -> None:
        if text not in self._told:
            self._told.add(text)
            self._run.tell(text + more)


def _described(error: Exception) -> str:
    """An error in a line, with the place where the callback's own code raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"
