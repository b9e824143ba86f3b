"""When a run has arrived: at the figure asked for, or when no scoring is better any more.

Here: what is remembered of a run's scorings, and the decision that follows from each. Pure. Not
here: scoring itself (`workers.evaluation`) and ending the run (`cluster.controller`).

Prechelt 1998, "Early stopping - but when?", calls the rule of `patience` UP_s: stop once the
validation error has not fallen for s scorings in a row. Here a scoring counts if it does not beat
the best so far, which is stricter than not beating the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from downpour.cluster.config.policy import PolicyConfig
from downpour.workers.tasks import ACCURACY, Figure

MILESTONES = (0.9, 0.95, 0.97, 0.975, 0.98, 0.99)
"""Accuracies of which a result says when they were first reached."""

Point = tuple[int, int]
"""A version, and the examples applied by then."""

EndedBy = Literal["epochs", "accuracy", "metric", "patience", "callback"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The figure of a scoring, and what the weights that were scored had cost."""

    value: float
    """Accuracy@1 in [0, 1], or another figure."""
    metric: str = ACCURACY
    """Which figure it is."""
    training_s: float
    """Seconds from the first update to these weights, over all sessions of the run."""
    examples: int
    """Examples applied."""
    epochs: float
    """The same in epochs."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Why a run is finished."""

    by: EndedBy = "epochs"
    """`epochs`: all of them are trained. `accuracy`, `metric`: it has the one that was asked for.
    `patience`: too many scorings brought no better one. `callback`: a callback asked for it."""
    reason: str = "every epoch is trained"
    """The same in words, with the numbers."""


class EarlyStopping:
    """The scorings of one run so far, and whether they end it."""

    def __init__(
        self,
        policy: PolicyConfig,
        state: Mapping[str, Any] | None = None,
        metric: str = ACCURACY,
    ) -> None:
        """`state` is what an earlier session of the run remembered, see `dump`.

        The policy's goal is of the figure `metric`.
        """
        state = state or {}
        self._goal, self._goal_metric = policy.goal, metric
        self._option = "--stop-at-accuracy" if policy.stop_at_metric is None else "--stop-at-metric"
        self._patience = policy.patience
        self._without_better: int = state.get("without_better", 0)
        self.best: Figure | None = None
        """The best figure so far."""
        if state.get("best") is not None:
            self.best = Figure(metric=state.get("metric", ACCURACY), value=state["best"])
        self.reached: dict[str, dict[str, float]] = dict(state.get("reached", {}))
        """By milestone, the first scoring at or above it: `accuracy`, `training_s`, `examples` and
        `epochs`."""
        self.trained_before_s: float = state.get("training_s", 0.0)
        """Seconds from the first update to the end, of earlier sessions."""

    def scored(self, scoring: Scoring) -> Ended | None:
        """Take note of a scoring; gives the reason if the run ends with it."""
        figure = Figure(metric=scoring.metric, value=scoring.value)
        for milestone in MILESTONES if scoring.metric == ACCURACY else ():
            if scoring.value >= milestone:
                self.reached.setdefault(str(milestone), _as_reached(scoring))
        if figure.beats(self.best):
            self.best = figure
            self._without_better = 0
        else:
            self._without_better += 1
        goal = None if self._goal is None else Figure(metric=self._goal_metric, value=self._goal)
        if goal is not None and goal.metric == figure.metric and not goal.beats(figure):
            return Ended(
                by="accuracy" if scoring.metric == ACCURACY else "metric",
                reason=f"{figure.text} reaches the {goal.value_text} of {self._option}",
            )
        assert self.best is not None, "a scoring beats none"
        if self._patience is not None and self._without_better >= self._patience:
            return Ended(
                by="patience",
                reason=f"{self._without_better} scorings brought nothing better than "
                f"{self.best.value_text}, as many as --patience allows",
            )
        return None

    def dump(self, training_s: float) -> dict[str, Any]:
        """What to remember for a later session; `training_s` is over all sessions until now."""
        return {
            "best": None if self.best is None else self.best.value,
            **({} if self.best is None else {"metric": self.best.metric}),
            "without_better": self._without_better,
            "reached": self.reached,
            "training_s": round(training_s, 3),
        }


def _as_reached(scoring: Scoring) -> dict[str, float]:
    kept = asdict(scoring)
    del kept["metric"]
    return {ACCURACY: kept.pop("value"), **kept}


def examples_at(version: int, before: Point, after: Point, examples_per_update: int) -> int:
    """Return about how many examples were applied when a partition had `version`.

    Between two reports and beyond them, examples are taken to grow evenly with versions; how many
    an update brings changes as steps are computed together.

    Args:
        version: of the weights in question.
        before: what a report says, or (0, 0).
        after: what a later report says, or the same as `before`.
        examples_per_update: what to take if the two reports have one version.
    """
    updates = after[0] - before[0]
    slope = (after[1] - before[1]) / updates if updates > 0 else examples_per_update
    return max(0, round(after[1] + (version - after[0]) * slope))
