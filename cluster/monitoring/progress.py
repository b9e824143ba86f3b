"""Where a run stands at one moment, and that state as a line of text.

Nothing here measures anything: a `Progress` arrives with its numbers, and each of them may be
missing or NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from downpour.cluster.config.run import RunConfig
from downpour.cluster.monitoring.scores import TITLES
from downpour.cluster.monitoring.texts import (
    clock_text,
    number_text,
    of_total,
    rate_text,
)
from downpour.workers.tasks import ACCURACY, Figure


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands at one moment. None stands for what is not known (yet)."""

    elapsed_s: float
    """Seconds since the run began."""

    phase: str
    """What goes on, in a few words: `starting Ray`, `training`, `evaluating`."""

    epoch: int | None = None
    """Epoch under way, from 1, for people."""

    epochs: int | None = None
    """Epochs that the run will have."""

    examples: int | None = None
    """Examples applied by the parameter server."""

    total_examples: int | None = None
    """Examples that the run will have applied at its end."""

    updates: int | None = None
    """Updates applied by the parameter server."""

    updates_per_s: float | None = None
    """Updates a second, over the last few seconds."""

    examples_per_s: float | None = None
    """Examples a second, over the last few seconds."""

    loss: float | None = None
    """Mean training loss of the latest mini-batches."""

    metric: str = ACCURACY
    """The figure that is expected of the task, before there is one."""

    figure: Figure | None = None
    """Accuracy@1 of the latest evaluation, or what the task has in its place."""

    best: Figure | None = None
    """The best of these so far."""

    goal: Figure | None = None
    """The one at which the run is finished, if there is one."""

    staleness_mean: float | None = None
    """Mean staleness, in versions."""

    staleness_p99: float | None = None
    """99th percentile of staleness, in versions."""

    replicas_alive: int | None = None
    """Model replicas at work."""

    replicas_wanted: int | None = None
    """Model replicas that the run is to have."""

    replicas_held: int | None = None
    """Of those at work, how many train while the loss keeps the others back; None: all may."""

    duplicates: int | None = None
    """Pushes ignored because their mini-batch had been applied before."""

    refused: int | None = None
    """Pushes refused: a NaN, an outlier, too stale."""

    @property
    def fraction(self) -> float | None:
        """Part of the run that is done, in [0, 1]; None if that is not known."""
        if self.examples is None or not self.total_examples or self.total_examples < 0:
            return None
        return min(1.0, max(0.0, self.examples / self.total_examples))

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the end at the present rate; None if that is not known."""
        rate = self.examples_per_s
        if self.examples is None or self.total_examples is None or rate is None:
            return None
        if not math.isfinite(rate) or rate <= 0:
            return None
        return max(0, self.total_examples - self.examples) / rate


def goal_of(config: RunConfig) -> Figure | None:
    """Returns the figure at which a run is finished, if there is one."""
    goal = config.policy.goal
    return None if goal is None else Figure(metric=config.model.the_task.metric, value=goal)


def plain_line(progress: Progress) -> str:
    """Returns a state of the run as one line without any control characters."""
    parts = [f"[{clock_text(progress.elapsed_s)}] {progress.phase}"]
    if progress.epoch is not None:
        parts.append(f"epoch {of_total(progress.epoch, progress.epochs)}")
    if progress.fraction is not None:
        parts.append(f"{progress.fraction:.0%}")
    if progress.figure is not None:
        best, goal = progress.best, progress.goal
        until = "" if goal is None else f", until {goal.value_text}"
        beside = "" if best is None else f" (best {best.value_text}{until})"
        title = TITLES[progress.figure.metric]
        parts.append(f"{title} {progress.figure.value_text}{beside}")
    if progress.loss is not None:
        parts.append(f"loss {number_text(progress.loss)}")
    if progress.examples_per_s is not None:
        parts.append(f"{rate_text(progress.examples_per_s)} examples/s")
    if progress.staleness_mean is not None:
        p99 = progress.staleness_p99
        beside = "" if p99 is None else f" (p99 {rate_text(p99)})"
        parts.append(f"staleness {rate_text(progress.staleness_mean)}{beside}")
    if progress.replicas_alive is not None:
        held = progress.replicas_held
        beside = "" if held is None else f" (held at {held})"
        parts.append(
            f"replicas {of_total(progress.replicas_alive, progress.replicas_wanted)}{beside}"
        )
    parts += [
        f"{count:,} {name}"
        for name, count in (("duplicates", progress.duplicates), ("refused", progress.refused))
        if count
    ]
    if progress.remaining_s is not None:
        parts.append(f"ETA {clock_text(progress.remaining_s)}")
    return "  ".join(" ".join(part.split()) for part in parts)
