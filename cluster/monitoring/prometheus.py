"""Figures of a run for Prometheus, through `ray.util.metrics`.

All of them come from the driver, which takes them from the reports of partitions and windows. So
the hot path counts nothing for them, and an actor that is replaced goes on under its old tags. Each
figure is tagged with the run; those of a partition, a replica or a shuffler also with its number.

Ray adds the prefix `ray_` to the names below, and the suffix `_total` to counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from downpour.cluster.monitoring.observation import Observation
from downpour.cluster.monitoring.scores import DECIDING, FIGURES
from downpour.cluster.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.replica.replicas import WindowReport

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure."""

    kind: Kind
    help: str
    tags: tuple[str, ...] = ()
    """Besides `run`, which every figure has."""


LATENCIES_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
STALENESS = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000)
"""Upper bounds of the staleness histogram's buckets, in versions."""

OF_TASKS: Mapping[str, Metric] = {
    **{
        f"downpour_{name}": Metric(kind="gauge", help=f"Validation: {what}.")
        for name, what in FIGURES.items()
    },
    **{
        f"downpour_best_{name}": Metric(kind="gauge", help=f"The best so far: {FIGURES[name]}.")
        for name in DECIDING
    },
    **{
        f"downpour_moving_{name}": Metric(
            kind="gauge",
            help=f"With the server's moving averages of the BN statistics: {FIGURES[name]}.",
        )
        for name in DECIDING
    },
}
"""The figures of tasks other than classification; a run has those of its own task."""

METRICS: Mapping[str, Metric] = {
    "downpour_updates": Metric(
        kind="counter", help="Updates applied by a partition.", tags=("partition",)
    ),
    "downpour_examples": Metric(kind="counter", help="Examples applied."),
    "downpour_epoch": Metric(kind="gauge", help="Epochs of examples applied."),
    "downpour_loss": Metric(kind="gauge", help="Mean training loss of the latest window."),
    "downpour_loss_not_finite": Metric(
        kind="gauge", help="1 if the latest window had no finite loss, else 0."
    ),
    "downpour_accuracy": Metric(kind="gauge", help="Validation accuracy@1 in [0, 1]."),
    "downpour_best_accuracy": Metric(kind="gauge", help="The highest accuracy@1 so far."),
    "downpour_evaluation_loss": Metric(kind="gauge", help="Mean loss of the evaluation split."),
    "downpour_moving_accuracy": Metric(
        kind="gauge",
        help="Validation accuracy@1 with the server's moving averages of the BN statistics.",
    ),
    "downpour_bn_gap": Metric(
        kind="gauge",
        help="Accuracy with recomputed BN statistics less that with the server's averages.",
    ),
    "downpour_learning_rate": Metric(kind="gauge", help="The learning rate."),
    "downpour_staleness_pushes": Metric(
        kind="counter",
        help="Pushes applied with a staleness of at most `le` versions.",
        tags=("partition", "le"),
    ),
    "downpour_staleness_bound": Metric(
        kind="gauge", help="The configured bound of staleness, in versions."
    ),
    "downpour_staleness_p99": Metric(
        kind="gauge", help="99th percentile of staleness over the session, in versions."
    ),
    "downpour_partition_version": Metric(
        kind="gauge",
        help="Version of a partition: updates applied since the run began.",
        tags=("partition",),
    ),
    "downpour_partition_connections": Metric(
        kind="gauge", help="Processes connected to a partition.", tags=("partition",)
    ),
    "downpour_duplicates": Metric(
        kind="counter", help="Pushes ignored as duplicates.", tags=("partition",)
    ),
    "downpour_refusals": Metric(
        kind="counter", help="Pushes refused or dropped, by cause.", tags=("partition", "cause")
    ),
    "downpour_bn_drift": Metric(
        kind="gauge",
        help="Distance of the BN moving means from the means of late, in standard deviations.",
        tags=("partition",),
    ),
    "downpour_push_seconds": Metric(
        kind="histogram",
        help="From a push to the last answer; mean of a window.",
        tags=("replica",),
    ),
    "downpour_pull_wait_seconds": Metric(
        kind="histogram",
        help="Wait for weights before a step; mean of a window.",
        tags=("replica",),
    ),
    "downpour_window_seconds": Metric(
        kind="histogram", help="Time to train a window.", tags=("replica",)
    ),
    "downpour_steps": Metric(
        kind="counter", help="Mini-batches trained on, by windows.", tags=("replica",)
    ),
    "downpour_push_bytes": Metric(kind="counter", help="Bytes of gradients pushed."),
    "downpour_pull_bytes": Metric(kind="counter", help="Bytes of weights pulled."),
    "downpour_replicas": Metric(kind="gauge", help="Replicas, by state.", tags=("state",)),
    "downpour_leases": Metric(kind="gauge", help="Windows leased to replicas."),
    "downpour_queue_depth": Metric(
        kind="gauge", help="Windows that wait at a replica behind the one in work."
    ),
    "downpour_leases_returned": Metric(kind="counter", help="Windows leased again."),
    "downpour_restarts": Metric(kind="counter", help="Actors replaced.", tags=("kind",)),
    "downpour_shuffler_rows": Metric(kind="counter", help="Rows delivered.", tags=("shuffler",)),
    "downpour_shuffler_seconds": Metric(
        kind="counter", help="Time spent on deliveries.", tags=("shuffler",)
    ),
    "downpour_shuffler_cache": Metric(
        kind="counter",
        help="Row groups wanted, by where they were found.",
        tags=("shuffler", "result"),
    ),
    **OF_TASKS,
}


SCORED = (
    *("downpour_accuracy", "downpour_best_accuracy", "downpour_moving_accuracy"),
    *("downpour_evaluation_loss", "downpour_bn_gap", *OF_TASKS),
)
"""What a scoring may have."""


