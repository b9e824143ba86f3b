"""The real command on a Ray of its own: it stops, dies and is resumed, cleans up."""

import signal
from pathlib import Path

import pytest

from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RunFolder
from tests.helpers import commands
from tests.helpers.small_run import NUM_ROWS, SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def test_a_driver_that_dies_is_resumed_to_every_example_once(tmp_path: Path) -> None:
    """It is told to stop in its first epoch and, resumed, killed in its second."""
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    command: tuple[str | Path, ...] = (
        *("train", "mnist-bn", "--runs", run.parent, "--name", "a", "--epochs", "4"),
        *("--checkpoint-every-s", "0.5", "--no-dashboard", *SMALL),
    )
    before = 0
    for death, told, after in (
        (signal.SIGTERM, "stopped", NUM_ROWS // 4),
        (signal.SIGKILL, "died", NUM_ROWS),
    ):
        goal = max(before, after)
        process = commands.start(*command, log=log)
        try:
            commands.wait_for(lambda goal=goal: commands.examples(run) > goal, f"{goal} examples")
            family = set(commands.descendants(process.pid))
            assert len(family) > 5
            process.send_signal(death)
            status = process.wait(commands.DEADLINE_S)
        finally:
            process.kill()
        assert status == (143 if death == signal.SIGTERM else -9)
        before = commands.examples(run)
        assert not (run / "result.json").exists()
        commands.wait_for(
            lambda family=family: not commands.alive(family), "the end of every process of the run"
        )
        state = tmp_path / f"status after {told}"
        assert commands.run("status", run, "--json", log=state) == 0
        assert f'"state": "{told}' in state.read_text()
        command = ("resume", run, "--no-dashboard")

    newest, _ = CheckpointStore(RunFolder.open(run).checkpoints_uri).latest()
    assert newest is not None
    assert commands.run(*command, log=log) == 0, log.read_text()
    output = log.read_text()
    assert output.count("resuming from checkpoint") == 2
    assert "Traceback" not in output
    result = commands.result(run)
    check_result(result, epochs=4)
    assert 0 < before < 4 * NUM_ROWS
    # It is of all sessions, and not of the last one alone.
    assert newest.updates > 0
    assert result["elapsed_s"] >= newest.elapsed_s + result["training_s"] - 0.02  # both rounded
    pushes = sum(count for _, count in result["staleness"]["histogram"])
    assert pushes == result["partitions"] * result["updates"]


def test_what_is_wrong_with_the_model_leaves_nothing_behind(tmp_path: Path) -> None:
    """It is found while Ray starts, since that is when PyTorch is imported."""
    log, runs = tmp_path / "log", tmp_path / "runs"
    arguments = ("--runs", runs, "--partitions", "99999", "--no-dashboard")
    assert commands.run("train", "mnist-bn", *arguments, log=log) == 2
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("downpour: error: partitions is 99999")
    assert lines[-1].endswith("give 6250 or fewer")
    assert "Traceback" not in log.read_text()
    assert list(runs.iterdir()) == []
