"""The search for a peer's best setting: the same for all. Pure, but for the trials it is given.

Shapes (workers and mini-batch size) are tried first, at the first rate, momentum, decay and
average; then all of these at the best shape, with Nesterov's momentum and with the plain one. A
trial ends once it has taken longer than the best one so far, so the first candidates should be
good guesses.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from downpour.benchmarks.learning.curve import Curve

REFERENCE_BATCH, REFERENCE_MOMENTUM = 32, 0.9
"""Examples of a step that rates and averages are given for, and the momentum that rates are."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is computed at a time."""

    workers: int
    """Processes, ranks or replicas that compute gradients."""
    batch_size: int
    """Examples in the mini-batch of one of them."""
    averaged: bool = False
    """The workers' mini-batches make one step together."""

    @property
    def step_examples(self) -> int:
        """Examples in the gradient of one step."""
        return self.batch_size * (self.workers if self.averaged else 1)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a training can be told."""

    shape: Shape
    base_rate: float
    """The rate for steps of 32 examples; larger steps get more by the linear rule."""
    decay: float
    """What the rate is multiplied by every epoch."""
    average: float | None = None
    """Share of the weights' average that is kept at every 32 examples; None averages nothing."""
    momentum: float = REFERENCE_MOMENTUM
    """Share of the velocity that is kept at every step."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""

    @classmethod
    def at_rate(
        cls,
        shape: Shape,
        learning_rate: float,
        decay: float,
        average: float | None = None,
        momentum: float = REFERENCE_MOMENTUM,
        *,
        nesterov: bool = True,
    ) -> Setting:
        """The setting that has this rate for this shape and momentum."""
        one = cls(
            shape=shape,
            base_rate=1.0,
            decay=decay,
            average=average,
            momentum=momentum,
            nesterov=nesterov,
        )
        return dataclasses.replace(one, base_rate=learning_rate / one.learning_rate)

    @property
    def learning_rate(self) -> float:
        """The rate for this shape and momentum.

        It is proportional to the examples of a step (Goyal et al. 2017), and to 1 - momentum, so
        that a gradient moves the weights as far in the end.
        """
        further = (1 - self.momentum) / (1 - REFERENCE_MOMENTUM)
        return self.base_rate * further * self.shape.step_examples / REFERENCE_BATCH

    def __str__(self) -> str:
        """For people."""
        rate = f"{self.shape.batch_size}, rate {self.learning_rate:g} x{self.decay:g}"
        average = "" if self.average is None else f", averaged {self.average:g}"
        rule = "nesterov" if self.nesterov else "momentum"
        return f"{rate}, {rule} {self.momentum:g}{average}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All settings of a peer."""

    shapes: tuple[Shape, ...]
    base_rates: tuple[float, ...]
    decays: tuple[float, ...]
    averages: tuple[float | None, ...] = (None,)
    momenta: tuple[float, ...] = (REFERENCE_MOMENTUM,)
    nesterov: tuple[bool, ...] = (True,)

    def settings(self, shape: Shape) -> list[Setting]:
        """All averages, rates, momenta of both kinds and decays for `shape`, good guesses first.

        Those are the first of each. If weights are averaged it is the last decay, the slowest,
        because the average does the work of a rate that falls.
        """
        return [
            Setting(
                shape=shape,
                base_rate=rate,
                decay=decay,
                average=average,
                momentum=momentum,
                nesterov=nesterov,
            )
            for average, rate, nesterov, momentum in itertools.product(
                self.averages, self.base_rates, self.nesterov, self.momenta
            )
            for decay in (self.decays if average is None else reversed(self.decays))
        ]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting, and what came of it."""

    setting: Setting
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    best: Setting
    trials: tuple[Trial, ...]
    left_out: int
    """Candidates that were not tried, since the time for the search was over."""
    source: str | None = None
    """The record that the setting is from, if there was no search."""


def search(
    grid: Grid,
    *,
    goal: float,
    bound_s: float,
    budget_s: float,
    trial: Callable[[Setting, float], Curve],
    clock: Callable[[], float],
) -> Found:
    """Find the setting that has the accuracy `goal` after the fewest training seconds.

    If none gets there, the best is the one with the highest accuracy. A grid of one setting needs
    no trial.

    Args:
        grid: the candidates.
        goal: the accuracy that counts.
        bound_s: training seconds of a trial at most.
        budget_s: seconds by `clock` after which no further trial begins.
        trial: trains with a setting for so many training seconds at most.
        clock: seconds.
    """
    give_up_s = clock() + budget_s
    trials: list[Trial] = []
    left_out = 0

    def attempt(candidates: Sequence[Setting]) -> None:
        nonlocal left_out
        for setting in candidates:
            if clock() >= give_up_s and trials:
                left_out += 1
                continue
            limit_s = min([bound_s, *(t.curve.seconds_to(goal) for t in trials)])
            trials.append(Trial(setting=setting, curve=trial(setting, limit_s)))

    first = [grid.settings(shape)[0] for shape in grid.shapes]
    rest = grid.settings(grid.shapes[0])[1:]
    if len(first) == 1 and not rest:
        return Found(best=first[0], trials=(), left_out=0)
    attempt(first)
    attempt(grid.settings(best_of(trials, goal).setting.shape)[1:])
    return Found(best=best_of(trials, goal).setting, trials=tuple(trials), left_out=left_out)


def best_of(trials: Sequence[Trial], goal: float) -> Trial:
    """The first to arrive; if none does, the one with the highest accuracy."""
    arrived = [t for t in trials if t.curve.seconds_to(goal) < math.inf]
    if arrived:
        return min(arrived, key=lambda t: t.curve.seconds_to(goal))
    return max(trials, key=lambda t: t.curve.best)
