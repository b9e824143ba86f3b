"""Accuracy against training seconds and examples, of one training. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Ended = Literal["arrived", "out of time", "out of epochs"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """The test split was scored."""

    examples: int
    """Training examples applied to the weights that were scored."""
    updates: int
    """Updates that made them."""
    epoch: float
    """The examples in epochs."""
    seconds: float
    """Training seconds until these weights were there: without start-up."""
    accuracy: float
    """With the BN statistics that the training itself keeps, in [0, 1]."""
    accuracy_recomputed: float | None = None
    """With BN statistics recomputed by Algorithm 2; None if that was not looked at."""

    @property
    def best(self) -> float:
        """The higher of the two accuracies."""
        return max(self.accuracy, self.accuracy_recomputed or 0.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """All looks of one training, in their order."""

    startup_s: float
    """From the command to the first training step."""
    scoring_s: float | None
    """What scoring took, apart from `seconds`; None if it ran beside the training."""
    looks: tuple[Look, ...]
    ended: Ended

    def arrival(self, goal: float) -> Look | None:
        """The first look that has the accuracy `goal`; None if there is none."""
        return next((look for look in self.looks if look.best >= goal), None)

    def seconds_to(self, goal: float) -> float:
        """Training seconds until `arrival`; infinite if it never arrives."""
        look = self.arrival(goal)
        return math.inf if look is None else look.seconds

    @property
    def best(self) -> float:
        """The highest accuracy; 0 without a look."""
        return max((look.best for look in self.looks), default=0.0)

    @property
    def seconds(self) -> float:
        """Training seconds until the last look."""
        return self.looks[-1].seconds if self.looks else 0.0

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Curve:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**plain, "looks": tuple(Look(**look) for look in plain["looks"])})


def curve_of_run(
    lines: Sequence[Mapping[str, Any]],
    *,
    asked_at: float,
    epoch_examples: int,
    ended: Ended,
    finished: bool = False,
) -> Curve:
    """The curve of a run of this system, from the lines of its `metrics.jsonl`.

    A look's seconds are those at which the scored version came about, between the lines of rates
    around it, and count from the first update. Since the first line of rates may come up to a
    second after that, its time is extrapolated from the first two, but not to before the last line
    without an update.

    Args:
        lines: those of evaluations, which have `accuracy`, and of rates, as they were written. If
            an evaluation has `moving_accuracy` too, that is with the moving averages of training.
        asked_at: Unix time of the command.
        epoch_examples: training examples in an epoch.
        ended: why the training ended.
        finished: no further line follows, so the last evaluation counts even if no line of rates
            is at its version or beyond. Its own line's time is then the time.
    """
    zero_at, points = asked_at, [(0, asked_at, 0)]
    for line in lines:
        if "accuracy" in line or "examples" not in line:
            continue
        if line["updates"] > points[-1][0]:
            points.append((line["updates"], line["time"], line["examples"]))
        elif len(points) == 1:
            zero_at = line["time"]
    if len(points) > 1:
        points[0] = (0, _first_update_at(points[1:], zero_at), 0)
    began_at = points[0][1]
    looks = []
    for line in lines:
        if "accuracy" not in line:
            continue
        version, newest = line["updates"], points[-1]
        if version <= newest[0]:
            at, examples = _interpolated(points, version)
        elif finished:
            at, examples = line["time"], newest[2]
        else:
            continue  # the next line of rates will tell
        looks.append(
            Look(
                examples=round(examples),
                updates=version,
                epoch=examples / epoch_examples,
                seconds=max(0.0, at - began_at),
                accuracy=line.get("moving_accuracy", line["accuracy"]),
                accuracy_recomputed=line["accuracy"] if "moving_accuracy" in line else None,
            )
        )
    return Curve(startup_s=began_at - asked_at, scoring_s=None, looks=tuple(looks), ended=ended)


def _first_update_at(points: Sequence[tuple[int, float, int]], zero_at: float) -> float:
    (updates, at, _), *more = points
    if not more:
        return zero_at
    per_update_s = (more[0][1] - at) / (more[0][0] - updates)
    return max(zero_at, at - updates * per_update_s)


def _interpolated(points: Sequence[tuple[int, float, int]], version: int) -> tuple[float, float]:
    """Time and examples at `version`, which is within `points`."""
    if version <= 0 or len(points) == 1:
        return points[0][1], 0.0
    index = next(i for i, point in enumerate(points) if point[0] >= version)
    (v0, t0, e0), (v1, t1, e1) = points[index - 1], points[index]
    share = (version - v0) / (v1 - v0)
    return t0 + share * (t1 - t0), e0 + share * (e1 - e0)


def as_plain(curve: Curve) -> dict[str, Any]:
    """The curve as plain data, rounded to what it can tell."""
    plain = dataclasses.asdict(curve)
    plain["startup_s"] = round(curve.startup_s, 3)
    for look in plain["looks"]:
        look["seconds"], look["epoch"] = round(look["seconds"], 3), round(look["epoch"], 4)
    plain["looks"] = list(plain["looks"])
    return plain
