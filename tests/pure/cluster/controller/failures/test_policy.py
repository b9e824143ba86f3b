"""What is done about a failure, and why."""

import pytest

from downpour.cluster.controller.failures.policy import (
    LONGEST_PAUSE_S,
    MAX_IN_A_ROW,
    MAX_RECONNECTS,
    PAUSE_S,
    RESTARTS_WITHIN_S,
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
    recovery = policy.decide(failure(cause, detail="by the way"), 0.0)
    assert recovery.action == "restart"
    assert recovery.reason.startswith("partition 1 ")
    assert "(by the way): replaced, 1 of 7 within an hour" in recovery.reason
    assert policy.restarts == {"partition": 1}


def test_a_lost_connection_is_made_again_until_that_does_not_help() -> None:
    policy = FailurePolicy(max_restarts=100)
    actions = [
        policy.decide(failure("disconnected"), 0.0).action for _ in range(2 * (MAX_RECONNECTS + 1))
    ]
    assert actions == 2 * (["reconnect"] * MAX_RECONNECTS + ["restart"])
    policy.progressed("partition", 1)
    assert policy.decide(failure("disconnected"), 0.0).action == "reconnect"


def test_a_member_that_is_lost_too_often_within_an_hour_ends_the_run() -> None:
    policy = FailurePolicy(max_restarts=3)
    for now in (0.0, 10.0, 20.0):
        assert policy.decide(failure("died"), now).action == "restart"
        policy.progressed("partition", 1)
    final = policy.decide(failure("died"), 30.0)
    assert final.action == "give up"
    assert "was replaced 3 times within an hour, which is all that --max-restarts" in final.reason
    assert policy.restarts == {"partition": 3}
    never = FailurePolicy(max_restarts=0).decide(failure("died"), 0.0)
    assert never.action == "give up"


def test_a_run_that_gets_on_survives_any_number_of_losses_over_time_and_at_once() -> None:
    """A month of spot nodes; a rack with more members than one of them may be replaced."""
    policy = FailurePolicy(max_restarts=3)
    for number in range(1000):
        now = number * RESTARTS_WITHIN_S / 3 * 1.01
        assert policy.decide(failure("died"), now).action == "restart"
        policy.progressed("partition", 1)
    for index in range(2, 200):
        assert policy.decide(failure("died", index), now).action == "restart"
    assert policy.restarts == {"partition": 1198}


def lost_process(index: int) -> Failure:
    name = f"the process of replica {index}"
    return Failure(part="replicas", index=index, name=name, cause="silent")


def test_a_process_of_replicas_that_does_nothing_waits_longer_and_longer_while_others_train() -> (
    None
):
    policy = FailurePolicy(max_restarts=100)
    for _ in range(MAX_IN_A_ROW):
        policy.progressed("replicas", 0)
        assert policy.decide(lost_process(1), 0.0).pause_s == 0.0
    pauses = []
    for _ in range(8):
        policy.progressed("replicas", 0)
        recovery = policy.decide(lost_process(1), 0.0)
        assert recovery.action == "restart"
        pauses.append(recovery.pause_s)
    assert pauses == [*(PAUSE_S * 2**i for i in range(6)), LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert recovery.reason == (
        "the process of replica 1 does not answer: replaced in 600 s, since it did so 13 times "
        "without doing anything in between, and others train, 13 of 100 within an hour"
    )
    policy.progressed("replicas", 1)
    assert policy.decide(lost_process(1), 0.0).pause_s == 0.0


def test_a_process_of_replicas_that_does_nothing_ends_a_run_in_which_nobody_trains() -> None:
    policy = FailurePolicy(max_restarts=100)
    for _ in range(MAX_IN_A_ROW + 2):
        policy.progressed("replicas", 0)
        assert policy.decide(lost_process(1), 0.0).action == "restart"
    # Not any more since it failed last.
    last = policy.decide(lost_process(1), 0.0)
    assert last.action == "give up"
    assert "without doing anything in between" in last.reason


def test_many_shufflers_that_die_at_once_with_their_node_are_each_replaced() -> None:
    policy = FailurePolicy(max_restarts=100)
    for _ in range(MAX_IN_A_ROW):
        for index in range(2 * MAX_IN_A_ROW):
            gone = Failure(part="shuffler", index=index, name="a shuffler", cause="died")
            assert policy.decide(gone, 0.0).action == "restart"
    policy.progressed("shuffler")
    assert policy.decide(gone, 0.0).action == "restart"


def test_a_member_that_never_gets_anything_done_ends_the_run() -> None:
    policy = FailurePolicy(max_restarts=100)
    for _ in range(MAX_IN_A_ROW):
        assert policy.decide(failure("failed"), 0.0).action == "restart"
    assert policy.decide(failure("failed", index=2), 0.0).action == "restart"
    assert policy.decide(failure("failed"), 0.0).action == "give up"
    policy.progressed("partition", 1)
    assert policy.decide(failure("failed"), 0.0).action == "restart"


def test_an_evaluator_that_never_scores_ends_a_run_only_once_nothing_is_trained() -> None:
    policy = FailurePolicy(max_restarts=100)
    gone = Failure(part="evaluator", index=0, name="the evaluator", cause="died")
    for _ in range(3 * MAX_IN_A_ROW):
        assert policy.decide(gone, 0.0).action == "restart"
        policy.progressed("replicas", 0)
    policy.progressed("partition", 0)
    actions = [policy.decide(gone, 0.0).action for _ in range(MAX_IN_A_ROW + 1)]
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
    recovery = policy.decide(failure("silent"), 0.0, followed=True)
    assert recovery.action == "promote"
    assert recovery.reason == (
        "partition 1 does not answer: its follower takes its place, 1 of 7 within an hour"
    )
    assert policy.decide(failure("died"), 0.0).action == "restart"
    assert policy.restarts == {"partition": 2}


def test_a_run_goes_on_without_followers_that_are_of_no_use() -> None:
    policy = FailurePolicy(max_restarts=MAX_IN_A_ROW + 1)
    lost = Failure(part="follower", index=0, name="the follower of partition 0", cause="died")
    actions = [policy.decide(lost, 0.0).action for _ in range(MAX_IN_A_ROW + 1)]
    assert actions == ["restart"] * MAX_IN_A_ROW + ["go without"]
    policy.progressed("follower", 0)
    assert policy.decide(lost, 0.0).action == "restart"
    last = policy.decide(lost, 0.0)
    assert last.action == "go without"
    assert last.reason.endswith("going on without one")
