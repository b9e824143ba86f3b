"""A run that learns nothing says so once, and one that learns is left alone."""

from __future__ import annotations

import math

import pytest

from downpour.cluster.monitoring.learning import PREFIX, Learning, chance_of


def judge(num_classes: int = 10, epochs: int = 5, from_start: bool = True) -> Learning:
    return Learning(
        num_classes=num_classes, epochs=epochs, in_flight=50, data="d", from_start=from_start
    )


def told(found: list[str | None]) -> list[str]:
    return [line for line in found if line is not None]


@pytest.mark.parametrize(
    ("accuracy", "num_classes", "num_examples", "chance"),
    [
        (0.1, 10, 10_000, True),
        (0.108, 10, 10_000, True),  # 2.7 standard errors
        (0.11, 10, 10_000, False),
        (0.0, 10, 10_000, True),
        (0.001, 1000, 50_000, True),
        (0.02, 1000, 50_000, False),  # bn-x5 after its first epoch
        (0.5, 2, 100, True),
        (0.7, 2, 100, False),
    ],
)
def test_chance(accuracy: float, num_classes: int, num_examples: int, chance: bool) -> None:
    assert chance_of(accuracy, num_classes, num_examples) == chance


def test_an_accuracy_that_stays_at_chance_is_told_once_with_what_to_look_at() -> None:
    learning = judge()
    learning.rate = 0.5
    lines = [learning.scored(0.1, 10_000, epoch / 2) for epoch in range(1, 11)]
    assert [line is not None for line in lines] == [False, False, True] + [False] * 7
    (line,) = told(lines)
    assert line.startswith(PREFIX)
    assert "after 1.5 epochs the accuracy is 10.00%" in line
    assert "guessing among 10 classes gives 10.00%" in line
    for hint in ("--learning-rate", "(0.5 now)", "--in-flight", "(50)", "downpour inspect d"):
        assert hint in line
    assert "\n" not in line


def test_the_last_scoring_counts_by_itself() -> None:
    assert judge(epochs=1).scored(0.1, 10_000, 1.0) is not None


def test_what_has_learnt_is_never_told_of_again() -> None:
    learning = judge()
    assert told([learning.scored(a, 10_000, e) for e, a in ((0.5, 0.1), (1, 0.1), (2, 0.3))]) == []
    assert told([learning.scored(0.1, 10_000, epoch) for epoch in (3, 4, 5)]) == []


def test_a_loss_that_has_not_moved_is_told_once() -> None:
    learning = judge()
    lines = told([learning.trained(2.303 + 0.001 * (n % 3), n / 20) for n in range(100)])
    assert len(lines) == 1
    assert told([learning.scored(0.1, 10_000, epoch) for epoch in (3, 4, 5)]) == []
    assert "after 1.0 epochs the training loss is 2.304, and it began at 2.304" in lines[0]


@pytest.mark.parametrize("fall_per_epoch", [0.05, 0.5, 3.0])
def test_a_loss_that_falls_is_left_alone_also_when_it_stands_still_later(
    fall_per_epoch: float,
) -> None:
    """From 6.9 as of 1,000 classes; then 20 epochs at the bottom."""
    learning = judge(1000)
    falling = [6.9 * math.exp(-fall_per_epoch * n / 20) for n in range(100)]
    lines = [learning.trained(loss, n / 20) for n, loss in enumerate(falling + falling[-1:] * 400)]
    assert told(lines) == []


def test_an_accuracy_above_chance_says_more_than_the_loss() -> None:
    learning = judge()
    assert learning.scored(0.3, 10_000, 0.5) is None
    assert told([learning.trained(2.3, n / 20) for n in range(100)]) == []


def test_a_resumed_run_is_not_judged_by_its_loss() -> None:
    learning = judge(from_start=False)
    assert told([learning.trained(0.001, n / 20) for n in range(400)]) == []
    assert told([learning.trained(math.nan, n) for n in range(9)]) == []
