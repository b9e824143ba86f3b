"""When a follower counts, and when there is to be another one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from downpour.cluster.controller.failures.account import Failures
from downpour.cluster.controller.failures.policy import MAX_IN_A_ROW, FailurePolicy
from downpour.cluster.controller.members.followers import (
    LATE_S,
    REPORTS_TO_FOLLOW,
    Followers,
    Suspicion,
)
from downpour.cluster.controller.protocol.backend import FollowerLost
from downpour.cluster.controller.protocol.instructions import (
    Instruction,
    LetAlone,
    StartFollower,
    StopFollower,
    Tell,
    WatchPrimary,
)
from downpour.paramserver.standby.trouble import Kind, Trouble


class Script:
    """The followers of one partition, and what they ask for."""

    def __init__(
        self, *, wanted: bool = True, max_restarts: int = 100, before: tuple[int, ...] = ()
    ) -> None:
        self.out: list[Instruction] = []
        failures = Failures(FailurePolicy(max_restarts=max_restarts), run="runs/a", out=self.out)
        self.followers = Followers(1, wanted=wanted, failures=failures, out=self.out, before=before)

    def taken(self, kind: type[Any]) -> list[Any]:
        """What has been asked for of a kind since the last look."""
        found = [given for given in self.out if isinstance(given, kind)]
        self.out[:] = [given for given in self.out if not isinstance(given, kind)]
        return found

    def start(self) -> StartFollower:
        self.followers.start_missing()
        (call,) = self.taken(StartFollower)
        assert isinstance(call, StartFollower)
        return call

    def report(self, has_follower: bool, waits_for_word: int | None = None) -> None:
        report: Any = SimpleNamespace(
            index=0, has_follower=has_follower, waits_for_word=waits_for_word
        )
        self.followers.reported(report, 7, 0.0)

    def suspect(self, watch: WatchPrimary, kind: Kind, now: float = 0.0) -> bool:
        return self.followers.suspects(watch, Trouble(kind=kind, why="it is silent"), now)

    @property
    def counts(self) -> bool:
        return self.followers.can_take_over(0)


def test_a_follower_counts_from_its_arrival_until_its_partition_goes_on_without_it() -> None:
    script = Script()
    call = script.start()
    script.followers.start_missing()
    assert script.taken(StartFollower) == []  # one at a time
    script.report(False)
    assert not script.counts
    script.followers.started(call, None)
    assert script.counts
    for _ in range(REPORTS_TO_FOLLOW - 1):
        script.report(False)  # asked for before it arrived
    script.report(True)
    for _ in range(REPORTS_TO_FOLLOW - 1):
        script.report(False)
    assert script.counts
    assert script.taken(StopFollower) == []
    script.report(False)
    assert not script.counts
    assert script.taken(StopFollower) == [StopFollower(partition=0)]
    assert "its partition goes on without it" in script.taken(Tell)[-1].text


def test_a_follower_of_a_partition_that_is_no_more_does_not_count() -> None:
    script = Script()
    late = script.start()
    script.followers.partition_replaced(0)
    script.followers.started(late, None)
    script.followers.start_failed(late, FollowerLost("too late"), 0.0)
    assert not script.counts
    assert script.out == []
    script.followers.started(script.start(), None)
    assert script.counts


def test_without_another_chance_the_partition_goes_on_without_one() -> None:
    script = Script()
    for _ in range(MAX_IN_A_ROW + 1):
        script.followers.start_failed(script.start(), FollowerLost("it died"), 0.0)
    assert "going on without one" in script.taken(Tell)[-1].text
    script.followers.start_missing()
    script.followers.partition_replaced(0)
    script.followers.start_missing()
    assert script.taken(StartFollower) == []


def test_followers_that_nobody_wants_are_never_started() -> None:
    script = Script(wanted=False)
    script.followers.start_missing()
    script.report(False)
    assert script.out == []


ELSEWHERE: Any = SimpleNamespace(network=SimpleNamespace(host="10.0.0.2"))


def test_a_partition_that_has_lost_its_follower_elsewhere_has_our_word_once() -> None:
    """From then on that follower cannot take over, whatever is heard of it later."""
    script = Script()
    call = script.start()
    script.followers.started(call, ELSEWHERE)
    assert script.taken(Tell)[-1].text == "partition 0 has a follower on 10.0.0.2"
    (watch,) = script.taken(WatchPrimary)
    script.report(False, waits_for_word=1)
    assert not script.counts
    assert [type(given) for given in script.out] == [StopFollower, Tell, LetAlone]
    assert script.taken(LetAlone) == [LetAlone(partition=0, incarnation=7, follower=1)]
    script.report(False, waits_for_word=1)  # it was asked before the word came
    assert script.taken(LetAlone) == []
    assert not script.suspect(watch, "silent")
    script.followers.started(call, ELSEWHERE)
    assert not script.counts


def test_a_follower_that_is_lost_before_we_hear_that_it_has_joined_does_not_count() -> None:
    script = Script()
    call = script.start()
    script.report(False, waits_for_word=1)
    assert len(script.taken(LetAlone)) == 1
    script.followers.started(call, ELSEWHERE)
    assert not script.counts
    script.followers.started(script.start(), ELSEWHERE)
    assert script.counts


def test_a_partition_that_its_follower_does_not_hear_and_that_reports_is_watched_on() -> None:
    script = Script()
    script.followers.started(script.start(), ELSEWHERE)
    (watch,) = script.taken(WatchPrimary)
    assert not script.followers.suspects(watch, None, 0.0)
    assert script.suspect(watch, "silent")
    assert script.followers.suspected.keys() == {0}
    script.report(True)
    assert script.followers.suspected == {}
    assert script.taken(WatchPrimary) == [watch]
    assert script.counts
    assert script.suspect(watch, "closed")
    script.followers.partition_replaced(0)
    assert script.followers.suspected == {}
    assert not script.suspect(watch, "closed")


@pytest.mark.parametrize("kind", ["closed", "unreachable", "silent"])
def test_a_follower_alone_proves_nothing(kind: Kind) -> None:
    """The wait begins with what is heard later, so a driver that was kept blames nobody."""
    suspicion = Suspicion(trouble=Trouble(kind=kind, why="it is silent"), since_s=10.0)
    late_s = LATE_S[kind]
    assert suspicion.confirmed(None, None, 100.0) is None
    assert suspicion.confirmed(2.0, None, 10.0 + 0.9 * late_s) is None
    assert suspicion.confirmed(11.0, None, 11.0 + 0.9 * late_s) is None
    assert suspicion.confirmed(2.0, None, 10.0 + 1.01 * late_s) is not None
    assert suspicion.confirmed(11.0, None, 11.0 + 1.01 * late_s) is not None


def test_a_partition_whose_connections_to_both_have_ended_is_gone() -> None:
    """The kernel has closed them with their process; no report has to be late."""
    closed = Suspicion(trouble=Trouble(kind="closed", why="it is gone"), since_s=10.0)
    silent = Suspicion(trouble=Trouble(kind="silent", why="it is silent"), since_s=10.0)
    assert closed.confirmed(10.0, 9.9, 10.0) == (
        "it is gone, and replicas lost their connection, too"
    )
    assert silent.confirmed(10.0, 9.9, 10.0) is None


def test_followers_are_counted_on_from_those_of_an_earlier_driver() -> None:
    """One that the earlier driver had started and that comes late has a lower number."""
    script = Script(before=(3,))
    script.report(False, waits_for_word=3)
    assert [word.follower for word in script.taken(LetAlone)] == [3]
    assert script.start().start == 4
