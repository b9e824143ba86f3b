"""A real run on a machine whose clock is set by minutes while it trains: nobody notices."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.benchmarks.processes import alone
from tests.helpers import commands
from tests.helpers.jumping_clock import JumpingClock
from tests.helpers.small_run import NUM_ROWS, SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]
EPOCHS = 8
JUMP_S = 180
"""Longer than any limit of a wait in a run that trains."""
JUMPS = (JUMP_S, 0, -JUMP_S, 0)
"""What the clock is fast by, each from another place of the run on."""
TRAIN = ("train", "mnist-bn", "--name", "a", "--epochs", str(EPOCHS), "--no-dashboard", *SMALL)
SAYS = "import time; print(time.time())"


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No process is left behind, however a test ends."""
    with alone():
        yield


def test_the_time_of_day_of_a_process_jumps(tmp_path: Path) -> None:
    clock = JumpingClock(tmp_path)

    def time_of_day() -> float:
        command = [sys.executable, "-c", SAYS]
        return float(subprocess.check_output(command, env=clock.environment))

    before = time_of_day()
    clock.jump(1000 * JUMP_S)
    assert time_of_day() > before + 999 * JUMP_S


def test_the_clock_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the driver, of Ray's own processes and of all actors, forwards and back twice."""
    clock = JumpingClock(tmp_path)
    with monkeypatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        process = commands.start(
            *TRAIN, "--runs", tmp_path, log=tmp_path / "log", module="tests.helpers.prompt"
        )
    run, log, began_s = tmp_path / "a", tmp_path / "log", time.monotonic()
    try:
        for number, fast_s in enumerate(JUMPS, 1):
            place = number * EPOCHS * NUM_ROWS // (len(JUMPS) + 2)
            commands.wait_for(
                lambda place=place: commands.examples(run) > place or process.poll() is not None,
                f"{place} examples",
            )
            assert process.poll() is None, log.read_text()
            clock.jump(fast_s)
        family = commands.descendants(process.pid).items()
        actors = [pid for pid, title in family if title.startswith(("ray::Part", "ray::Repl"))]
        assert len(actors) >= 2
        assert all(clock.is_of(pid) for pid in actors)
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        commands.end(process)
    took_s, result = time.monotonic() - began_s, commands.result(run)
    check_result(result, epochs=EPOCHS)
    assert result["process_restarts"] == 0
    said = re.sub(r"\s+", " ", log.read_text())
    for what in ("does not answer", "died", "lost a connection", "stood still", "Traceback"):
        assert what not in said
    assert result["training_s"] < result["wall_s"] < took_s + 1
    assert all(m["elapsed_s"] < took_s + 1 for m in commands.metrics(run))
