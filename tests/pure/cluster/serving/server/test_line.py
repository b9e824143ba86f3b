"""The line of a server: first come, first served; nobody waits while there is room; nobody is kept
waiting for longer than the bound, by the rate of late.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.cluster.serving.server.line import Arrival, Line, LineBounds, SentAway

BOUNDS = LineBounds(at_once=4, most_waiting=6, longest_wait_s=5.0)


def test_first_come_first_served() -> None:
    line = Line(BOUNDS)
    arrivals = [line.arrive(0.0) for _ in range(12)]
    come = [a for a in arrivals if isinstance(a, Arrival)]
    assert [a.begins for a in come] == [True] * 4 + [False] * 6
    assert arrivals[10:] == [SentAway(retry_after_s=1)] * 2
    line.check()
    order = [line.leave(float(second), answered=True) for second in range(1, 11)]
    assert order == [a.ticket for a in come[4:]] + [None] * 4
    assert (line.num_begun, line.num_waiting) == (0, 0)


def test_one_that_would_wait_too_long_is_sent_away() -> None:
    """At 2 answers a second and 4 being answered, the seventh to wait would take 5.5 seconds."""
    bounds = LineBounds(at_once=4, most_waiting=1000, longest_wait_s=5.2)
    line = Line(bounds)
    for _ in range(4):
        line.arrive(0.0)
    assert line.rate is None
    now = 0.0
    for _ in range(40):
        now += 0.5
        line.leave(now, answered=True)
        line.arrive(now)
    assert line.rate == pytest.approx(2, rel=0.02)
    assert [isinstance(line.arrive(now), Arrival) for _ in range(7)] == [True] * 6 + [False]
    assert line.arrive(now) == SentAway(retry_after_s=3)
    for _ in range(9):
        line.leave(now, answered=False)  # errors say nothing about the rate
    now += 3600  # and neither does a time without requests
    assert line.rate == pytest.approx(2, rel=0.02)


def test_a_slow_network_is_known_after_its_first_answers() -> None:
    line = Line(BOUNDS)
    for _ in range(10):
        line.arrive(0.0)
    for answer in range(1, 5):
        line.leave(20.0 * answer, answered=True)
    assert isinstance(line.arrive(80.0), SentAway)
    assert line.sent_away().retry_after_s == 60


@given(st.lists(st.tuples(st.sampled_from(["arrive", "leave", "give up"]), st.floats(0, 3))))
def test_whatever_happens(events: list[tuple[str, float]]) -> None:
    line, now, begun, waiting = Line(BOUNDS), 0.0, 0, []
    for event, pause_s in events:
        now += pause_s
        if event == "arrive":
            arrival = line.arrive(now)
            if isinstance(arrival, Arrival) and arrival.begins:
                begun += 1
            elif isinstance(arrival, Arrival):
                waiting.append(arrival.ticket)
        elif event == "leave" and begun:
            following = line.leave(now, answered=True)
            assert following == (waiting.pop(0) if waiting else None)
            begun -= following is None
        elif event == "give up" and waiting:
            line.give_up(waiting.pop(len(waiting) // 2))
        line.check()
        assert (line.num_begun, line.num_waiting) == (begun, len(waiting))
