"""The state of a run by its door: the policies that it is given, how it ends, and all at random."""

from __future__ import annotations

import numpy as np
import pytest

from downpour.cluster.controller.failures.policy import Failure, FailurePolicy, Recovery
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import ProcessLost, RunFailed
from downpour.cluster.errors import UserError
from downpour.paramserver.partition.applied_set import APPLIED
from downpour.workers.tasks import Figure
from tests.helpers.seeds import seeds
from tests.helpers.world import Made, configured


def test_a_run_comes_to_its_end(made: Made) -> None:
    run = made()
    run.begin()
    run.go_on(lambda: run.outcome is not None)
    assert run.outcome is not None
    assert run.outcome.finished
    assert run.outcome.exactly_once
    assert all((flags == APPLIED).all() for flags in run.flags())
    assert run.outcome.checkpoint == 1
    assert run.outcome.best == Figure(metric="accuracy", value=0.5)
    assert run.outcome.all_replicas_s is not None
    assert not run.pending


def test_the_policy_about_failures_is_given(made: Made) -> None:
    class Never(FailurePolicy):
        def decide(self, failure: Failure, now: float, *, followed: bool = False) -> Recovery:
            return Recovery(action="give up", reason=f"{failure}, and that is that")

    run = made(failure_policy=Never(max_restarts=100))
    run.train()
    run.fail(run.calls(do.RunWindow)[0], ProcessLost("it died"))
    assert isinstance(run.error, RunFailed)
    assert "died, and that is that: see the logs" in str(run.error)
    assert "downpour resume runs/a" in str(run.error)
    assert run.state.handle(events.Tick(), 9.0) == []


def test_an_error_of_the_users_ends_the_run_as_it_is(made: Made) -> None:
    run = made()
    run.train()
    error = UserError("image 17 cannot be decoded")
    run.fail(run.calls(do.RunWindow)[0], error)
    assert run.error is error


@pytest.mark.parametrize("standby", ["none", "beside", "elsewhere"])
@pytest.mark.parametrize("seed", seeds(2, 12))
def test_whatever_dies_and_in_whatever_order_all_is_covered_once(
    made: Made, seed: int, standby: str
) -> None:
    """Answers in any order, members that die at any time, late pushes of processes cut off."""
    config = configured(
        max_restarts=10_000,
        warm_start_epochs=0.5,
        policy={"epochs": 30, "checkpoint_every_s": 3.0},
        server={"hot_standby": standby != "none"},
    )
    run = made(config, seed=seed, num_partitions=3, remote=standby == "elsewhere")
    run.begin()
    for _ in range(4000):
        if run.outcome is not None or run.error is not None:
            break
        run.step(deaths=0.03)
    assert run.error is None or "without doing anything in between" in str(run.error)
    if run.error is None:
        run.go_on(lambda: run.outcome is not None)
        assert run.outcome is not None
        assert run.outcome.exactly_once
        assert np.all([flags == APPLIED for flags in run.flags()])
    if standby == "elsewhere":
        assert run.promoted
        assert run.words
