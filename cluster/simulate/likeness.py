"""What a measured run's folder says of its costs, as the inputs of a simulation.

`metrics.jsonl` has cumulative processor seconds (`cluster.monitoring.cpu_usage`); two of its lines,
between which everybody trained and nobody died, give what a step and a push cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from downpour.cluster.config.resolve import num_processes, num_threads
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.plots import Metrics, read_metrics
from downpour.cluster.run.folder import METRICS, RunFolder

COUNTERS = ("steps", "steps_cpu_s", "replicas_cpu_s", "partitions_cpu_s", "updates")
FEWEST_S = 3.0
"""Costs are taken from no shorter time than this."""
LEFT_OUT_S = 2.0
"""After the last of the replicas has come: first steps cost more, and are recorded."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """What a run showed while all of its replicas trained."""

    seconds: float
    """That it was looked at."""
    updates_per_s: float
    staleness_mean: float
    threads: int
    """That a step was computed on."""
    step_s: float
    """Processor seconds of a step, on each of them."""
    beside_s: float
    """Of a mini-batch, on other threads of the processes of replicas."""
    apply_s: float
    """Of a push, on the thread of one partition."""
    read_s: float
    """Of a mini-batch at the shuffler; wall time."""
    score_s: float
    """Of an evaluation; wall time."""
    background: float
    """Processors that nothing of the above has used, or 0 where the run does not tell."""


def likeness(folder: RunFolder, num_partitions: int, num_processors: int) -> Likeness:
    """What the metrics of `folder` say, a run on one machine with so many processors.

    A one-line error where they do not say enough.
    """
    config = folder.config()
    if config.replicas.steps.device != "cpu":
        raise UserError(
            f"{folder.path} was trained with replica device {config.replicas.steps.device}, whose "
            "time its metrics do not tell: name a run on processors"
        )
    stretch = longest(read_metrics(folder.path / METRICS), config)
    if not stretch or stretch[-1]["elapsed_s"] - stretch[0]["elapsed_s"] < FEWEST_S:
        raise UserError(
            f"{folder.path} has not trained with all of its {config.replicas.replicas} replicas "
            f"for {FEWEST_S:g} s without a death since version 0.1 began to note costs: name "
            "another run"
        )
    count = num_processes(config.replicas, num_processors)
    threads = num_threads(config.policy, count, num_processors)
    return between(stretch[0], stretch[-1], num_partitions, threads)


def longest(metrics: Metrics, config: RunConfig) -> Sequence[Mapping[str, Any]]:
    """The longest stretch of lines in which everybody trains and every counter only grows."""
    return max(_stretches(metrics, config), key=len, default=[])


def _stretches(metrics: Metrics, config: RunConfig) -> Iterator[list[Mapping[str, Any]]]:
    replicas = config.replicas
    whole_after = replicas.warm_start_epochs + replicas.ramp_epochs
    stretch: list[Mapping[str, Any]] = []
    since: float | None = None
    for line in metrics:
        if "replicas_alive" not in line:
            continue  # an evaluation
        whole = line["replicas_alive"] == replicas.replicas and line["epoch"] >= whole_after
        grows = not stretch or all(line[name] >= stretch[-1][name] for name in COUNTERS)
        if not (whole and grows and all(name in line for name in COUNTERS)):
            yield stretch
            stretch, since = [], None
            continue
        since = line["elapsed_s"] if since is None else since
        if line["steps"] and line["elapsed_s"] - since >= LEFT_OUT_S:
            stretch.append(line)
    yield stretch


def between(
    begin: Mapping[str, Any], end: Mapping[str, Any], num_partitions: int, threads: int
) -> Likeness:
    """What two lines of metrics say of the time between them.

    The helpers of a step's thread are at work, or look out for work, for as long as it is.
    """
    spent = {n: end[n] - begin[n] for n in (*COUNTERS, "reading_s", "scoring_s", "elapsed_s")}
    seconds, steps, updates = spent["elapsed_s"], max(1, spent["steps"]), max(1, spent["updates"])
    background = 0.0
    if "machine_cpu_s" in begin and "machine_cpu_s" in end:
        ours = sum(
            spent[n] for n in ("replicas_cpu_s", "partitions_cpu_s", "reading_s", "scoring_s")
        )
        background = (end["machine_cpu_s"] - begin["machine_cpu_s"] - ours) / seconds
    scorings = end["scorings"] - begin["scorings"]
    total = end["updates"] * end["staleness_mean"] - begin["updates"] * begin["staleness_mean"]
    return Likeness(
        seconds=seconds,
        updates_per_s=spent["updates"] / seconds,
        staleness_mean=total / updates,
        threads=threads,
        step_s=spent["steps_cpu_s"] / steps,
        beside_s=max(0.0, spent["replicas_cpu_s"] - threads * spent["steps_cpu_s"]) / steps,
        apply_s=spent["partitions_cpu_s"] / updates / num_partitions,
        read_s=spent["reading_s"] / steps,
        score_s=spent["scoring_s"] / scorings if scorings else 0.0,
        background=max(0.0, background),
    )
