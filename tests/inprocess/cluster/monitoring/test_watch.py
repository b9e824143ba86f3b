"""A run is watched and stopped through its folder."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.watch import end, progress, states, stop, watch
from downpour.cluster.run.folder import RunFolder
from tests.helpers.monitoring import VALUES


def test_a_run_is_watched_until_it_ends(folder: RunFolder) -> None:
    console = Console(record=True, width=200, force_terminal=False)
    seen = progress(folder)
    assert seen.figure is not None
    assert seen.best is not None
    assert (seen.figure.value, seen.best.value) == (0.8, 0.9)
    assert seen.total_examples == 3200 * 20 * folder.config().policy.epochs
    with folder.locked():
        assert end(folder) is None
        pauses = []

        def pause(_: float) -> None:
            pauses.append(1)
            folder.write_json("result.json", {"accuracy": 0.9})

        assert watch(folder, once=False, console=console, pause=pause) == 0
    assert pauses == [1]
    assert "finished with an accuracy of 90.00%" in console.export_text()


def test_a_run_that_nobody_trains_has_died(folder: RunFolder) -> None:
    assert end(folder) == f"died: `downpour resume {folder.path}` goes on with it"
    with pytest.raises(UserError, match="does not train: died"):
        stop(folder, wait=True, console=Console())
    assert states([folder]) == [end(folder)]


def test_a_run_elsewhere_is_not_called_dead_for_its_clock(folder: RunFolder) -> None:
    """Its lock is not seen here, and its clock is three minutes behind. Then it is silent."""
    elsewhere = {"host": "far", "boot": "x", "processes": "y", "pid": 1, "started": "2"}
    (folder.path / ".lock").write_text(json.dumps(elsewhere))
    console, times = Console(record=True, width=200), iter(range(10_000))
    beats = []

    def pause(_: float) -> None:
        beats.append(1)
        if len(beats) <= 40:
            status = {"state": "training", "time": len(beats) - 180.0, **VALUES}
            folder.write_json("status.json", status)

    told = states([folder], pause=pause, clock=lambda: float(next(times)))
    assert told == [None]
    options: dict[str, Any] = {"pause": pause, "clock": lambda: float(next(times))}
    assert watch(folder, once=False, console=console, **options) == 0
    assert len(beats) > 40
    assert "died: `downpour resume" in console.export_text()
    assert not folder.stop_requested()
    with pytest.raises(UserError, match="does not train: died"):
        stop(folder, wait=True, console=console, **options)
    assert not folder.stop_requested(), "it would end the session that resumes"
    (told_now,) = states([folder], pause=pause, clock=lambda: float(next(times)))
    assert told_now is not None
    assert told_now.startswith("silent for 6 s: `downpour watch")


def test_a_start_that_was_refused_has_not_died(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    assert (end(folder) or "").startswith("never began: `downpour resume")
    folder.append_metrics({"updates": 0})
    (folder.path / "tensorboard").mkdir()
    assert (end(folder) or "").startswith("never began")
    folder.discard_if_unused()
    assert not folder.path.exists()
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    folder.append_metrics({"updates": 1})
    folder.discard_if_unused()
    assert (end(folder) or "").startswith("died")


def test_a_run_is_asked_to_stop_through_its_folder(folder: RunFolder) -> None:
    console = Console(record=True, width=200)

    def pause(_: float) -> None:
        assert folder.stop_requested()
        status = folder.read_json("status.json")
        folder.write_json("status.json", {**status, "state": "stopped", "reason": "downpour stop"})

    with folder.locked():
        assert stop(folder, wait=True, console=console, pause=pause) == 0
        assert "stopped (downpour stop)" in console.export_text()
        folder.clear_stop()
        folder.write_json("status.json", {"state": "training", **VALUES})
        times = iter(range(0, 10_000, 100))
        with pytest.raises(UserError, match="has not stopped within"):
            stop(
                folder, wait=True, console=console, pause=lambda _: None, clock=lambda: next(times)
            )


def test_a_run_that_is_held_and_does_not_move_is_told_once(folder: RunFolder) -> None:
    """Its process is stopped: it keeps the lock, and does nothing."""
    console, times, pauses = Console(record=True, width=300), itertools.count(0, 10), []

    def pause(_: float) -> None:
        pauses.append(1)
        if len(pauses) > 20:
            folder.write_json("result.json", {"accuracy": 0.9})

    with folder.locked():
        assert watch(folder, once=False, console=console, pause=pause, clock=times.__next__) == 0
    (line,) = [text for text in console.export_text().splitlines() if "nothing has moved" in text]
    assert f"process {os.getpid()} on " in line
    assert f"`downpour resume {folder.path}` goes on" in line
