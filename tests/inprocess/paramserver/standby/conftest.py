"""A partition with its follower."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.helpers.partition_pairs import Pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.closing(Pair()) as pair:
        yield pair
