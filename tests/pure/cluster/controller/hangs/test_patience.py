"""How long a wait may last: from what such waits have taken, by the caller's clock."""

import pytest

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.controller.hangs.patience import (
    HALF_LIFE_S,
    LIMITS,
    MOST_DOUBLINGS,
    Limit,
    Patience,
    Watch,
    limits,
)

LIMIT = {**LIMITS, "report": Limit(first_s=60.0, least_s=30.0, times=10.0)}


def test_before_a_wait_has_ended_well_its_limit_is_generous() -> None:
    patience = Patience(LIMIT)
    assert patience.lost("report", 60.0, now=60.0) is None
    assert patience.lost("report", 61.0, now=61.0) == "nothing for 61 s, it was the first"


def test_the_limit_follows_the_longest_that_ended_well() -> None:
    patience = Patience(LIMIT)
    for seconds in (0.1, 5.0, 0.2):
        patience.took("report", seconds, now=0.0)
    assert patience.limit_s("report", now=0.0) == 50.0
    assert patience.lost("report", 50.0, now=0.0) is None
    assert patience.lost("report", 51.0, now=0.0) == "nothing for 51 s, which took 5 s before"
    assert patience.limit_s("window", now=0.0) == LIMITS["window"].first_s


def test_it_is_never_shorter_than_what_a_busy_machine_takes() -> None:
    patience = Patience(LIMIT)
    patience.took("report", 0.001, now=0.0)
    assert patience.limit_s("report", now=0.0) == 30.0


def test_all_limits_are_in_proportion_to_the_one_that_is_an_option() -> None:
    assert limits(PolicyConfig().hang_after_s) == LIMITS
    short = limits(3.0)
    assert short.keys() == LIMITS.keys()
    assert short["life"].least_s == 3.0
    for wait, limit in short.items():
        assert limit.first_s == pytest.approx(LIMITS[wait].first_s / 10)
        assert limit.least_s == pytest.approx(LIMITS[wait].least_s / 10)
        assert limit.times == LIMITS[wait].times


@pytest.mark.parametrize("seconds", [0.0, 0.5, -30.0, float("nan"), float("inf")])
def test_less_than_a_look_a_second_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"hang after s is .*: give 1 second or more"):
        PolicyConfig(hang_after_s=seconds)


def test_a_long_wait_of_long_ago_counts_for_less() -> None:
    patience = Patience(LIMIT)
    patience.took("report", 40.0, now=0.0)
    assert patience.limit_s("report", now=HALF_LIFE_S) == 200.0
    patience.took("report", 21.0, now=HALF_LIFE_S)
    assert patience.limit_s("report", now=HALF_LIFE_S) == 210.0


def test_waits_that_are_given_up_one_after_the_other_may_be_slow_and_get_more_time() -> None:
    patience = Patience(LIMIT)
    patience.gave_up("report")
    assert patience.limit_s("report", now=0.0) == 60.0, "the first limit is generous already"
    patience.took("report", 4.0, now=0.0)
    found = []
    for _ in range(MOST_DOUBLINGS + 2):
        found.append(patience.limit_s("report", now=0.0))
        patience.gave_up("report")
    assert found == [40.0, 80.0, 160.0, 320.0, 640.0, 640.0]
    assert patience.limit_s("answer", now=0.0) == LIMITS["answer"].first_s
    patience.took("report", 1.0, now=0.0)
    assert patience.limit_s("report", now=0.0) == 40.0


def test_calls_that_are_overdue_at_once_are_one_wait_that_is_given_up() -> None:
    patience = Patience(LIMIT)
    watch = Watch(patience)
    patience.took("report", 1.0, now=0.0)
    watch.began("a", "report", 0.0)
    watch.began("b", "report", 0.0)
    assert len(watch.overdue(31.0)) == 2
    assert patience.limit_s("report", now=31.0) == 60.0


def test_a_call_is_overdue_once_and_a_failed_one_tells_nothing_of_how_long_they_take() -> None:
    watch = Watch(Patience(LIMIT))
    watch.began("a", "report", 0.0)
    watch.began("b", "report", 50.0)
    assert watch.overdue(60.0) == []
    assert [call for call, _ in watch.overdue(70.0)] == ["a"]
    assert watch.overdue(80.0) == []
    watch.ended("b", 80.0, well=False)
    watch.ended("never begun", 80.0, well=True)
    watch.began("c", "report", 100.0)
    assert watch.overdue(159.0) == []  # still the first: neither a nor b ended well
    watch.ended("c", 101.0, well=True)
    watch.began("d", "report", 200.0)
    assert [call for call, _ in watch.overdue(231.0)] == ["d"]
