"""The guard of the warm start, told scripted losses: what it decides, and that nothing stops it."""

import itertools
import json
import math
import random
from collections.abc import Iterator

import pytest

from downpour.cluster.config.policy import active_replicas
from downpour.cluster.controller.leases.warm_start import WINDOWS, RampGuard
from downpour.workers.config import ReplicaConfig
from tests.helpers.seeds import seeds


class Script:
    """A run of ten replicas that join over nine epochs; windows of a thirtieth of an epoch."""

    def __init__(
        self,
        *,
        factor: float = 1.5,
        ramp_epochs: float = 9.0,
        state: dict[str, object] | None = None,
    ) -> None:
        self.config = ReplicaConfig(replicas=10, warm_start_epochs=1, ramp_epochs=ramp_epochs)
        self.guard = RampGuard(factor=factor, replicas=10, ramp_epochs=ramp_epochs, state=state)
        self.epochs = 0.0
        self.reasons: list[str] = []
        self.actives: list[int] = []

    def turn(self, loss: float | None, epochs: float = 1 / 30) -> int:
        """A window comes back; gives how many replicas train now."""
        self.guard.saw(loss, self.guard.course)
        return self.go(epochs)

    def go(self, epochs: float) -> int:
        self.epochs += epochs
        course = self.guard.decide(active_replicas(self.config, self.epochs), 10, self.epochs)
        if course.reason is not None:
            self.reasons.append(course.reason)
        self.actives.append(course.replicas)
        return course.replicas


def test_a_loss_that_falls_leaves_the_schedule_alone() -> None:
    script = Script()
    for i in range(600):
        active = script.turn(2.0 * 0.99**i)
        assert active == active_replicas(script.config, script.epochs)
        assert script.guard.held is None
    # All ten train from epoch 10 on; they are watched for as long as the ramp took.
    assert script.reasons == ["the loss has done well with 10 replicas: it is not watched any more"]
    for _ in range(3 * WINDOWS):
        assert script.turn(None) == 10


def test_a_rise_puts_them_back_and_they_join_again_one_by_one() -> None:
    script = Script()
    while script.turn(1.0) < 4:
        pass
    for _ in range(WINDOWS):  # four do well
        assert script.turn(1.0) == 4
    while script.turn(1.0) < 5:
        pass
    # Seven windows' median is above 1.5 at the fourth of 1.6.
    assert [script.turn(1.6) for _ in range(4)] == [5, 5, 5, 4]
    assert script.guard.held == 4
    assert script.reasons[-1] == (
        "the loss has risen to 1.6 with 5 replicas, above 1.5 (best 1): put back to 4 replicas"
    )
    # Back at once, but a hold lasts at least as long as the schedule takes for one: an epoch.
    since = script.epochs
    while script.turn(1.4) == 4:
        assert script.epochs < since + 1.1
    assert script.epochs >= since + 1
    assert script.actives[-1] == 5
    assert script.reasons[-1].startswith("the loss is back at 1.4 with 4 replicas (best 1)")
    # The schedule is further on; from here each one joins when those before it did well.
    joined = [script.turn(1.0) for _ in range(6 * WINDOWS)]
    assert joined[: WINDOWS - 1] == [5] * (WINDOWS - 1)
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(joined))
    assert joined[-1] == active_replicas(script.config, script.epochs)
    assert script.guard.held is None


def test_each_rise_holds_twice_as_long() -> None:
    script = Script()
    holds = []
    for _ in range(3):
        while script.guard.held is None or script.guard._state.held_since is None:
            script.turn(1.0 if script.epochs < 3 else 5.0)
        began = script.epochs
        while script.guard._state.held_since is not None:
            script.turn(1.0)
        holds.append(script.epochs - began)
    assert holds == pytest.approx([1, 2, 4], abs=0.2)


def test_while_the_loss_stays_up_replicas_are_halved_down_to_one() -> None:
    script = Script()
    while script.turn(1.0) < 10:
        pass
    for _ in range(WINDOWS):
        script.turn(1.0)
    seen = [script.turn(9.0) for _ in range(8 * WINDOWS)]
    assert [n for n, _ in itertools.groupby(seen)] == [10, 9, 4, 2, 1]


