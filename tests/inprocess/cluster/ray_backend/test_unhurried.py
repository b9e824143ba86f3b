"""Actors that nobody waits for import PyTorch at the lowest priority."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from downpour.cluster.ray_backend.parent_death import ending_with_parent
from downpour.cluster.ray_backend.unhurried import LOWEST, Unhurried, import_unhurriedly
from downpour.paramserver.actor import FollowerActor

LOADED = """
import pickle, sys, types
sys.modules["torch"] = torch = types.ModuleType("torch")  # its place in the order is what counts
try:
    pickle.load(open(sys.argv[1], "rb"))
except Exception as error:
    print(type(error).__name__)
print(*sys.modules)
"""


def test_a_module_is_imported_at_the_lowest_priority_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, threading\nnice = os.getpriority(0, threading.get_native_id())\n"
    (tmp_path / "heavy_module.py").write_text(code)
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('it is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        import_unhurriedly("heavy_module")
        assert sys.modules["heavy_module"].nice == LOWEST
        import_unhurriedly("broken_module")  # whoever needs it hears of it
        with pytest.raises(RuntimeError, match="it is broken"):
            __import__("broken_module")
    finally:
        sys.modules.pop("heavy_module", None)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_actors_process_comes_to_that_before_its_class(tmp_path: Path) -> None:
    """Under the name that the actor has without it."""
    pickled = tmp_path / "class"
    actor = ending_with_parent(FollowerActor, Unhurried)
    assert actor.__name__ == "FollowerActor"
    pickled.write_bytes(cloudpickle.dumps(actor))
    done = subprocess.run(
        [sys.executable, "-c", LOADED, pickled], capture_output=True, text=True, check=True
    )
    modules = done.stdout.split()
    unhurried = modules.index("downpour.cluster.ray_backend.unhurried")
    assert unhurried < modules.index("downpour.paramserver")
