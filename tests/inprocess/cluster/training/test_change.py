"""Having a run go on with other values: what is kept in its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.training.change import change
from downpour.cluster.training.inputs import check_data
from tests.helpers import tiny


def test_a_run_goes_on_to_another_end(tmp_path: Path) -> None:
    config = tiny.config(tiny.dataset(tmp_path / "data", 100), patience=5)
    folder = RunFolder.create(tmp_path / "run", config)
    data = check_data(config)
    change(folder, data, until={"stop_at_accuracy": 0.9})
    assert (folder.config().policy.stop_at_accuracy, folder.config().policy.patience) == (0.9, 5)
    change(folder, data, until={"patience": None})
    assert (folder.config().policy.stop_at_accuracy, folder.config().policy.patience) == (0.9, None)
    with pytest.raises(UserError, match="stop at accuracy is 90"):
        change(folder, data, until={"stop_at_accuracy": 90.0})
    assert folder.config().policy.stop_at_accuracy == 0.9
