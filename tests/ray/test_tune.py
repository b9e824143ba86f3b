"""Eight rates with ASHA find one of the best two, in less than half of a full grid's steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import commands

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(1800)]

SEARCH = """
import sys
from examples.tune import rates, trainer
frame = rates(trainer(), asha=sys.argv[1] == "asha").get_dataframe()
assert not frame["accuracy"].isna().any()
frame = frame.rename(columns={"config/learning_rate": "rate"})
frame[["rate", "accuracy", "examples"]].to_json(sys.argv[2], orient="records")
"""

NOISE = 0.003
"""By how much the accuracies of two runs with the same rate may differ."""


def search(kind: str, folder: Path) -> list[dict[str, float]]:
    """Each trial's rate, last accuracy, and examples."""
    found = folder / f"{kind}.json"
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, kind, found],
        cwd=folder,
        env={**variables, "PYTHONPATH": str(commands.ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    trials: list[dict[str, float]] = json.loads(found.read_text())
    assert len(trials) == 8
    return trials


def test_asha_finds_one_of_the_best_two_rates_in_fewer_steps(tmp_path: Path) -> None:
    grid, asha = search("grid", tmp_path), search("asha", tmp_path)
    of_rate = {trial["rate"]: trial["accuracy"] for trial in grid}
    chosen = max(asha, key=lambda trial: trial["accuracy"])
    steps = [sum(trial["examples"] for trial in trials) for trials in (asha, grid)]
    figures = f"grid {of_rate}, asha {asha}, {steps[0] / steps[1]:.1%} of its examples"
    sys.stdout.write(f"{figures}\n")
    second = sorted(of_rate.values())[-2]
    assert of_rate[chosen["rate"]] >= second - NOISE, figures
    assert steps[0] < 0.5 * steps[1], figures
    for run in (tmp_path / "runs" / "rates-grid").iterdir():
        assert json.loads((run / "result.json").read_text())["exactly_once"] is True
