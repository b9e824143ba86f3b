"""What is done about a failure: a pure policy that also says why.

Failures go in, decisions come out. The decisions are carried out by the parts of the run's state
that look after the members: `partitions`, `followers`, `replica_processes`, `evaluation`.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["replicas", "partition", "follower", "shuffler", "evaluator"]
Cause = Literal["died", "disconnected", "failed", "silent", "slow"]
Action = Literal["restart", "promote", "reconnect", "go without", "give up"]

MAX_IN_A_ROW = 5
"""Failures of one member, without any progress of it in between, after which one more ends the
run, or a process of replicas has to wait."""
PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""How long such a process has to wait while others train: first, and at most. Each wait is twice as
long as the one before."""
RESTARTS_WITHIN_S = 3600.0
"""What --max-restarts counts within."""
MAX_RECONNECTS = 3
"""Reconnections of one member, without progress in between, before it is replaced instead."""

_HAPPENED: dict[Cause, str] = {
    "died": "died",
    "disconnected": "lost a connection",
    "failed": "failed",
    "silent": "does not answer",
    "slow": "is far slower than the others",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A member of the run that is not what it should be."""

    part: Part
    index: int = 0
    """Which one of its part."""
    name: str
    """What people call it."""
    cause: Cause
    detail: str = ""
    """More about the cause, as one line."""

    def __str__(self) -> str:
        """Return what happened, as a log shows it."""
        return f"{self.name} {_HAPPENED[self.cause]}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What is to be done about a failure, and why."""

    action: Action
    reason: str
    pause_s: float = 0.0
    """A restart has to wait for so long."""


class FailurePolicy:
    """Decides what is done about each failure; remembers what has failed so far."""

    def __init__(self, *, max_restarts: int) -> None:
        """Nothing has failed. Each member is replaced at most `max_restarts` times an hour."""
        self._max_restarts = max_restarts
        self.restarts: Counter[Part] = Counter()
        """Replaced members, by part."""
        self._replaced_s: dict[tuple[Part, int], deque[float]] = {}
        """When each member was replaced within the last hour."""
        self._in_a_row: Counter[tuple[Part, int]] = Counter()
        self._reconnects: Counter[tuple[Part, int]] = Counter()
        self._others_train: set[int] = set()
        """Processes of replicas that failed, and have not got on again, while others have."""

    def progressed(self, part: Part, index: int | None = None) -> None:
        """A member has done what it is there for, so its failures count from 0 again.

        Without `index` all members of its part have.
        If replicas train, the failures of the evaluator count from 0 again, too. The evaluator is
        not needed before the end, and a run must not end because its weights cannot be scored for a
        while.
        """
        for counts in (self._in_a_row, self._reconnects):
            for member in [m for m in counts if m[0] == part and index in (None, m[1])]:
                del counts[member]
        if part == "replicas":
            self._in_a_row.pop(("evaluator", 0), None)
            self._others_train = {i for of, i in self._in_a_row if of == "replicas"}

    def decide(self, failure: Failure, now: float, *, followed: bool = False) -> Recovery:
        """Decide what to do about a failure.

        A member that has lost its connection is connected again, since its process lives and a new
        one costs seconds. If it loses the connection again and again, it is replaced. A member that
        is dead, silent, slow or has failed is replaced: a partition that is `followed` by its
        follower, which has all that the partition had answered.
        The run is given up if one member fails more than `max_restarts` times an hour, or more than
        `MAX_IN_A_ROW` times before it has done anything. A process of replicas that does nothing
        ends no run in which others train: it is replaced after a pause. Without followers the run
        goes on, too.
        """
        member = (failure.part, failure.index)
        if failure.cause == "disconnected" and self._reconnects[member] < MAX_RECONNECTS:
            self._reconnects[member] += 1
            count = f"{self._reconnects[member]} of {MAX_RECONNECTS}"
            return Recovery(action="reconnect", reason=f"{failure}: connecting again, {count}")
        end: Action = "go without" if failure.part == "follower" else "give up"
        on = ": going on without one" if failure.part == "follower" else ""
        replaced = self._within_an_hour(member, now)
        if len(replaced) >= self._max_restarts:
            return Recovery(
                action=end,
                reason=f"{failure}; it was replaced {len(replaced)} times within an hour, which is "
                f"all that --max-restarts allows{on}",
            )
        in_a_row = self._in_a_row[member] + 1
        useless = f"it did so {in_a_row} times without doing anything in between"
        pause_s = 0.0
        if in_a_row > MAX_IN_A_ROW:
            if failure.part != "replicas" or failure.index not in self._others_train:
                return Recovery(action=end, reason=f"{failure}; {useless}{on}")
            pause_s = _pause_s(in_a_row)
        self.restarts[failure.part] += 1
        replaced.append(now)
        self._in_a_row[member] = in_a_row
        self._reconnects.pop(member, None)
        if failure.part == "replicas":
            self._others_train.discard(failure.index)
        how = "its follower takes its place" if followed else "replaced"
        wait = f" in {pause_s:.0f} s, since {useless}, and others train" if pause_s else ""
        count = f"{len(replaced)} of {self._max_restarts} within an hour"
        return Recovery(
            action="promote" if followed else "restart",
            reason=f"{failure}: {how}{wait}, {count}",
            pause_s=pause_s,
        )

    def _within_an_hour(self, member: tuple[Part, int], now: float) -> deque[float]:
        replaced = self._replaced_s.setdefault(member, deque())
        while replaced and now - replaced[0] > RESTARTS_WITHIN_S:
            replaced.popleft()
        return replaced


def _pause_s(in_a_row: int) -> float:
    doubled = min(in_a_row - MAX_IN_A_ROW - 1, 10)
    return min(PAUSE_S * 2.0**doubled, LONGEST_PAUSE_S)


def stragglers(rates: Mapping[int, float], ratio: float) -> dict[int, str]:
    """Return the members whose rate is below the median of the others by more than `ratio`.

    Args:
        rates: mini-batches a second, by member. One member alone is compared with nobody.
        ratio: how many times slower than the median a straggler is.

    Returns:
        For each straggler, a line on how slow it is.
    """
    slow = {}
    for member, rate in rates.items():
        others = [r for m, r in rates.items() if m != member]
        if others and rate * ratio < (median := statistics.median(others)):
            slow[member] = f"{rate:.3g} mini-batches a second, where the median is {median:.3g}"
    return slow
