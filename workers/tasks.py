"""What a network is for: the loss it is trained with, and the figure it is judged by.

Figures themselves are computed in `evaluation.metrics`. Which task a run has is settled from its
data and its options (`cluster.training.tasks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

TaskName = Literal["classification", "regression", "multilabel", "segmentation"]

ACCURACY: Final = "accuracy"
EVALUATION_LOSS: Final = "evaluation_loss"
"""The figure of a network whose task is not known: the mean loss on the split that is scored."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task."""

    name: TaskName
    loss: str
    """The loss unless another is named."""
    metric: str
    """The figure that decides which weights are best."""
    is_share: bool
    """Whether that is a share in [0, 1], which is shown in percent."""


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="classification", loss="cross_entropy", metric=ACCURACY, is_share=True),
        Task(name="regression", loss="mse", metric="r2", is_share=False),
        Task(name="multilabel", loss="bce", metric="f1", is_share=True),
        Task(name="segmentation", loss="pixel_cross_entropy", metric="miou", is_share=True),
    )
}
"""Tasks by name."""

SHARES: Final = frozenset(task.metric for task in TASKS.values() if task.is_share)
"""Figures that are shares in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value of the figure that decides."""

    metric: str
    """Its name."""
    value: float
    """Its value."""

    @property
    def value_text(self) -> str:
        """The value as people read it: a share in percent."""
        if not math.isfinite(self.value):
            return str(self.value)
        return f"{self.value:.2%}" if self.metric in SHARES else f"{self.value:.4g}"

    @property
    def text(self) -> str:
        """The name and the value."""
        return f"{self.metric.replace('_', ' ')} {self.value_text}"

    @property
    def goodness(self) -> float:
        """The value turned so that more is better; -inf if it is not a number."""
        return goodness(self.metric, self.value)

    @property
    def accuracy(self) -> float | None:
        """The value, if it is an accuracy."""
        return self.value if self.metric == ACCURACY else None

    def beats(self, other: Figure | None) -> bool:
        """Whether it is better than another; one of another name is beaten by any."""
        if other is None or other.metric != self.metric:
            return True
        return self.goodness > other.goodness


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a figure is a better one."""
    return metric == EVALUATION_LOSS


def goodness(metric: str, value: float) -> float:
    """A value turned so that more is better; -inf if it is not a number."""
    if math.isnan(value):
        return -math.inf
    return -value if lower_is_better(metric) else value
