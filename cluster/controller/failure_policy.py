"""What is done about a failure: a pure policy that also says why.

Failures go in, decisions come out. The decisions are carried out by the parts of the run's state
that look after the members: `partitions`, `followers`, `replica_processes`, `evaluation`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["replicas", "partition", "follower", "shuffler", "evaluator"]
Cause = Literal["died", "disconnected", "failed", "silent", "slow"]
Action = Literal["restart", "promote", "reconnect", "go without", "give up"]

MAX_IN_A_ROW = 5
"""Failures of one member, without any progress of it in between, after which one more ends the
run."""
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


class FailurePolicy:
    """Decides what is done about each failure; remembers what has failed so far."""

    def __init__(self, *, max_restarts: int) -> None:
        """Nothing has failed. At most `max_restarts` members of each part are replaced."""
        self._max_restarts = max_restarts
        self.restarts: Counter[Part] = Counter()
        """Replaced members, by part."""
        self._in_a_row: Counter[tuple[Part, int]] = Counter()
        self._reconnects: Counter[tuple[Part, int]] = Counter()

    def progressed(self, part: Part, index: int = 0) -> None:
        """A member has done what it is there for, so its failures count from 0 again.

        If replicas train, the failures of the evaluator count from 0 again, too. The evaluator is
        not needed before the end, and a run must not end because its weights cannot be scored for a
        while.
        """
        self._in_a_row.pop((part, index), None)
        self._reconnects.pop((part, index), None)
        if part == "replicas":
            self._in_a_row.pop(("evaluator", 0), None)

    def decide(self, failure: Failure, *, followed: bool = False) -> Recovery:
        """Decide what to do about a failure.

        A member that has lost its connection is connected again, since its process lives and a new
        one costs seconds. If it loses the connection again and again, it is replaced. A member that
        is dead, silent, slow or has failed is replaced: a partition that is `followed` by its
        follower, which has all that the partition had answered. The run is given up beyond
        `max_restarts`, and if one member fails more than `MAX_IN_A_ROW` times before it has done
        anything.
        Without followers the run goes on.
        """
        member = (failure.part, failure.index)
        if failure.cause == "disconnected" and self._reconnects[member] < MAX_RECONNECTS:
            self._reconnects[member] += 1
            count = f"{self._reconnects[member]} of {MAX_RECONNECTS}"
            return Recovery(action="reconnect", reason=f"{failure}: connecting again, {count}")
        end: Action = "go without" if failure.part == "follower" else "give up"
        on = ": going on without one" if failure.part == "follower" else ""
        if self.restarts[failure.part] >= self._max_restarts:
            return Recovery(
                action=end,
                reason=f"{failure}; members of its kind died {self._max_restarts} times, which is "
                f"all that --max-restarts allows{on}",
            )
        if self._in_a_row[member] >= MAX_IN_A_ROW:
            return Recovery(
                action=end,
                reason=f"{failure}; it did so {MAX_IN_A_ROW + 1} times without doing anything in "
                f"between{on}",
            )
        self.restarts[failure.part] += 1
        self._in_a_row[member] += 1
        self._reconnects.pop(member, None)
        how = "its follower takes its place" if followed else "replaced"
        count = f"{self.restarts[failure.part]} of {self._max_restarts}"
        return Recovery(
            action="promote" if followed else "restart",
            reason=f"{failure}: {how}, {count} for its kind",
        )


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
