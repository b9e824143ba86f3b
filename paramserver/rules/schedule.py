"""The learning rate as a function of the examples that a partition has applied.

Counting examples, not updates or seconds, keeps a schedule the same whatever the number of
replicas, partitions or restarts: each partition reads it off its own applied set.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from downpour.paramserver.errors import BadConfiguration

Shape = Literal["exponential", "milestones", "cosine", "one-cycle", "own"]
WHOLE_RUN: tuple[Shape, ...] = ("cosine", "one-cycle")
"""Shapes that are stretched over a number of epochs."""
ONE_CYCLES_END = 0.04 / 1e4
"""Last rate of torch's OneCycleLR as a share of the highest."""


def _only_with(*shapes: Shape) -> dict[str, object]:
    """What says, for the command line, with which shapes a field means something."""
    return {"only_with": ("shape", shapes)}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rate of each update, by x, the epochs of examples applied before it.

    With r the learning rate and T the epochs that the shape is stretched over:

    - `exponential`: `r * decay_factor ** (x / decay_epochs)`; with `staircase` the exponent is
      rounded down (GoogLeNet: x0.96 every 8 epochs). With `decay_factor` 1 it is constant.
    - `milestones`: `r * decay_factor ** n`, with n the milestones that x has reached (torch's
      MultiStepLR).
    - `cosine`: from r to `f = r * final_share`, `f + (r - f) * (1 + cos(pi * z)) / 2`, with z the
      share of the epochs from the end of the warm-up to T that are over (torch's
      CosineAnnealingLR).
    - `one-cycle`: by half a cosine from `r * start_share` up to r at `peak_share * T`, and by
      another down to `r * final_share` at T. It is torch's OneCycleLR, without its cycling of
      momentum: asynchrony adds a momentum of its own, and both together would swing further.
    - `own`: `r * function(x)`.

    A warm-up multiplies the first `warmup_epochs` by `x / warmup_epochs`, whatever the shape. It
    counts at least one example, so that no update is without effect.

    Raises:
        BadConfiguration: A number is out of its range, or two do not go together.
    """

    shape: Shape = field(default="exponential", metadata={"cli": "schedule"})
    """How the rate changes; see `downpour.Schedule` for each shape's formula."""
    learning_rate: float = 0.01
    """The rate that a decay starts from, and the highest of a cycle."""
    decay_factor: float = field(default=1.0, metadata=_only_with("exponential", "milestones"))
    """For `exponential` and `milestones`: what the rate is multiplied by each time; 1 keeps it
    constant."""
    decay_epochs: float = field(default=1.0, metadata=_only_with("exponential"))
    """For `exponential`: epochs between two multiplications."""
    staircase: bool = field(default=False, metadata=_only_with("exponential"))
    """For `exponential`: decay in steps rather than continuously."""
    milestones: tuple[float, ...] = ()
    """For `milestones`: epochs at which the rate is multiplied by the decay factor, such as
    `30,60,80`."""
    schedule_epochs: float | None = field(default=None, metadata=_only_with(*WHOLE_RUN))
    """For `cosine` and `one-cycle`: epochs until the last rate; none is those of the run."""
    final_share: float | None = field(default=None, metadata=_only_with(*WHOLE_RUN))
    """For `cosine` and `one-cycle`: the last rate as a share of the learning rate; none is 0, and
    for `one-cycle` 4e-6."""
    start_share: float = field(default=0.04, metadata=_only_with("one-cycle"))
    """For `one-cycle`: the first rate as a share of the learning rate."""
    peak_share: float = field(default=0.3, metadata=_only_with("one-cycle"))
    """For `one-cycle`: share of its epochs over which the rate rises."""
    function: str | None = field(default=None, metadata={"cli": "schedule-function"})
    """For `own`: `package.module:function`, which takes the epochs and gives what the learning rate
    is multiplied by."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly from (nearly) 0; goes with any schedule."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise BadConfiguration(
                f"learning rate is {self.learning_rate}: give a finite number above 0"
            )
        if not 0 < self.decay_factor <= 1:
            raise BadConfiguration(f"decay factor is {self.decay_factor}: give 0 < factor <= 1")
        if not 0 < self.decay_epochs < math.inf or not 0 <= self.warmup_epochs < math.inf:
            raise BadConfiguration(
                f"decay epochs is {self.decay_epochs} and warm-up epochs {self.warmup_epochs}: "
                "give finite numbers, the first above 0 and the second 0 or more"
            )
        if self.shape == "milestones":
            self._check_milestones()
        elif self.milestones:
            raise BadConfiguration(
                f"milestones is {_listed(self.milestones)}, and schedule {self.shape}: give "
                "schedule milestones, or no milestones"
            )
        if self.shape in WHOLE_RUN:
            self._check_whole_run()
        if (self.shape == "own") != (self.function is not None):
            raise BadConfiguration(
                f"schedule is {self.shape}, and schedule function {self.function or 'none'}: give "
                "schedule own with a function as module:function, or neither"
            )

    def _check_milestones(self) -> None:
        marks = self.milestones
        if (
            not marks
            or list(marks) != sorted(set(marks))
            or not 0 < marks[0] <= marks[-1] < math.inf
        ):
            raise BadConfiguration(
                f"milestones is {_listed(marks) or 'none'}: give epochs above 0 that rise, such as "
                "30,60,80"
            )
        if self.decay_factor == 1:
            raise BadConfiguration(
                "schedule is milestones, and decay factor 1, which changes nothing: give a decay "
                "factor below 1, such as 0.1"
            )

    def _check_whole_run(self) -> None:
        epochs = self.schedule_epochs
        if epochs is not None and not max(0.0, self.warmup_epochs) < epochs < math.inf:
            raise BadConfiguration(
                f"schedule epochs is {epochs} and warm-up epochs {self.warmup_epochs}: give a "
                "finite number that is above both 0 and the warm-up, or none"
            )
        if not 0 <= self.last_share <= 1 or not 0 < self.start_share <= 1:
            raise BadConfiguration(
                f"final share is {self.last_share} and start share {self.start_share}: give shares "
                "of the learning rate, from 0 to 1, the second above 0"
            )
        if not 0 < self.peak_share < 1:
            raise BadConfiguration(f"peak share is {self.peak_share}: give 0 < share < 1")

    @property
    def last_share(self) -> float:
        """The last rate of a shape that has one, as a share of the learning rate."""
        if self.final_share is not None:
            return self.final_share
        return ONE_CYCLES_END if self.shape == "one-cycle" else 0.0

    def over(self, epochs: int) -> Schedule:
        """Return the schedule of a run of so many epochs.

        Raises:
            BadConfiguration: The warm-up is as long as the whole.
        """
        if self.shape not in WHOLE_RUN or self.schedule_epochs is not None:
            return self
        return replace(self, schedule_epochs=float(epochs))

    def rate(self, examples: int, epoch_examples: int) -> float:
        """Return the rate of the update after `examples` applied, `epoch_examples` to an epoch."""
        return self._shaped(epoch_examples)(examples)

    def rates(self, epoch_examples: int) -> Callable[[int], float]:
        """Return the rate as a function of the examples applied, `epoch_examples` to an epoch.

        Which shape it is, is asked once. A subclass of the user's own has its own `rate`.
        """
        if type(self).rate is not Schedule.rate:
            return lambda examples: self.rate(examples, epoch_examples)
        return self._shaped(epoch_examples)

    def _shaped(self, epoch_examples: int) -> Callable[[int], float]:
        epochs, share = self.schedule_epochs or 1.0, self.last_share
        match self.shape:
            case "exponential":
                return self._exponential(epoch_examples)
            case "milestones":
                return self._warmed(_milestones(self.milestones, self.decay_factor), epoch_examples)
            case "cosine":
                return self._warmed(_cosine(self.warmup_epochs, epochs, share), epoch_examples)
            case "one-cycle":
                peak = self.peak_share * epochs
                up, down = _cosine(0.0, peak, 1.0 / self.start_share), _cosine(peak, epochs, share)
                return self._warmed(
                    lambda x: self.start_share * up(x) if x < peak else down(x), epoch_examples
                )
            case "own":
                return self._warmed(self._own(), epoch_examples)

    def _exponential(self, epoch_examples: int) -> Callable[[int], float]:
        initial, factor, warmup = self.learning_rate, self.decay_factor, self.warmup_epochs
        decay_epochs, staircase = self.decay_epochs, self.staircase

        def rate(examples: int) -> float:
            epochs = examples / epoch_examples
            rate = initial
            if factor != 1:
                exponent = epochs / decay_epochs
                rate *= factor ** (int(exponent) if staircase else exponent)
            if epochs < warmup:
                rate *= min(1.0, max(epochs, 1 / epoch_examples) / warmup)
            return rate

        return rate

    def _warmed(
        self, share: Callable[[float], float], epoch_examples: int
    ) -> Callable[[int], float]:
        """The learning rate times `share(epochs)`, after the warm-up."""
        initial, warmup = self.learning_rate, self.warmup_epochs

        def rate(examples: int) -> float:
            epochs = examples / epoch_examples
            rate = initial * share(epochs)
            if epochs < warmup:
                rate *= min(1.0, max(epochs, 1 / epoch_examples) / warmup)
            return rate

        return rate

    def _own(self) -> Callable[[float], float]:
        """The user's function.

        Raises:
            BadConfiguration: There is none of that name, or it fails.
        """
        name = self.function or ""
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            first = float(function(0.0))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadConfiguration(
                f"schedule function is {name!r}, which does not work ({text}): name a function as "
                "package.module:function that takes epochs and gives a number"
            ) from error
        if not 0 <= first < math.inf:
            raise BadConfiguration(
                f"schedule function is {name!r}, and gives {first} at epoch 0: let it give finite "
                "numbers of 0 or more"
            )
        return lambda epochs: float(function(epochs))


def _milestones(marks: tuple[float, ...], factor: float) -> Callable[[float], float]:
    return lambda epochs: factor ** sum(epochs >= mark for mark in marks)


def _cosine(start: float, stop: float, last: float) -> Callable[[float], float]:
    """From 1 at `start` to `last` at `stop`, by half a cosine; constant before and after."""

    def share(epochs: float) -> float:
        over = min(1.0, max(0.0, (epochs - start) / (stop - start)))
        return last + (1 - last) * (1 + math.cos(math.pi * over)) / 2

    return share


def _listed(marks: tuple[float, ...]) -> str:
    return ",".join(f"{mark:g}" for mark in marks)
