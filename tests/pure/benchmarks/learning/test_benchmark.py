"""The table and the record of `bench learning`, and its plot."""

import json
from pathlib import Path

import pytest

from downpour.benchmarks import harness
from downpour.benchmarks.harness import BadSettings, Settings
from downpour.benchmarks.learning import benchmark
from downpour.benchmarks.learning.curve import Curve, Look
from downpour.benchmarks.learning.peers import LIMIT, QUICK, SYSTEM, peers
from downpour.benchmarks.learning.plot import plot
from downpour.benchmarks.learning.search import Found
from downpour.benchmarks.learning.train import configure


def curve(*points: tuple[float, float]) -> Curve:
    looks = tuple(
        Look(examples=round(1000 * s), updates=round(s), epoch=s / 10, seconds=s, accuracy=a)
        for s, a in points
    )
    return Curve(startup_s=2, scoring_s=0, looks=looks, ended="arrived")


SLOW, FAST, NEVER = curve((4, 0.4), (8, 0.6)), curve((2, 0.4), (3, 0.6)), curve((9, 0.45))


def test_one_that_never_arrives_is_later_than_all() -> None:
    found = benchmark.arrivals([SLOW, FAST, NEVER], 0.5, 16.0)
    assert found["arrived"] == 2
    assert (found["training_s"], found["training_s_min"], found["training_s_max"]) == (8, 3, None)
    assert found["wall_s"] == 10
    assert found["examples"] == 8000
    assert found["ratio_to_plain"] == 0.5
    lost = benchmark.arrivals([SLOW, NEVER, NEVER], 0.5, 16.0)
    assert lost["training_s"] is None
    assert lost["ratio_to_plain"] is None
    assert benchmark.arrivals([FAST], 0.5, float("inf"))["ratio_to_plain"] is None


def test_the_report_has_everybody_at_every_goal(tmp_path: Path) -> None:
    wanted = {k: p for k, p in peers(2, quick=True).items() if k in (LIMIT, SYSTEM, "ddp")}
    found = {
        name: Found(best=QUICK.grid(peer).settings(peer.shapes[0])[0], trials=(), left_out=0)
        for name, peer in wanted.items()
    }
    rounds = [{LIMIT: SLOW, SYSTEM: FAST, "ddp": NEVER}, {LIMIT: SLOW, SYSTEM: FAST, "ddp": NEVER}]
    report = benchmark.report(wanted, found, rounds, QUICK, {})
    assert len(report.rows) == 3 * len(QUICK.goals)
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.result[SYSTEM]["goals"]["0.5"]["ratio_to_plain"] == pytest.approx(3 / 8)
    assert report.result["ddp"]["goals"]["0.5"]["arrived"] == 0
    assert report.result["ddp"]["best_accuracy"] == 0.45
    assert report.rows[-1][4] == "never"
    assert report.notes[0] == "DDP, 2 ranks never had 50.0% within its time, and 45.00% at best."
    record = json.loads(json.dumps(harness.record(report, Settings.quickly(), {})))
    plot(record, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_this_system_trains_its_recipe_as_it_is_but_for_what_the_search_sets() -> None:
    peer = peers(2)[SYSTEM]
    setting = benchmark.FULL.grid(peer).settings(peer.shapes[0])[-1]
    config = configure(setting, seed=7, bounds=benchmark.FULL)
    assert config.server.schedule.learning_rate == setting.learning_rate
    assert config.server.schedule.decay_factor == setting.decay
    assert (config.replicas.replicas, config.replicas.steps.concurrent_steps) == (10, 5)
    assert (config.data.batch_size, config.policy.seed) == (32, 7)


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(BadSettings, match="there is no peer 'horovod'"):
        benchmark.run(Settings(only=("horovod",)), print)
