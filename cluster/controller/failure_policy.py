"""What is done when a part of the run dies: a pure policy that also says why.

Losses go in, decisions come out; nothing here knows Ray, clocks or actors. Who carries a decision
out is `partitions`, `processes` or `evaluating`; what it costs, and why nothing is lost by it, is
in docs/recovery.md.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["replicas", "partition", "follower", "shuffler", "evaluator"]
Cause = Literal["died", "disconnected", "failed", "silent", "slow"]
Action = Literal["restart", "promote", "reconnect", "go without", "give up"]

MAX_IN_A_ROW = 5
"""Losses of one member, without any progress of it in between, that end the run."""
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
class Loss:
    """A member of the run that is not what it should be."""

    part: Part
    index: int
    """Which one of its part."""
    name: str
    """What people call it."""
    cause: Cause
    detail: str = ""
    """More about the cause, as one line."""

    def __str__(self) -> str:
        """As a log shows it."""
        return f"{self.name} {_HAPPENED[self.cause]}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What is to be done about a loss, and why."""

    action: Action
    reason: str


@dataclass(kw_only=True)
class History:
    """What has been lost so far. `decide` adds to it; `progressed` is told of what went well."""

    restarts: Counter[Part] = field(default_factory=Counter)
    """Replaced members, by part."""
    _in_a_row: Counter[tuple[Part, int]] = field(default_factory=Counter)
    _reconnects: Counter[tuple[Part, int]] = field(default_factory=Counter)

    def progressed(self, part: Part, index: int) -> None:
        """A member has done what it is there for, so that its losses begin to count anew.

        Where replicas train, so do those of the evaluator: it is not needed before the end, and a
        run whose weights cannot be scored for a while is not to end for it.
        """
        self._in_a_row.pop((part, index), None)
        self._reconnects.pop((part, index), None)
        if part == "replicas":
            self._in_a_row.pop(("evaluator", 0), None)


def decide(loss: Loss, history: History, *, max_restarts: int, followed: bool = False) -> Recovery:
    """What to do about `loss`; `max_restarts` bounds the members of a part that are replaced.

    A partition that is `followed` is replaced by its follower, which has all that it had answered.

    A member whose connection is lost is connected again, since its process lives and a new one
    costs seconds; one that loses it again and again is replaced. Members that are dead, silent,
    slow or have failed are replaced. The run is given up where that does not help: beyond
    `max_restarts`, or when one member is lost `MAX_IN_A_ROW` times before it has done anything; of
    a follower, the run goes on without one then.
    """
    member = (loss.part, loss.index)
    if loss.cause == "disconnected" and history._reconnects[member] < MAX_RECONNECTS:
        history._reconnects[member] += 1
        return Recovery(
            action="reconnect",
            reason=f"{loss}: connecting again, {history._reconnects[member]} of {MAX_RECONNECTS}",
        )
    end: Action = "go without" if loss.part == "follower" else "give up"
    on = ": going on without one" if loss.part == "follower" else ""
    if history.restarts[loss.part] >= max_restarts:
        return Recovery(
            action=end,
            reason=f"{loss}; members of its kind died {max_restarts} times, which is all that "
            f"--max-restarts allows{on}",
        )
    if history._in_a_row[member] >= MAX_IN_A_ROW:
        return Recovery(
            action=end,
            reason=f"{loss}; it did so {MAX_IN_A_ROW + 1} times without doing anything in "
            f"between{on}",
        )
    history.restarts[loss.part] += 1
    history._in_a_row[member] += 1
    history._reconnects.pop(member, None)
    how = "its follower takes its place" if followed else "replaced"
    return Recovery(
        action="promote" if followed else "restart",
        reason=f"{loss}: {how}, {history.restarts[loss.part]} of {max_restarts} for its kind",
    )


def stragglers(rates: Mapping[int, float], ratio: float) -> dict[int, str]:
    """Members whose rate is below the median of the others by more than `ratio`, and how far.

    A rate is mini-batches a second. One member alone is compared with nobody.
    """
    slow = {}
    for member, rate in rates.items():
        others = [r for m, r in rates.items() if m != member]
        if others and rate * ratio < (median := statistics.median(others)):
            slow[member] = f"{rate:.3g} mini-batches a second, where the median is {median:.3g}"
    return slow
