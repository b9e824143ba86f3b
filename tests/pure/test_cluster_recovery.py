"""What is done about a loss, and why."""

import pytest

from cluster.recovery import (
    MAX_IN_A_ROW,
    MAX_RECONNECTS,
    Cause,
    History,
    Loss,
    decide,
    stragglers,
)


def loss(cause: Cause, index: int = 1, detail: str = "") -> Loss:
    return Loss(
        part="partition", index=index, name=f"partition {index}", cause=cause, detail=detail
    )


@pytest.mark.parametrize("cause", ["died", "failed", "silent", "slow"])
def test_what_is_lost_is_replaced_and_the_reason_says_so(cause: Cause) -> None:
    history = History()
    recovery = decide(loss(cause, detail="by the way"), history, max_restarts=7)
    assert recovery.action == "restart"
    assert recovery.reason.startswith("partition 1 ")
    assert "(by the way): replaced, 1 of 7" in recovery.reason
    assert history.restarts == {"partition": 1}


def test_a_lost_connection_is_made_again_until_that_does_not_help() -> None:
    history = History()
    actions = [
        decide(loss("disconnected"), history, max_restarts=100).action
        for _ in range(2 * (MAX_RECONNECTS + 1))
    ]
    assert actions == 2 * (["reconnect"] * MAX_RECONNECTS + ["restart"])
    history.progressed("partition", 1)
    assert decide(loss("disconnected"), history, max_restarts=100).action == "reconnect"


def test_the_run_is_given_up_at_the_bound_and_not_before() -> None:
    history = History()
    for index in range(3):
        assert decide(loss("died", index), history, max_restarts=3).action == "restart"
    final = decide(loss("died", 9), history, max_restarts=3)
    assert final.action == "give up"
    assert "--max-restarts" in final.reason
    assert history.restarts == {"partition": 3}


def test_a_member_that_never_gets_anything_done_ends_the_run() -> None:
    history = History()
    for _ in range(MAX_IN_A_ROW):
        assert decide(loss("failed"), history, max_restarts=100).action == "restart"
    assert decide(loss("failed", index=2), history, max_restarts=100).action == "restart"
    assert decide(loss("failed"), history, max_restarts=100).action == "give up"
    history.progressed("partition", 1)
    assert decide(loss("failed"), history, max_restarts=100).action == "restart"


def test_an_evaluator_that_never_scores_ends_a_run_only_once_nothing_is_trained() -> None:
    history = History()
    gone = Loss(part="evaluator", index=0, name="the evaluator", cause="died")
    for _ in range(3 * MAX_IN_A_ROW):
        assert decide(gone, history, max_restarts=100).action == "restart"
        history.progressed("replicas", 0)
    history.progressed("partition", 0)
    actions = [decide(gone, history, max_restarts=100).action for _ in range(MAX_IN_A_ROW + 1)]
    assert actions == ["restart"] * MAX_IN_A_ROW + ["give up"]


def test_a_straggler_is_seen_by_its_rate_against_the_median_of_the_others() -> None:
    assert stragglers({0: 100.0, 1: 90.0, 2: 20.0}, 4.0) == {
        2: "20 mini-batches a second, where the median is 95"
    }
    assert stragglers({0: 100.0, 1: 90.0, 2: 30.0}, 4.0) == {}
    assert stragglers({0: 100.0, 1: 1.0}, 4.0).keys() == {1}
    assert stragglers({0: 0.0}, 4.0) == {}
