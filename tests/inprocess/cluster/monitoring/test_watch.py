"""A run is watched and stopped through its folder."""

from __future__ import annotations

import pytest
from rich.console import Console

from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.watch import end, progress, stop, watch
from downpour.cluster.run.folder import RunFolder
from tests.helpers.monitoring import VALUES


def test_a_run_is_watched_until_it_ends(folder: RunFolder) -> None:
    console = Console(record=True, width=200, force_terminal=False)
    seen = progress(folder)
    assert (seen.accuracy, seen.best_accuracy) == (0.8, 0.9)
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
