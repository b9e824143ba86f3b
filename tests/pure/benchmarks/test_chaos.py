"""Runs of `bench chaos` that are gathered in one record."""

import json
from collections import Counter
from pathlib import Path

import pytest

from downpour.benchmarks.chaos import Disturbed, add
from downpour.benchmarks.harness import BadSettings


def test_runs_are_added_up_in_one_record(tmp_path: Path) -> None:
    into = tmp_path / "chaos.json"
    short = ["--epochs", "2"]
    one = Disturbed(seed=1, accuracy=0.9, faults=Counter(replicas=2, driver=1), resumed=1)
    add(one, short, into, {"commit": "abc"})
    add(Disturbed(seed=2, accuracy=0.95), short, into, {})
    report = add(Disturbed(seed=3, accuracy=0.8, faults=Counter(replicas=1)), short, into, {})
    assert report.result["faults"] == {"replicas": 3, "driver": 1}
    assert report.result["accuracy_disturbed"] == [0.9, 0.8]
    assert report.result["accuracy_undisturbed"] == [0.95]
    assert report.title.startswith("4 random faults (kill -9) over 2 runs")
    kept = json.loads(into.read_text())
    assert [r["seed"] for r in kept["rounds"]] == [1, 2, 3]
    assert kept["result"] == report.result
    with pytest.raises(BadSettings, match="holds runs of --epochs 2"):
        add(one, [], into, {})
    assert json.loads(into.read_text()) == kept
