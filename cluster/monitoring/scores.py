"""Which figure decides in a run, from the lines of `metrics.jsonl` or a `result.json`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from downpour.workers.tasks import ACCURACY, EVALUATION_LOSS, TASKS, Figure

NAMES = tuple(task.metric for task in TASKS.values())
TITLES = {
    ACCURACY: "accuracy",
    "r2": "R²",
    "f1": "F1",
    "miou": "mean IoU",
    EVALUATION_LOSS: "eval loss",
}
"""What people read; short enough for the panel's labels."""
FIGURES: Mapping[str, str] = {
    "r2": "R2, the share of the targets' variance that is explained, at most 1",
    "rmse": "Root of the mean squared error, in the targets' unit",
    "mae": "Mean absolute error, in the targets' unit",
    "f1": "F1 over all classes in [0, 1]",
    "macro_f1": "Mean over classes of F1 in [0, 1]",
    "exact": "Share of rows without a mistake in [0, 1]",
    "miou": "Mean over classes of intersection over union in [0, 1]",
    "pixel_accuracy": "Share of pixels whose class is found in [0, 1]",
}
"""The figures of tasks other than classification, and what each is; Ray takes ASCII alone."""
DECIDING = tuple(name for name in NAMES if name in FIGURES)
"""Those of them that decide which weights are best."""


def metric_in(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure that decides, by the newest line with a scoring; accuracy before that."""
    for line in reversed(lines):
        found = next((name for name in NAMES if line.get(name) is not None), None)
        if found is not None:
            return found
        if EVALUATION_LOSS in line:
            return EVALUATION_LOSS
    return ACCURACY


def figures_in(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the figures of all scorings, oldest first."""
    metric = metric_in(lines)
    return [Figure(metric=metric, value=line[metric]) for line in lines if metric in line]


def best_of(figures: Sequence[Figure]) -> Figure | None:
    """Return the best of some figures; None of none."""
    best: Figure | None = None
    for figure in figures:
        best = figure if figure.beats(best) else best
    return best


def figure_of(result: Mapping[str, Any]) -> Figure | None:
    """Return the figure of a result, or of a status; None if it has none."""
    metric = metric_in([result])
    value = result.get(metric)
    return None if value is None else Figure(metric=metric, value=value)
