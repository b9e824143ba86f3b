"""The table and the record of `bench learning`, and its plot."""

import json
from pathlib import Path

import pytest

from downpour.benchmarks import harness
from downpour.benchmarks.harness import Settings
from downpour.benchmarks.learning import benchmark
from downpour.benchmarks.learning.peers import AVERAGED_LIMIT, LIMIT, QUICK, SYSTEM, peers
from downpour.benchmarks.learning.plot import plot
from downpour.benchmarks.learning.search import Found
from tests.helpers.learning_curves import FAST, NEVER, SLOW


def test_the_report_has_everybody_at_every_goal(tmp_path: Path) -> None:
    names = (LIMIT, AVERAGED_LIMIT, SYSTEM, "ddp")
    wanted = {k: p for k, p in peers(2, quick=True).items() if k in names}
    found = {
        name: Found(best=QUICK.grid(peer).settings(peer.shapes[0])[0], trials=(), left_out=0)
        for name, peer in wanted.items()
    }
    round_ = {LIMIT: SLOW, AVERAGED_LIMIT: FAST, SYSTEM: FAST, "ddp": NEVER}
    rounds = [round_, round_]
    report = benchmark.report(wanted, found, rounds, QUICK, {})
    assert len(report.rows) == 4 * len(QUICK.goals)
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.result[SYSTEM]["goals"]["0.5"]["ratio_to_plain"] == pytest.approx(3 / 8)
    assert report.result[SYSTEM]["goals"]["0.5"]["ratio_to_averaged"] == pytest.approx(1)
    assert report.result["ddp"]["goals"]["0.5"]["arrived"] == 0
    assert report.result["ddp"]["best_accuracy"] == 0.45
    assert report.rows[-1][4] == "never"
    assert report.notes[0] == "DDP, 2 ranks never had 50.0% within its time, and 45.00% at best."
    record = json.loads(json.dumps(harness.record(report, Settings.quickly(), {})))
    plot(record, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
