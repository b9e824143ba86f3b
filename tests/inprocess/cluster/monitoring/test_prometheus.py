"""What Prometheus is told of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from downpour.cluster.monitoring.observation import Leases, Observation
from downpour.cluster.monitoring.prometheus import METRICS, Metric, PrometheusSink, cumulative
from downpour.shuffler.delivery import Reading
from downpour.workers.evaluation.metrics import metrics_of
from tests.helpers.monitoring import VALUES, partition


class FakeMetric:
    """Remembers what Ray would be told."""

    def __init__(self, name: str, definition: Metric) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.tags = ("run", *definition.tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tags)
        self.values[tuple(tags.values())] = value

    observe = set

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.set(self.values.get(tuple(tags.values()), 0.0) + value, tags)


def made_sink() -> tuple[PrometheusSink, dict[str, FakeMetric]]:
    made: dict[str, FakeMetric] = {}

    def make(name: str, definition: Metric) -> FakeMetric:
        return made.setdefault(name, FakeMetric(name, definition))

    sink = PrometheusSink(
        run="a",
        push_bytes=8,
        pull_bytes=4,
        steps_per_push=2,
        steps_per_pull=1,
        staleness_bound=200,
        make=make,
    )
    return sink, made


@pytest.mark.parametrize("task", ["regression", "multilabel", "segmentation"])
def test_each_task_has_its_own_figures(task: str) -> None:
    sink, made = made_sink()
    metrics = metrics_of(task)
    assert metrics is not None
    figures = metrics.compute()  # all of a task's, and NaN, since nothing has been scored
    deciding = next(iter(figures))
    sink.evaluated(figures)
    assert not any(made[f"downpour_{name}"].values for name in figures)
    shown = dict.fromkeys(figures, 0.25)
    sink.evaluated({**shown, f"best_{deciding}": 0.5, f"moving_{deciding}": -1.0})
    told = {name: metric.values["a",] for name, metric in made.items() if metric.values}
    assert told == {
        **{f"downpour_{name}": 0.25 for name in figures},
        f"downpour_best_{deciding}": 0.5,
        f"downpour_moving_{deciding}": -1.0,
    }


def test_a_partition_that_is_replaced_goes_on_under_its_tags() -> None:
    sink, made = made_sink()
    for version in (100, 130, 110, 150):  # the third comes from a snapshot
        sink.observed(
            Observation(
                values=VALUES,
                reports=[partition(0, version)],
                replicas={"training": 2},
                leases=Leases(outstanding=4, queued=2),
                restarts={"partition": 1},
            )
        )
    assert made["downpour_updates"].values["a", "0"] == 100 + 30 + 40
    assert made["downpour_partition_version"].values["a", "0"] == 150
    assert made["downpour_staleness_pushes"].values["a", "0", "1"] == 8
    assert made["downpour_staleness_pushes"].values["a", "0", "+Inf"] == 13
    assert made["downpour_refusals"].values["a", "0", "too stale"] == 2
    assert made["downpour_refusals"].values["a", "0", "malformed"] < 1e-6
    assert made["downpour_queue_depth"].values["a",] == 2
    reading = Reading(shuffler=1, rows=64, seconds=0.5, hits=3, misses=1)
    window = SimpleNamespace(
        replica=7,
        push_s=0.01,
        pull_s=0.0,
        wall_s=1.0,
        num_batches=10,
        mean_loss=2.0,
        readings=(reading,),
    )
    sink.trained(window)  # type: ignore[arg-type]
    window.mean_loss = None
    sink.trained(window)  # type: ignore[arg-type]
    assert made["downpour_push_bytes"].values["a",] == 2 * 10 * 4
    assert made["downpour_loss"].values["a",] == 2.0
    assert made["downpour_steps"].values["a", "7"] == 2 * 10
    assert made["downpour_loss_not_finite"].values["a",] == 1
    assert made["downpour_shuffler_cache"].values["a", "1", "hit"] == 3


def test_ray_takes_names_and_texts_of_ascii_alone() -> None:
    assert all(f"{name} {metric.help}".isascii() for name, metric in METRICS.items())


def test_buckets_of_staleness_are_cumulative() -> None:
    found = cumulative({0: [1, 2], 1: [0, 0, 0, 7]})
    assert (found["0"], found["1"], found["2"], found["5"], found["+Inf"]) == (1, 3, 3, 10, 10)
