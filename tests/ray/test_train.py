"""The real command on a Ray that is there: it trains, survives a death, and ends at its goal."""

import re
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes
from tests.helpers.small_run import NUM_BATCHES, NUM_PUSHES, SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def test_training_the_bundled_digits(trained: Path, tmp_path: Path) -> None:
    result = commands.result(trained)
    check_result(result, epochs=3)
    wanted = {
        *("accuracy", "updates", "examples", "epochs", "replicas", "concurrent_steps"),
        *("batch_size", "updates_per_s", "time_to_first_update_s", "wall_s", "staleness"),
        *("batches_applied", "duplicates", "refused", "seed", "recipe"),
    }
    assert wanted <= set(result)
    staleness = result["staleness"]
    assert {"mean", "p50", "p99", "max"} <= set(staleness)
    # Two processes that each have one push in flight: at most a few of the other's come between.
    assert staleness["mean"] < 3
    assert sum(count for _, count in staleness["histogram"]) == 3 * 3 * NUM_PUSHES
    assert result["accuracy"] > 0.85
    assert (result["recipe"], result["seed"], result["replicas"]) == ("mnist-bn", 0, 4)
    assert (result["concurrent_steps"], result["batch_size"]) == (5, 32)
    for name in ("model.safetensors", "best.safetensors", "plots/training.png", "config.json"):
        assert (trained / name).is_file(), name
    output = (trained.parents[1] / "log").read_text()
    assert str(trained) in re.sub(r"[\s│]+", "", output)
    assert "Traceback" not in output

    assert commands.run("evaluate", trained, log=tmp_path / "evaluate") == 0
    evaluated = (tmp_path / "evaluate").read_text()
    assert f'"accuracy": {result["accuracy"]}' in evaluated
    assert commands.run("status", trained, "--json", log=tmp_path / "status") == 0
    assert '"state": "finished"' in (tmp_path / "status").read_text()
    assert commands.run("resume", trained, log=tmp_path / "again") == 2
    assert "is finished" in (tmp_path / "again").read_text()


def test_a_replica_process_that_is_killed_costs_nothing_but_time(
    ray_here: RayNodes, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    process = commands.start(
        *("train", "mnist-bn", "--runs", run.parent, "--name", "a", "--epochs", "4", *SMALL),
        *("--address", ray_here.address, "--shufflers", "2"),
        log=log,
    )
    try:
        # Of two processes, either may die; on few processors the second comes later.
        commands.wait_for(
            lambda: any(m.get("replicas_alive") == 4 for m in commands.metrics(run)), "all replicas"
        )
        victims = ray_here.processes("Replica")
        assert len(victims) == 2
        commands.kill(min(victims))
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        commands.end(process)
    result = commands.result(run)
    check_result(result, epochs=4)
    assert result["process_restarts"] == 1


def test_a_run_ends_when_it_has_arrived(ray_here: RayNodes, tmp_path: Path) -> None:
    """At the first scoring that reaches the accuracy, and all that a finished run has is there."""
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    arguments = ("--runs", tmp_path / "runs", "--name", "a", "--epochs", "40", "--partitions", "3")
    goal = ("--stop-at-accuracy", "0.8", "--evaluate-every-s", "0.5")
    arguments = (*arguments, "--address", ray_here.address)
    assert commands.run("train", "mnist-bn", *arguments, *SMALL, *goal, log=log) == 0, (
        log.read_text()
    )
    result = commands.result(run)
    assert result["ended_by"] == "accuracy"
    assert "--stop-at-accuracy" in result["ended_because"]
    assert result["exactly_once"] is True
    assert 0.8 <= result["accuracy"] == result["best_accuracy"]
    assert result["updates"] < result["batches_applied"] < 40 * NUM_BATCHES
    rest = result["batches_applied"] % NUM_BATCHES
    assert sum(result["unfinished_epochs"].values()) % NUM_BATCHES == rest
    assert result["bn_statistics"] == "recomputed"
    assert result["bn_gap"] == pytest.approx(result["accuracy"] - result["moving_accuracy"])
    scored = [line for line in commands.metrics(run) if "accuracy" in line]
    assert [line["accuracy"] >= 0.8 for line in scored] == [False] * (len(scored) - 1) + [True]
    assert scored[-1]["bn_gap"] == pytest.approx(result["bn_gap"], abs=1e-6)
    for name in ("model.safetensors", "best.safetensors", "plots/training.png", "report.html"):
        assert (run / name).is_file(), name
    commands.run("evaluate", run, log=tmp_path / "evaluate")
    assert f'"accuracy": {result["accuracy"]}' in (tmp_path / "evaluate").read_text()
    commands.run("status", run, "--json", log=tmp_path / "status")
    assert "--stop-at-accuracy" in (tmp_path / "status").read_text()
    assert "Traceback" not in log.read_text()
