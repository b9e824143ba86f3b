"""Whether a run learns anything, judged by its accuracy and its training loss. Pure.

Two signs say that it does not: accuracy no better than guessing once an epoch is trained, and a
training loss that is where it was at the beginning. The first of them is told once, with what to
look at. Not here: what a run does about it, which is nothing.
"""

from __future__ import annotations

import math
from collections import deque

PREFIX = "learns nothing so far: "
"""Begins each line, so that a report finds it among the news."""
ERRORS = 3.0
"""Standard errors above chance that an accuracy may be and still be called chance."""
MOVED = 0.02
"""Share of itself by which the loss has to fall in an epoch."""
LOSSES = 8
"""Losses of windows that are averaged, at the beginning and of late."""


def chance_of(accuracy: float, num_classes: int, num_examples: int) -> bool:
    """Return whether an accuracy is what guessing among `num_classes` gives.

    That is 1 / C, and up to `ERRORS` standard errors of a share of `num_examples` above.
    """
    chance = 1.0 / num_classes
    error = math.sqrt(chance * (1.0 - chance) / max(1, num_examples))
    return accuracy <= chance + ERRORS * error


class Learning:
    """What is remembered of a run to judge it."""

    def __init__(
        self, *, num_classes: int, epochs: int, in_flight: int, data: str, from_start: bool
    ) -> None:
        """Judge a run from its beginning.

        Args:
            num_classes: C.
            epochs: of the whole run.
            in_flight: steps in flight at a time, for the line.
            data: of the run, for the line.
            from_start: whether the losses to come begin with the run's first; a run that is resumed
                may have learnt all that there is, and is judged by its accuracy alone.
        """
        self._num_classes = num_classes
        self._epochs = epochs
        self._in_flight = in_flight
        self._data = data
        self._first: list[float] = []
        self._late: deque[float] = deque(maxlen=LOSSES)
        self._judges_loss = from_start
        self._judges_accuracy = num_classes > 1
        self._at_chance = 0
        self.rate: float | None = None
        """The learning rate of late, for the line."""

    def trained(self, loss: float, epoch: float) -> str | None:
        """Take note of a window's mean loss after `epoch` epochs; gives the line, if it is time."""
        if not self._judges_loss or not math.isfinite(loss):
            return None
        if len(self._first) < LOSSES and epoch < 1:
            self._first.append(loss)
        else:
            self._late.append(loss)
        if epoch < 1 or len(self._first) < 2 or len(self._late) < min(LOSSES, len(self._first)):
            return None
        self._judges_loss = False  # what has moved by now does learn, and may stand still later
        first, late = _mean(self._first), _mean(self._late)
        if late < first - MOVED * abs(first):
            return None
        return self._line(
            f"after {epoch:.1f} epochs the training loss is {late:.4g}, and it began at {first:.4g}"
        )

    def scored(self, accuracy: float, num_examples: int, epoch: float) -> str | None:
        """Take note of a scoring after `epoch` epochs; gives the line, if it is time.

        One scoring at chance may be of weights on their way, so it takes two in a row, or the last.
        """
        if not self._judges_accuracy:
            return None
        if not chance_of(accuracy, self._num_classes, num_examples):
            self._judges_accuracy = self._judges_loss = False
            return None
        if epoch < 1:
            return None
        self._at_chance += 1
        if self._at_chance < 2 and epoch < self._epochs:
            return None
        self._judges_accuracy = False
        return self._line(
            f"after {epoch:.1f} epochs the accuracy is {accuracy:.2%}, and guessing among "
            f"{self._num_classes} classes gives {1 / self._num_classes:.2%}"
        )

    def _line(self, what: str) -> str:
        self._judges_loss = self._judges_accuracy = False  # one line says what to look at
        rate = "" if self.rate is None else f" ({self.rate:.4g} now)"
        return (
            f"{PREFIX}{what}; look at the learning rate{rate}: --learning-rate, at the steps in "
            f"flight ({self._in_flight}): --in-flight 1 or fewer --replicas, and at the labels: "
            f"`downpour inspect {self._data} --sheet sheet.png`"
        )


def _mean(values: list[float] | deque[float]) -> float:
    return sum(values) / len(values)
