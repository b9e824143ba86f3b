"""When two precisions are said to learn alike."""

import pytest

from downpour.benchmarks.precision import Spread, agree, report


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.970, 0.974, 0.972), (0.971, 0.975, 0.973), True),
        ((0.970, 0.974, 0.972), (0.976, 0.978, 0.977), False),
        ((0.970, 0.990, 0.980), (0.972, 0.972, 0.972), True),
        ((0.972, 0.972, 0.972), (0.970, 0.970, 0.970), False),
    ],
)
def test_means_may_differ_as_far_as_seeds_do(
    first: tuple[float, ...], second: tuple[float, ...], expected: bool
) -> None:
    spreads = {"float32": Spread(accuracies=first), "bfloat16": Spread(accuracies=second)}
    assert agree(*spreads.values()) == expected
    found = report("mnist-bn", ["--epochs", "3"], spreads)
    assert found.result["agree"] == expected
    assert ("within" if expected else "beyond") in found.notes[0]
    assert [row[0] for row in found.rows] == ["float32", "bfloat16"]
