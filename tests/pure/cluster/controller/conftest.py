"""Runs without threads, for the tests of their state."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.world import Made, World


@pytest.fixture
def made() -> Iterator[Made]:
    """Makes runs, whose invariants are checked at the end."""
    runs: list[World] = []

    def make(*arguments: Any, **about: Any) -> World:
        runs.append(World(*arguments, **about))
        return runs[-1]

    yield make
    for run in runs:
        run.state.check()
