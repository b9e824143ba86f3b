"""Deaths and full disks while checkpoints are written: the last good one is always there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.cluster.run.checkpoint import CheckpointStore
from tests.helpers import tiny
from tests.helpers.runs import Run

ROOT = Path(__file__).resolve().parents[4]


def test_kill_9_at_every_point_of_writing_a_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.checkpoint_deaths", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 30, "many points"
    killed, (whole,) = lines[:-1], lines[-1:]
    assert all(signaled == "True" for _, _, signaled in killed)
    # All but the last point, which is after the move that finishes the checkpoint.
    assert {tuple(line[:2]) for line in killed[:-1]} == {("1", "1")}
    assert killed[-1][:2] == ["2", "0"]
    assert whole == ["2", "0", "False"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB, where one checkpoint of the tiny model fits, and two do not."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "downpour-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_costs_checkpoints_and_not_the_run(
    tmp_path: Path, small_disk: Path
) -> None:
    data = tiny.dataset(tmp_path / "data")
    config = tiny.config(data, epochs=3, checkpoint_every_s=0.1, checkpoints=str(small_disk))
    run = Run(tmp_path / "run", config)
    (small_disk / "ballast").write_bytes(bytes(20 << 10))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    events = (run.folder.path / "events.jsonl").read_text()
    assert "a checkpoint could not be written" in events
    assert "No space left on device" in events
    assert "going on, the last good one is" in events
    newest, _ = CheckpointStore(run.folder.checkpoints_uri).latest()
    assert newest is not None
    assert run.folder.checkpoints_uri == (small_disk / "run").as_uri()

    again = Run(tmp_path / "run", config, resume=True)
    again.assert_exactly_once(again.go())
