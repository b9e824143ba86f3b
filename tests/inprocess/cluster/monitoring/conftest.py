"""What the tests of monitoring share."""

from __future__ import annotations

from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.run.folder import RunFolder
from tests.helpers.monitoring import VALUES


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has come some way."""
    folder = RunFolder.create(tmp_path / "a<b>", recipes.find("mnist-bn"))
    for n in range(1, 40):
        folder.append_metrics({**VALUES, "updates": 10 * n, "loss": 2.0 / n})
    folder.append_metrics({"updates": 400, "accuracy": 0.9, "evaluation_loss": 0.3})
    folder.append_metrics({"updates": 420, "accuracy": 0.8, "evaluation_loss": 0.4})
    folder.append_event("a <b>replica</b> was lost")
    folder.write_json("status.json", {"state": "training", "time": 0.0, **VALUES})
    return folder
