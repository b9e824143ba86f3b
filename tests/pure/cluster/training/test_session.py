"""The Ray cluster that a command runs on: what people are told of it."""

import pytest

from downpour.cluster.training.session import store_line


@pytest.mark.parametrize(
    ("free_bytes", "store_bytes", "told"),
    [
        (64 << 20, 7.4e9, "/dev/shm has 67 MB free, and Ray's object store may take 7,400 MB"),
        (8_000_000_000, 7.4e9, None),
        (None, 7.4e9, None),
        (64 << 20, 0.0, None),
    ],
)
def test_a_store_that_does_not_fit_into_memory_is_told(
    free_bytes: int | None, store_bytes: float, told: str | None
) -> None:
    line = store_line(free_bytes, store_bytes)
    assert (line or "").startswith(told or "")
    assert (line is None) == (told is None)
