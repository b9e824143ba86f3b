"""What every tier shares."""

import gc
import os
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest

# Before torch is imported anywhere: tests run small kernels, and threads would only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A few examples for every day, and `--hypothesis-profile soak` for many.
hypothesis.settings.register_profile("few", deadline=None, max_examples=15)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=300)
hypothesis.settings.load_profile("few")

# Files whose tests share something costly: in several processes, one has to run them all.
SHARING = (
    ("test_train.py", "test_names.py", "test_statistics.py", "test_classifier.py"),
    ("test_docs.py", "test_imports.py"),
)
# Files whose tests share nothing, and take long: any process may take any of them.
APART = ("test_resume.py", "test_bench.py")

# Helpers that assert: a failure is to say with what values.
pytest.register_assert_rewrite("tests.helpers.runs", "tests.helpers.partition_pairs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nobody looks for garbage while modules are imported, most of which stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What has been imported stays: nobody has to look through it for garbage again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Nobody has to look for garbage in what an interpreter that ends leaves."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out files, but for those above."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            name = file.rpartition("/")[2]
            if file.startswith("tests/ray/") and name in APART:
                return nodeid
            return next((group[0] for group in SHARING if name in group), file)

    return Scheduling(config, log)
