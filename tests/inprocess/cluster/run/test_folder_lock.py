"""A run is held by one process at a time, and by no dead one."""

import multiprocessing
import multiprocessing.synchronize
import os
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RunFolder


def hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with RunFolder.open(path).locked():
        ready.set()
        os.kill(os.getpid(), 9)  # the lock must die with its holder, without a clean-up


def test_one_process_holds_a_run_and_a_dead_one_does_not(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist"))
    with folder.locked():
        assert folder.held()
        with (
            pytest.raises(UserError, match="is being trained by another process"),
            RunFolder.open(folder.path).locked(),
        ):
            pass
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder.path, ready))
    process.start()
    assert ready.wait(60)
    process.join(60)
    assert process.exitcode == -9
    assert not folder.held()
