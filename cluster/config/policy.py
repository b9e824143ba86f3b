"""How long a run is, and what it does on the way.

Here are also the pure decisions that follow from these values and the progress of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from downpour.workers.config import ReplicaConfig

HANG_AFTER_S = 30.0
"""Default of `PolicyConfig.hang_after_s`."""
LEAST_HANG_AFTER_S = 1.0
"""Signs of life are looked for once a second."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How long the run is, and what it does on the way."""

    epochs: int = 20
    """Epochs to train."""
    seed: int = 0
    """What every random stream of the run comes from."""
    evaluate_every_s: float = 5.0
    """Seconds between two scorings of the evaluation split; longer if scoring is slow."""
    evaluation_share: float = 0.1
    """Largest share of the time that scoring may take."""
    bn_statistics: Literal["recomputed", "moving"] = "recomputed"
    """What weights are scored with and written with: BN statistics that the evaluator recomputes on
    training mini-batches (Algorithm 2), or the moving averages that the server keeps."""
    stop_at_accuracy: float | None = None
    """Accuracy@1 in (0, 1] at which the run is finished: at the first scoring that reaches it, with
    the weights that were scored. None trains every epoch."""
    stop_at_metric: float | None = None
    """The same for tasks other than classification: the task's figure at which the run is
    finished."""
    patience: int | None = None
    """Scorings without a better accuracy (or figure of the task) after which the run is finished;
    none trains every epoch."""
    checkpoint_every_s: float = 10.0
    """Seconds between two checkpoints."""
    checkpoints: str | None = None
    """Folder or pyarrow.fs URI for the checkpoints, in a folder of the run's name; none keeps them
    in the run's folder."""
    keep_checkpoints: int = 3
    """Checkpoints kept; older ones are removed."""
    keep_best_checkpoints: int = 0
    """Checkpoints kept besides, however old: those with the best accuracy, or figure of the
    task."""
    record_pushes: bool = False
    """Record the order of all pushes, from which `downpour replay` computes the run again."""
    on_refusal: Literal["continue", "stop"] = "continue"
    """What a refused mini-batch (loss or gradient not finite) does to the run."""
    max_refused: int | None = 1000
    """Refused mini-batches after which the run stops all the same; none for no such bound."""
    hang_after_s: float = HANG_AFTER_S
    """Seconds for which a process must show no sign of life, at the least, before it counts as
    hung; ten times the longest such wait, if that is longer. The limits of all other waits are in
    proportion."""

    @property
    def goal(self) -> float | None:
        """The figure at which the run is finished, if there is one."""
        return self.stop_at_metric if self.stop_at_accuracy is None else self.stop_at_accuracy

    def __post_init__(self) -> None:
        for name in ("epochs", "keep_checkpoints"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if self.keep_best_checkpoints < 0:
            raise ValueError(
                f"keep best checkpoints is {self.keep_best_checkpoints}: give 0 or more"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")
        if not 0 < self.evaluation_share <= 1:
            raise ValueError(
                f"evaluation share is {self.evaluation_share}: give a number above 0 and up to 1"
            )
        if self.stop_at_accuracy is not None and not 0 < self.stop_at_accuracy <= 1:
            raise ValueError(
                f"stop at accuracy is {self.stop_at_accuracy}: give a share above 0 and up to 1, "
                "such as 0.975, or none"
            )
        if self.stop_at_accuracy is not None and self.stop_at_metric is not None:
            raise ValueError(
                f"stop at accuracy is {self.stop_at_accuracy} and stop at metric "
                f"{self.stop_at_metric}: give the one that is the task's"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give at least 1 scoring, or none")
        if not LEAST_HANG_AFTER_S <= self.hang_after_s < math.inf:
            raise ValueError(
                f"hang after s is {self.hang_after_s}: give {LEAST_HANG_AFTER_S:g} second or more"
            )
        for name in ("evaluate_every_s", "checkpoint_every_s"):
            if getattr(self, name) <= 0:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give more than 0 seconds")


def active_replicas(config: ReplicaConfig, epochs_done: float) -> int:
    """How many replicas train after `epochs_done` epochs: the warm start, then an even ramp."""
    if epochs_done < config.warm_start_epochs:
        return 1
    if not config.ramp_epochs:
        return config.replicas
    share = min(1.0, (epochs_done - config.warm_start_epochs) / config.ramp_epochs)
    return max(1, min(config.replicas, 1 + int(share * (config.replicas - 1))))


def next_evaluation_s(
    config: PolicyConfig, began_s: float, ended_s: float, shortest_s: float = math.inf
) -> float:
    """When to score again after a scoring from `began_s` to `ended_s`; all on one clock.

    The next one is due after `evaluate_every_s`, or as much later as keeps scoring to its share of
    the time. A scoring that took more than twice the shortest one (`shortest_s`) was held up: the
    machine was suspended, or busy with something else. It counts as twice the shortest, because the
    wait is not what scoring costs.
    """
    took_s = min(ended_s - began_s, 2 * shortest_s)
    return max(ended_s, began_s + max(config.evaluate_every_s, took_s / config.evaluation_share))
