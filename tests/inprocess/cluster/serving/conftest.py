"""What the tests of serving share."""

from pathlib import Path

import pytest

from tests.helpers.tiny import write_split
from tests.helpers.trained import coloured, make_run, small_config


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and two runs on it."""
    folder = tmp_path_factory.mktemp("inference")
    write_split(folder / "data", "train", *coloured(320, 1))
    write_split(folder / "data", "test", *coloured(90, 2), shards=1)
    for name, seed in (("one", 1), ("two", 2)):
        make_run(folder / name, small_config(folder / "data", seed=seed))
    return folder
