"""What `bench recovery` makes of a run's metrics, by hand-computed cases."""

import pytest

from downpour.benchmarks.recovery import recovered, updates


def points(rates: list[tuple[float, float]]) -> list[tuple[float, int]]:
    """Ten readings a second of a run with these (seconds, updates a second)."""
    found, now_s, count = [(0.0, 0)], 0.0, 0.0
    for seconds, rate in rates:
        for _ in range(round(10 * seconds)):
            now_s, count = now_s + 0.1, count + rate / 10
            found.append((now_s, round(count)))
    return found


def test_full_speed_begins_with_the_first_second_at_the_old_rate() -> None:
    # Killed at 10 s, noticed at once: half the rate for 3 s, then all of it.
    found = recovered(points([(10, 1000), (3, 500), (7, 1000)]), 10.0, 4.0, 10.0)
    assert found.rate == pytest.approx(1000, rel=0.01)
    # A second with 0.2 s at half the rate has 90% of the updates.
    assert found.full_after_s == pytest.approx(2.8, abs=0.06)
    assert found.least_rate == pytest.approx(500, rel=0.02)


def test_what_stands_still_has_a_least_rate_of_nothing() -> None:
    found = recovered(points([(10, 1000), (2, 0), (8, 1000)]), 10.0, 4.0, 10.0)
    assert found.least_rate == 0
    assert found.full_after_s == pytest.approx(1.9, abs=0.06)


def test_a_run_that_stays_slow_is_never_at_full_speed() -> None:
    found = recovered(points([(10, 1000), (10, 700)]), 10.0, 4.0, 10.0)
    assert found.full_after_s is None
    assert found.least_rate == pytest.approx(700, rel=0.02)


def test_a_run_that_does_not_notice_is_at_full_speed_all_the_time() -> None:
    found = recovered(points([(20, 1000)]), 10.0, 4.0, 10.0)
    assert found.full_after_s == 0.0
    assert found.least_rate == pytest.approx(1000, rel=0.02)


def test_what_a_death_took_back_was_applied_all_the_same() -> None:
    lines = [
        {"time": 1.0, "updates": 100, "replicas_alive": 2},
        {"time": 1.5, "updates": 100, "accuracy": 0.5},
        {"time": 2.0, "updates": 200, "replicas_alive": 2},
        {"time": 3.0, "updates": 150, "replicas_alive": 0},
        {"time": 4.0, "updates": 250, "replicas_alive": 2},
    ]
    assert updates(lines) == [(1.0, 100), (2.0, 200), (3.0, 200), (4.0, 300)]
