"""What a run leaves at its end: one name for each quantity, in every file and on the screen."""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from pathlib import Path

import pytest
from rich.console import Console

from downpour.cluster.monitoring.display import RESULT_ROWS
from downpour.cluster.monitoring.plots import read_metrics
from downpour.cluster.run.folder import METRICS, RESULT, STATUS
from downpour.cluster.training.result import conclude, make_result
from tests.helpers import tiny
from tests.helpers.runs import Run

OTHERS = {"r2", "rmse", "mae", "f1", "macro_f1", "exact", "miou", "pixel_accuracy"}
"""Figures of tasks beside classification."""


def test_a_quantity_has_one_name_and_one_value_in_result_status_and_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.dataset(tmp_path / "data")
    run = Run(tmp_path / "run", tiny.config(data, replicas=2, partitions=2))
    began_s = time.monotonic()
    outcome = run.go()
    assert conclude(run.folder, run.config, outcome, began_s, Console(file=io.StringIO())) == 0

    result = run.folder.read_json(RESULT)
    keys = {key for key, _, _ in RESULT_ROWS}
    others = {key for key in keys if key.removeprefix("best_").removeprefix("moving_") in OTHERS}
    assert keys - others - {"best_evaluation_loss"} <= set(result), "a row that no result has"
    status = run.folder.read_json(STATUS)
    last = [line for line in read_metrics(run.folder.path / METRICS) if "replicas_alive" in line][
        -1
    ]
    counts = {"updates", "examples", "duplicates", "refused", "dropped", "images_skipped"}
    for written in (status, last):
        assert {key: written[key] for key in counts} == {key: result[key] for key in counts}
    shown = run.shown[-1]
    for key in ("updates", "examples", "duplicates", "refused", "replicas_wanted"):
        assert getattr(shown, key) == status[key]
    assert "duplicates" in capsys.readouterr().out


def test_a_clock_that_jumps_by_three_minutes_changes_no_duration_and_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day differs between machines, and is set while a run lasts.

    It does here between any two looks, in every part: controller, partitions and their followers
    over the network, shufflers, replicas and evaluator.
    """
    clock, jumps = time.time, itertools.cycle([0.0, 180.0, -180.0])
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    began_s = time.monotonic()
    data = tiny.dataset(tmp_path / "data")
    monkeypatch.setattr("downpour.cluster.controller.failures.account.SPARES_AFTER_S", 0.0)
    plain = tiny.config(data, replicas=2, partitions=2)
    network = dataclasses.replace(plain.server.network, transport="network")
    server = dataclasses.replace(plain.server, network=network, hot_standby=True)
    run = Run(tmp_path / "run", dataclasses.replace(plain, server=server))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert outcome.restarts == {}
    result = make_result(run.folder, run.config, outcome, began_s)
    took_s = time.monotonic() - began_s + 0.01  # results are rounded
    assert 0 < result["time_to_first_update_s"] <= took_s
    assert 0 < result["training_s"] <= result["wall_s"] <= took_s
    assert result["updates"] / took_s <= result["updates_per_s"] + 0.1
    for milestone in result["reached"].values():
        assert 0 < milestone["training_s"] <= took_s
