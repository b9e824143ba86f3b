"""The virtual clock, its processors and wires, by hand-computed cases."""

import random
import statistics

import pytest

from downpour.cluster.simulate.clock import Body, Clock, Processors, Thread, Wire
from downpour.cluster.simulate.inputs import Spread


def run(clock: Clock) -> None:
    while clock.advance():
        pass


def test_events_come_in_the_order_of_their_times() -> None:
    clock, seen = Clock(), []
    clock.after(2.0, lambda: seen.append(("late", clock.now_s)))
    clock.after(1.0, lambda: seen.append(("first of two", clock.now_s)))
    clock.after(1.0, lambda: seen.append(("second", clock.now_s)))
    run(clock)
    assert seen == [("first of two", 1.0), ("second", 1.0), ("late", 2.0)]


@pytest.mark.parametrize(
    ("capacity", "ends"),
    [
        # A has worked 0.5 s when B comes; then both get half: A's rest takes 1 s. B has 0.5 s left.
        (1.0, {"A": 1.5, "B": 2.0}),
        (2.0, {"A": 1.0, "B": 1.5}),
        # 1.5 processors: three quarters each. A's 0.5 s take 2/3 s; B has then 0.5 s left, alone.
        (1.5, {"A": 0.5 + 2 / 3, "B": 0.5 + 2 / 3 + 0.5}),
    ],
)
def test_processors_are_shared_evenly(capacity: float, ends: dict[str, float]) -> None:
    clock, seen = Clock(), {}
    processors = Processors(clock, capacity)
    processors.work(1.0, lambda: seen.update(A=clock.now_s))
    clock.after(0.5, lambda: processors.work(1.0, lambda: seen.update(B=clock.now_s)))
    run(clock)
    assert seen == pytest.approx(ends)
    assert processors.busy_s == pytest.approx(2.0)


def test_many_jobs_end_when_all_their_work_is_done() -> None:
    clock, rng, ended = Clock(), random.Random(1), []
    processors = Processors(clock, 3.0)
    total_s = 0.0
    for _ in range(500):
        seconds = rng.choice([0.0, rng.random()])
        total_s += seconds
        processors.work(seconds, lambda: ended.append(clock.now_s))
    run(clock)
    assert len(ended) == 500
    assert processors.busy_s == pytest.approx(total_s)
    assert clock.now_s >= total_s / 3


def test_threads_side_by_side_end_together() -> None:
    """Two threads of 1 s and one of 0.5 s on two processors: 2/3 each until 0.75 s, then all."""
    clock, seen = Clock(), {}
    processors = Processors(clock, 2.0)
    processors.work(1.0, lambda: seen.update(both=clock.now_s), width=2)
    processors.work(0.5, lambda: seen.update(one=clock.now_s))
    run(clock)
    assert seen == pytest.approx({"one": 0.75, "both": 1.25})
    assert processors.busy_s == pytest.approx(2.5)


def test_a_thread_that_is_woken_at_work_does_not_fall_asleep() -> None:
    clock, seen = Clock(), []

    def body() -> Body:
        while True:
            seen.append(clock.now_s)
            yield 1.0
            yield None

    thread = Thread(Processors(clock, 1.0), body())
    run(clock)
    assert seen == []
    thread.wake()
    clock.at(0.5, thread.wake)
    clock.at(5.0, thread.wake)
    clock.at(5.5, thread.end)
    run(clock)
    assert seen == [0.0, 1.0, 5.0]


def test_a_wire_sends_one_message_after_another() -> None:
    clock, seen = Clock(), {}
    here, there = Wire(clock, 10.0, 0.25), Wire(clock, 10.0, 0.25)
    here.send(there, 10.0, lambda: seen.update(a=clock.now_s))
    last_s = here.send(there, 20.0, lambda: seen.update(b=clock.now_s))
    here.send(there, 0, lambda: seen.update(small=clock.now_s))
    here.send(there, 0, lambda: seen.update(after=clock.now_s), last_s)
    there.send(here, 10.0, lambda: seen.update(back=clock.now_s))
    run(clock)
    # A second of sending and a quarter of a second on the way; the other direction is free.
    assert seen == pytest.approx({"a": 1.25, "b": 3.25, "small": 0.25, "after": 3.25, "back": 1.25})


def test_a_machine_receives_from_several_at_its_own_rate() -> None:
    clock, seen = Clock(), []
    to = Wire(clock, 10.0, 0.0)
    for _ in range(3):
        Wire(clock, 10.0, 0.0).send(to, 10.0, lambda: seen.append(clock.now_s))
    run(clock)
    assert seen == pytest.approx([1.0, 2.0, 3.0])


def test_a_spread_has_its_mean_and_its_deviation() -> None:
    rng, spread = random.Random(3), Spread(mean_s=2.0, spread=0.5)
    drawn = [spread.draw(rng) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(2.0, rel=0.02)
    assert statistics.stdev(drawn) == pytest.approx(1.0, rel=0.05)
    assert Spread(mean_s=2.0).draw(rng) == 2.0
    with pytest.raises(ValueError, match="a mean of -1"):
        Spread(mean_s=-1.0)
