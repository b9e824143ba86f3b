"""The warm start's guard in the whole system: a rate that many steps in flight do not bear."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.leases.warm_start import Course, RampGuard
from downpour.cluster.monitoring.watch import progress
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend

EPOCHS = 15


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def guarded(data: str, factor: float | None) -> RunConfig:
    """One replica with two steps in flight bears this rate; eight with sixteen do not."""
    config = tiny.config(
        data, replicas=8, partitions=1, epochs=EPOCHS, learning_rate=0.8, checkpoint_every_s=0.1
    )
    replicas = dataclasses.replace(
        config.replicas, warm_start_epochs=2, ramp_epochs=4, ramp_guard=factor, queued_windows=1
    )
    windows = dataclasses.replace(config.data, window_batches=3)
    return dataclasses.replace(config, replicas=replicas, data=windows)


def last_losses(run: Run) -> list[float]:
    """Of the lines of metrics in the last third of the run."""
    lines = [
        json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()
    ]
    return [x["loss"] for x in lines if "loss" in x and x["epoch"] > 2 / 3 * EPOCHS]


@pytest.fixture
def actives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replicas the guard lets train, decision by decision."""
    monkeypatch.setattr("downpour.cluster.controller.members.partitions.REPORT_EVERY_S", 0.02)
    found: list[int] = []
    decide = RampGuard.decide

    def noted(self: RampGuard, scheduled: int, replicas: int, epochs: float) -> Course:
        course = decide(self, scheduled, replicas, epochs)
        found.append(course.replicas)
        return course

    monkeypatch.setattr(RampGuard, "decide", noted)
    return found


def test_a_loss_that_rises_with_more_replicas_holds_them_at_fewer(
    tmp_path: Path, data: str, actives: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard is told ten times the loss while more than three train, whatever they learn."""
    saw = RampGuard.saw

    def told(self: RampGuard, loss: float | None, course: int) -> None:
        saw(self, 1.0 if self._state.active <= 3 else 10.0, course)

    monkeypatch.setattr(RampGuard, "saw", told)
    run = Run(tmp_path / "guarded", guarded(data, 2.0))
    run.assert_exactly_once(run.go())
    assert 3 < max(actives) < 8
    assert statistics.fmean(actives[-len(actives) // 4 :]) < 8  # held at fewer to the end
    events = (run.folder.path / "events.jsonl").read_text()
    assert "the loss has risen to 10" in events
    assert "put back to 3 replicas" in events
    lines = [
        json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert any(line.get("replicas_held", 8) < 8 for line in lines)
    shown = [p.replicas_held for p in run.shown if p.replicas_held is not None]
    assert shown
    assert progress(run.folder).replicas_held == run.controller.state.leases.warm_start.held


@pytest.mark.soak
def test_a_rate_that_all_replicas_together_do_not_bear(
    tmp_path: Path, data: str, actives: list[int]
) -> None:
    """How stale gradients are, and so what is borne, is up to the machine and what else it does."""
    free = Run(tmp_path / "free", guarded(data, None))
    free.assert_exactly_once(free.go())
    run = Run(tmp_path / "guarded", guarded(data, 2.0))
    run.assert_exactly_once(run.go())
    assert max(actives) > 1
    assert np.median(last_losses(run)) < np.median(last_losses(free)) / 3
    events = (run.folder.path / "events.jsonl").read_text()
    assert "the loss has risen to" in events
    assert "put back to" in events


@pytest.mark.timeout(120)
def test_a_resumed_run_goes_on_with_what_the_guard_remembers(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downpour.cluster.controller.members.partitions.REPORT_EVERY_S", 0.02)
    run = Run(tmp_path / "run", guarded(data, 2.0))

    def stop(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        remembered = run.controller.state.leases.warm_start.dump()
        assert remembered is not None
        if remembered["holds"]:
            run.controller.request_stop("SIGTERM")

    stopped = run.go(stop)
    assert not stopped.finished
    again = Run(tmp_path / "run", run.config, resume=True)
    assert again.resumed is not None
    assert again.resumed.ramp is not None
    assert again.resumed.ramp["holds"] >= 1
    assert again.controller.state.leases.warm_start.dump() == again.resumed.ramp
    again.assert_exactly_once(again.go())


@pytest.mark.timeout(120)
def test_a_partition_that_dies_during_the_ramp_starts_a_new_best(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", guarded(data, 2.0))
    killed: list[int] = []

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id >= 60 and not killed:
            killed.append(lease.id)
            backend.kill_partition(0)

    outcome = run.go(kill)
    assert killed
    run.assert_exactly_once(outcome)
