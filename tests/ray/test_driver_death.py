"""A driver that is killed (kill -9) in a Ray cluster that goes on: what it leaves is taken over."""

import json
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes
from tests.helpers.small_run import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]
KINDS = ("Partition", "Replica", "Evaluator", "Shuffler", "Follower")


def test_processes_outlive_their_driver_and_go_on_for_the_next(
    tmp_path: Path, ray_here: RayNodes
) -> None:
    """There is no checkpoint, so each update of the first session is there because it lived on."""
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    process = commands.start(
        *("train", "mnist-bn", "--runs", run.parent, "--name", "a", "--epochs", "4"),
        *("--hot-standby", "--spares", "none", "--checkpoint-every-s", "1000"),
        *("--address", ray_here.address, *SMALL),
        log=log,
    )
    try:
        commands.wait_for(lambda: commands.updates(run) > 20, "some training")
        (partition,) = ray_here.processes("Partition")
    finally:
        process.kill()
        process.wait(commands.DEADLINE_S)
    before = commands.updates(run)

    process = commands.start("resume", run, "--address", ray_here.address, log=log)
    try:
        commands.wait_for(lambda: commands.updates(run) > before + 20, "updates of the next driver")
        assert commands.alive({partition})
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        process.kill()
    output = log.read_text()
    assert "the run's processes have outlived their driver: going on at" in output
    assert "starting from the beginning" not in output
    assert "Traceback" not in output
    result = commands.result(run)
    check_result(result, epochs=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line["updates"] for line in lines if "replicas_alive" in line]
    assert updates == sorted(updates), "a version went back"
    assert not (run / "members.json").exists()
    commands.wait_for(
        lambda: not any(ray_here.processes(kind) for kind in KINDS),
        "the end of every process of the run",
    )
