"""What is done about a failure, and why."""

import pytest

from downpour.cluster.controller.failure_policy import (
    MAX_IN_A_ROW,
    MAX_RECONNECTS,
    Cause,
    Failure,
    FailurePolicy,
    stragglers,
)


def failure(cause: Cause, index: int = 1, detail: str = "") -> Failure:
    return Failure(
        part="partition", index=index, name=f"partition {index}", cause=cause, detail=detail
    )


@pytest.mark.parametrize("cause", ["died", "failed", "silent", "slow"])
def test_what_is_lost_is_replaced_and_the_reason_says_so(cause: Cause) -> None:
    policy = FailurePolicy(max_restarts=7)
    recovery = policy.decide(failure(cause, detail="by the way"))
    assert recovery.action == "restart"
    assert recovery.reason.startswith("partition 1 ")
    assert "(by the way): replaced, 1 of 7" in recovery.reason
    assert policy.restarts == {"partition": 1}


def test_a_lost_connection_is_made_again_until_that_does_not_help() -> None:
    policy = FailurePolicy(max_restarts=100)
    actions = [
        policy.decide(failure("disconnected")).action for _ in range(2 * (MAX_RECONNECTS + 1))
    ]
    assert actions == 2 * (["reconnect"] * MAX_RECONNECTS + ["restart"])
    policy.progressed("partition", 1)
    assert policy.decide(failure("disconnected")).action == "reconnect"


def test_the_run_is_given_up_at_the_bound_and_not_before() -> None:
    policy = FailurePolicy(max_restarts=3)
    for index in range(3):
        assert policy.decide(failure("died", index)).action == "restart"
    final = policy.decide(failure("died", 9))
    assert final.action == "give up"
    assert "--max-restarts" in final.reason
    assert policy.restarts == {"partition": 3}


def test_a_member_that_never_gets_anything_done_ends_the_run() -> None:
    policy = FailurePolicy(max_restarts=100)
    for _ in range(MAX_IN_A_ROW):
        assert policy.decide(failure("failed")).action == "restart"
    assert policy.decide(failure("failed", index=2)).action == "restart"
    assert policy.decide(failure("failed")).action == "give up"
    policy.progressed("partition", 1)
    assert policy.decide(failure("failed")).action == "restart"


def test_an_evaluator_that_never_scores_ends_a_run_only_once_nothing_is_trained() -> None:
    policy = FailurePolicy(max_restarts=100)
    gone = Failure(part="evaluator", index=0, name="the evaluator", cause="died")
    for _ in range(3 * MAX_IN_A_ROW):
        assert policy.decide(gone).action == "restart"
        policy.progressed("replicas", 0)
    policy.progressed("partition", 0)
    actions = [policy.decide(gone).action for _ in range(MAX_IN_A_ROW + 1)]
    assert actions == ["restart"] * MAX_IN_A_ROW + ["give up"]


def test_a_straggler_is_seen_by_its_rate_against_the_median_of_the_others() -> None:
    assert stragglers({0: 100.0, 1: 90.0, 2: 20.0}, 4.0) == {
        2: "20 mini-batches a second, where the median is 95"
    }
    assert stragglers({0: 100.0, 1: 90.0, 2: 30.0}, 4.0) == {}
    assert stragglers({0: 100.0, 1: 1.0}, 4.0).keys() == {1}
    assert stragglers({0: 0.0}, 4.0) == {}


def test_a_partition_that_is_followed_is_replaced_by_its_follower() -> None:
    policy = FailurePolicy(max_restarts=7)
    recovery = policy.decide(failure("silent"), followed=True)
    assert recovery.action == "promote"
    assert recovery.reason == (
        "partition 1 does not answer: its follower takes its place, 1 of 7 for its kind"
    )
    assert policy.decide(failure("died")).action == "restart"
    assert policy.restarts == {"partition": 2}


def test_a_run_goes_on_without_followers_that_are_of_no_use() -> None:
    policy = FailurePolicy(max_restarts=MAX_IN_A_ROW + 1)
    lost = Failure(part="follower", index=0, name="the follower of partition 0", cause="died")
    actions = [policy.decide(lost).action for _ in range(MAX_IN_A_ROW + 1)]
    assert actions == ["restart"] * MAX_IN_A_ROW + ["go without"]
    policy.progressed("follower", 0)
    assert policy.decide(lost).action == "restart"
    last = policy.decide(lost)
    assert last.action == "go without"
    assert last.reason.endswith("going on without one")
