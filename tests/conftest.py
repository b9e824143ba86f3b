"""What every tier shares."""

import gc
import os

import hypothesis
import pytest

# Before torch is imported anywhere: tests run small kernels, and threads would only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A few examples for every day, and `--hypothesis-profile soak` for many.
hypothesis.settings.register_profile("few", deadline=None, max_examples=15)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=300)
hypothesis.settings.load_profile("few")

# What shares something costly, by the fixture that makes it: one process has to run it all.
SHARED = ("trained", "ray_here", "on_its_own_ray")

# Files whose tests share nothing, and take long: any process may take any of them.
EACH_ALONE = ("test_train.py", "test_bench.py", "test_chaos.py")

# Helpers that assert: a failure is to say with what values.
pytest.register_assert_rewrite("tests.helpers.runs")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first; and in several processes, what shares something in one of them."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_collection_finish() -> None:
    """What has been imported stays: nobody has to look through it for garbage again."""
    gc.collect()
    gc.freeze()


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    if any(name in fixtures for name in SHARED):
        return "on its own ray" if "on_its_own_ray" in fixtures else "on a shared ray"
    if item.path.name in EACH_ALONE:
        return item.nodeid
    return str(item.path)
