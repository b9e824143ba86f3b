"""When a run has arrived: at the accuracy asked for, or when no scoring is better any more.

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

MILESTONES = (0.9, 0.95, 0.97, 0.975, 0.98, 0.99)
"""Accuracies of which a result says when they were first reached."""

Point = tuple[int, int]
"""A version, and the examples applied by then."""

EndedBy = Literal["epochs", "accuracy", "patience", "callback"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """An accuracy, and what the weights that were scored had cost."""

    accuracy: float
    """Accuracy@1 in [0, 1]."""
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
    """`epochs`: all of them are trained. `accuracy`: it has the one that was asked for.
    `patience`: too many scorings brought no better one. `callback`: a callback asked for it."""
    reason: str = "every epoch is trained"
    """The same in words, with the numbers."""


class EarlyStopping:
    """The scorings of one run so far, and whether they end it."""

    def __init__(self, policy: PolicyConfig, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what an earlier session of the run remembered, see `dump`."""
        state = state or {}
        self._goal = policy.stop_at_accuracy
        self._patience = policy.patience
        self._without_better: int = state.get("without_better", 0)
        self.best: float | None = state.get("best")
        """The highest accuracy so far."""
        self.reached: dict[str, dict[str, float]] = dict(state.get("reached", {}))
        """By milestone, the first scoring at or above it: `accuracy`, `training_s`, `examples` and
        `epochs`."""
        self.trained_before_s: float = state.get("training_s", 0.0)
        """Seconds from the first update to the end, of earlier sessions."""

    def scored(self, scoring: Scoring) -> Ended | None:
        """Take note of a scoring; gives the reason if the run ends with it."""
        accuracy = scoring.accuracy
        for milestone in MILESTONES:
            if accuracy >= milestone:
                self.reached.setdefault(str(milestone), asdict(scoring))
        if self.best is None or accuracy > self.best:
            self.best = accuracy
            self._without_better = 0
        else:
            self._without_better += 1
        if self._goal is not None and accuracy >= self._goal:
            return Ended(
                by="accuracy",
                reason=f"accuracy {accuracy:.2%} reaches the {self._goal:.2%} of "
                "--stop-at-accuracy",
            )
        if self._patience is not None and self._without_better >= self._patience:
            return Ended(
                by="patience",
                reason=f"{self._without_better} scorings brought nothing better than "
                f"{self.best:.2%}, as many as --patience allows",
            )
        return None

    def dump(self, training_s: float) -> dict[str, Any]:
        """What to remember for a later session; `training_s` is over all sessions until now."""
        return {
            "best": self.best,
            "without_better": self._without_better,
            "reached": self.reached,
            "training_s": round(training_s, 3),
        }


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
