"""What a run's metrics say of its costs, by hand-computed cases."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.cpu_usage import CpuTotals, machine_cpu_s
from downpour.cluster.run.folder import METRICS, RunFolder
from downpour.cluster.simulate.likeness import between, likeness, longest
from downpour.shuffler.delivery import Reading
from downpour.workers.replica.cpu_usage import Spent
from downpour.workers.replica.replicas import WindowReport


def line(second: int, **given: Any) -> dict[str, Any]:
    """A line of metrics of a run of 100 updates a second, 2 of them by a step of 4 ms."""
    return {
        "elapsed_s": 1000.0 + second,
        "updates": 100 * second,
        "epoch": 15.0,
        "replicas_alive": 10,
        "staleness_mean": 49.0,
        "steps": 100 * second,
        "steps_cpu_s": 0.4 * second,
        "replicas_cpu_s": 0.9 * second,
        "partitions_cpu_s": 0.2 * second,
        "reading_s": 0.1 * second,
        "scoring_s": 0.05 * second,
        "scorings": second // 5,
        "machine_cpu_s": 500.0 + 1.5 * second,
        **given,
    }


def config() -> RunConfig:
    return recipes.find("mnist-bn")


def test_two_lines_give_the_costs_of_what_lies_between_them() -> None:
    found = between(line(10), line(30, staleness_mean=51.0), num_partitions=2, threads=2)
    assert found.updates_per_s == pytest.approx(100.0)
    # (3000 x 51 - 1000 x 49) / 2000
    assert found.staleness_mean == pytest.approx(52.0)
    assert found.step_s == pytest.approx(0.004)
    assert found.beside_s == pytest.approx(0.001)  # 9 ms a step, less two threads of 4 ms
    assert found.apply_s == pytest.approx(0.001)  # 2 ms an update, on two partitions
    assert found.read_s == pytest.approx(0.001)
    assert found.score_s == pytest.approx(0.25)
    # 1.5 processors, less 0.9 + 0.2 + 0.1 + 0.05.
    assert found.background == pytest.approx(0.25)


def test_the_longest_time_counts_in_which_everybody_trained_and_nobody_died() -> None:
    lines = [line(s, replicas=9) for s in range(3)]
    lines += [line(s) for s in range(3, 9)]
    lines.insert(6, {"elapsed_s": 1005.5, "updates": 550, "accuracy": 0.9})  # an evaluation
    lines += [line(s, steps=10 * s) for s in range(9, 25)]  # a process was replaced
    found = longest(lines, config())
    assert [row["elapsed_s"] - 1000 for row in found] == list(range(12, 25))
    assert longest([line(1, epoch=0.1)], config()) == []  # the ramp


def test_a_run_that_says_too_little_is_refused_by_name(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "short", config())
    (folder.path / METRICS).write_text("".join(json.dumps(line(s)) + "\n" for s in range(4)))
    with pytest.raises(UserError, match="short has not trained with all of its 10 replicas"):
        likeness(folder, 1, 2)
    (folder.path / METRICS).write_text("".join(json.dumps(line(s)) + "\n" for s in range(9)))
    assert likeness(folder, 1, 2).updates_per_s == pytest.approx(100.0)


def report(spent: Spent | None) -> WindowReport:
    reading = Reading(shuffler=0, rows=64, seconds=0.25, hits=1, misses=0)
    return WindowReport(
        replica=0,
        epoch=0,
        num_batches=2,
        num_examples=64,
        mean_loss=1.0,
        refused=(),
        unsettled=(),
        wall_s=1.0,
        readings=(reading,),
        spent=spent,
    )


def test_processor_time_is_summed_over_processes_and_over_their_lives() -> None:
    totals = CpuTotals()
    first = Spent(source="a", steps=10, steps_cpu_s=1.0, process_cpu_s=1.5)
    for spent in (
        dataclasses.replace(first, steps=5, steps_cpu_s=0.5, process_cpu_s=0.75),
        first,  # the same process, later
        dataclasses.replace(first, source="b"),
        None,
    ):
        totals.trained(report(spent))
    totals.evaluated(0.5)
    values = totals.values([])
    assert values.pop("machine_cpu_s", None) == pytest.approx(machine_cpu_s(), rel=0.01)
    assert values == {
        "steps": 20,
        "steps_cpu_s": 2.0,
        "replicas_cpu_s": 3.0,
        "partitions_cpu_s": 0,
        "reading_s": 1.0,
        "scoring_s": 0.5,
        "scorings": 1,
    }