def test_a_loss_that_never_comes_back_does_not_stop_the_run() -> None:
    """After the bound it goes on, with what the loss is then as its best."""
    script = Script()
    while script.turn(1.0) < 3:
        pass
    while script.guard.held is None:
        script.turn(7.0)
    since = script.epochs
    while script.guard.held == script.actives[-1] and script.epochs < since + 9.5:
        script.turn(7.0)
        if "all the same" in script.reasons[-1]:
            break
    assert script.epochs == pytest.approx(since + 9, abs=0.1)
    assert script.actives[-1] == 2
    for _ in range(9 * WINDOWS):
        script.turn(7.0)
    assert script.actives[-1] == 10


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_losses_that_are_not_finite_have_risen(bad: float | None) -> None:
    script = Script()
    while script.turn(1.0) < 4:
        pass
    before = script.actives[-1]
    assert [script.turn(bad) for _ in range(4)] == [before, before, before, before - 1]
    assert "risen to inf" in script.reasons[-1]
    # Nor is a run held for ever that never had a finite one.
    never = Script(ramp_epochs=1.0)
    for _ in range(1000):
        assert never.turn(bad) >= 1
    assert sum("all the same" in reason for reason in never.reasons) >= 2


def test_neither_a_single_bad_window_nor_noise_in_a_small_loss_counts() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        script = Script(factor=2.0)
        for i in range(400):
            loss = abs(rng.gauss(0.01, 0.002))
            script.turn(None if i % 10 == 0 else loss)
            assert script.guard.held is None
        assert script.actives[-1] == 10


def test_a_small_loss_may_double_and_double_again() -> None:
    script = Script(factor=2.0)
    for loss in (2.0, 0.5, 0.1, 0.02, 0.005, 0.005, 0.02, 0.08, 0.1):  # up to 0.105 is no rise
        for _ in range(2 * WINDOWS):
            script.turn(loss)
        assert script.guard.held is None
    assert script.actives[-1] > 1
    for _ in range(WINDOWS):
        script.turn(0.11)
    assert script.guard.held is not None


def test_losses_of_windows_lent_before_a_change_of_course_are_left_out() -> None:
    script = Script()
    while script.turn(1.0) < 4:
        pass
    before = script.guard.course
    while script.guard.held is None:
        script.turn(3.0)
    held = script.actives[-1]
    for _ in range(4 * WINDOWS):  # still from the old course
        script.guard.saw(9.0, before)
        assert script.go(0.001) == held
    for _ in range(WINDOWS):
        script.turn(9.0)
    assert script.actives[-1] == max(1, held // 2)


def test_a_partition_that_goes_back_begins_a_new_best() -> None:
    script = Script()
    while script.turn(0.1) < 5:
        pass
    script.guard.restarted()
    for _ in range(4 * WINDOWS):
        script.turn(2.3)
    assert script.guard.held is None


def test_a_run_that_is_scaled_down_is_never_given_more_than_the_schedule_says() -> None:
    guard = RampGuard(factor=1.5, replicas=10, ramp_epochs=2.0)
    assert guard.decide(6, 10, 1.0).replicas == 6
    assert guard.decide(2, 2, 1.0).replicas == 2


def losses(seed: int) -> Iterator[float | None]:
    rng = random.Random(seed)
    level = 2.0
    while True:
        level *= rng.choice((0.9, 0.97, 1.0, 1.05, 1.4))
        yield None if rng.random() < 0.05 else level * rng.uniform(0.8, 1.2)


@pytest.mark.parametrize("seed", seeds(5, 40))
def test_whatever_the_losses_it_is_deterministic_through_resumes_and_bounded(seed: int) -> None:
    one, other = Script(ramp_epochs=2.0), Script(ramp_epochs=2.0)
    waited = 0.0
    for loss in itertools.islice(losses(seed), 600):
        one.turn(loss)
        # The other is stopped and resumed before every single window.
        state = json.loads(json.dumps(other.guard.dump()))
        epochs, reasons, actives = other.epochs, other.reasons, other.actives
        other = Script(ramp_epochs=2.0, state=state)
        other.epochs, other.reasons, other.actives = epochs, reasons, actives
        other.turn(loss)
        assert 1 <= one.actives[-1] <= active_replicas(one.config, one.epochs)
        waited = 0.0 if one.guard._state.held_since is None else waited + 1 / 30
        assert waited <= 2.0 + 1 / 30 + 1e-9  # the bound: the ramp's length
    assert other.actives == one.actives
    assert other.reasons == one.reasons