class PrometheusSink:
    """Keeps Ray's metrics up to date with what is observed."""

    def __init__(
        self,
        *,
        run: str,
        push_bytes: int,
        pull_bytes: int,
        steps_per_push: int,
        steps_per_pull: int,
        staleness_bound: int,
        make: Callable[[str, Metric], Any] | None = None,
    ) -> None:
        """Make the metrics.

        Args:
            run: the run's name.
            push_bytes: bytes of one push.
            pull_bytes: bytes of one pull.
            steps_per_push: steps whose gradients are added up before a push.
            steps_per_pull: steps between two pulls.
            staleness_bound: the configured bound, in versions.
            make: makes a metric of a name; by default with Ray.
        """
        make = make or _ray_metric
        self._metrics = {name: make(name, metric) for name, metric in METRICS.items()}
        self._run = run
        self._bytes = (push_bytes / steps_per_push, pull_bytes / steps_per_pull)
        self._bound = staleness_bound
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}
        self._born: set[tuple[str, tuple[str, ...]]] = set()

    def trained(self, report: WindowReport) -> None:
        """See `Sink`."""
        replica = str(report.replica)
        self._metric("downpour_steps", report.num_batches, replica)
        self._metric("downpour_push_seconds", report.push_s, replica)
        self._metric("downpour_pull_wait_seconds", report.pull_s, replica)
        self._metric("downpour_window_seconds", report.wall_s, replica)
        self._metric("downpour_push_bytes", report.num_batches * self._bytes[0])
        self._metric("downpour_pull_bytes", report.num_batches * self._bytes[1])
        loss = report.mean_loss
        finite = loss is not None and math.isfinite(loss)
        self._metric("downpour_loss_not_finite", 0 if finite else 1)
        if finite:
            self._metric("downpour_loss", loss)
        for reading in report.readings:
            shuffler = str(reading.shuffler)
            self._metric("downpour_shuffler_rows", reading.rows, shuffler)
            self._metric("downpour_shuffler_seconds", reading.seconds, shuffler)
            self._counted("downpour_shuffler_cache", reading.hits, shuffler, "hit")
            self._counted("downpour_shuffler_cache", reading.misses, shuffler, "miss")

    def observed(self, observation: Observation) -> None:
        """See `Sink`."""
        values = observation.values
        self._counted("downpour_examples", values["examples"])
        self._metric("downpour_epoch", values["epoch"])
        self._metric("downpour_learning_rate", values["learning_rate"])
        self._metric("downpour_staleness_p99", values["staleness_p99"])
        self._metric("downpour_staleness_bound", self._bound)
        for report in observation.reports:
            self._partition(report)
        for state, count in observation.replicas.items():
            self._metric("downpour_replicas", count, state)
        self._metric("downpour_leases", observation.leases.outstanding)
        self._metric("downpour_queue_depth", observation.leases.queued)
        self._counted("downpour_leases_returned", observation.leases.returned)
        for kind, count in observation.restarts.items():
            self._counted("downpour_restarts", count, kind)

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        for name in SCORED:
            value = values.get(name.removeprefix("downpour_"))
            if value is not None and math.isfinite(value):
                self._metric(name, value)

    def saved(self, checkpoint: Checkpoint) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """Nothing: Ray sends what is left."""

    def _partition(self, report: PartitionReport) -> None:
        index = str(report.index)
        self._counted("downpour_updates", report.version, index)
        self._metric("downpour_partition_version", report.version, index)
        self._metric("downpour_partition_connections", report.connections, index)
        self._metric("downpour_bn_drift", report.drift, index)
        self._counted("downpour_duplicates", report.duplicates, index)
        causes = {
            "not finite": report.refused,
            "too stale": report.dropped,
            "malformed": report.malformed,
        }
        for cause, count in causes.items():
            self._counted("downpour_refusals", count, index, cause)
        for bound, count in cumulative(report.staleness).items():
            self._counted("downpour_staleness_pushes", count, index, bound)

    def _counted(self, name: str, total: float, *tags: str) -> None:
        """Add to a counter whose total is known; after an actor was replaced it may be smaller."""
        key = (name, tags)
        before = self._last.get(key, 0.0)
        self._last[key] = total
        self._metric(name, max(0.0, total - before), *tags)

    def _metric(self, name: str, value: float | None, *tags: str) -> None:
        if value is None:
            return
        metric, definition = self._metrics[name], METRICS[name]
        labels = {"run": self._run, **dict(zip(definition.tags, tags, strict=True))}
        if definition.kind == "gauge":
            metric.set(value, labels)
        elif definition.kind == "histogram":
            metric.observe(max(value, 1e-9), labels)
        elif value or (name, tags) not in self._born:
            # A counter that is never increased does not exist, and no alert can look at it.
            self._born.add((name, tags))
            metric.inc(value or 1e-12, labels)


def cumulative(staleness: Mapping[int, list[int]]) -> dict[str, int]:
    """Return the pushes by upper bound of their staleness.

    Args:
        staleness: by replica, the counts of each bin of `Histogram`, exact up to all bounds.
    """
    counts: list[int] = []
    for of_replica in staleness.values():
        counts += [0] * (len(of_replica) - len(counts))
        for i, n in enumerate(of_replica):
            counts[i] += n
    found = {str(bound): sum(counts[: bound + 1]) for bound in STALENESS}
    return found | {"+Inf": sum(counts)}


def _ray_metric(name: str, metric: Metric) -> Any:
    from ray.util import metrics

    tags = ("run", *metric.tags)
    if metric.kind == "histogram":
        return metrics.Histogram(
            name, description=metric.help, boundaries=list(LATENCIES_S), tag_keys=tags
        )
    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(name, description=metric.help, tag_keys=tags)
