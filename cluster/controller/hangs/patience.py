"""How long a wait may last, from how long such waits have lasted. Pure: the clock is the caller's.

A member that dies is told of by its socket or by Ray. One that hangs says nothing: a process that
was stopped, a read from a bucket that never returns. So every wait has a limit: some times the
longest of the waits of its kind that ended well, and never less than a floor. Before one has ended
well there is nothing to go by but a generous limit.

A wait that is given up does not tell how long it would have taken. If one after the other is, they
may be slow and not hang: so each doubles the limit, until one ends well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from downpour.cluster.config.policy import HANG_AFTER_S

Wait = Literal["report", "answer", "snapshot", "window", "life", "scoring", "start", "connection"]
"""What is waited for: a partition's regular report, its answer to an inquiry, its snapshot; a
window; a sign of life of a process that has windows; progress of a scoring; a start; a member that
connects, or takes its partition's place."""

MOST_DOUBLINGS = 4
"""Of a limit, by waits of its kind that are given up one after the other."""
HALF_LIFE_S = 3600.0
"""After so long, the longest wait counts for half: conditions change."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How long waits of one kind may last."""

    first_s: float
    """Before any has ended well."""
    least_s: float
    """At the least: what a busy machine or a slow disk may take."""
    times: float = 10.0
    """So many times the longest that ended well."""


LIMITS: Mapping[Wait, Limit] = {  # for `--hang-after-s 30`
    "report": Limit(first_s=60.0, least_s=30.0),
    "answer": Limit(first_s=120.0, least_s=60.0),
    "snapshot": Limit(first_s=1800.0, least_s=120.0),
    "window": Limit(first_s=3600.0, least_s=120.0),
    "life": Limit(first_s=600.0, least_s=HANG_AFTER_S),
    "scoring": Limit(first_s=600.0, least_s=60.0),
    "start": Limit(first_s=1800.0, least_s=300.0),
    "connection": Limit(first_s=300.0, least_s=60.0),
}


def limits(hang_after_s: float) -> Mapping[Wait, Limit]:
    """Return `LIMITS` in proportion to how long a process must be silent, at the least."""
    ratio = hang_after_s / HANG_AFTER_S
    return {
        wait: Limit(first_s=ratio * of.first_s, least_s=ratio * of.least_s, times=of.times)
        for wait, of in LIMITS.items()
    }


class Patience:
    """What waits have taken in one session of a run, and whether one lasts too long."""

    def __init__(self, limits: Mapping[Wait, Limit] | None = None) -> None:
        """Nothing has been waited for; `LIMITS` if none are given."""
        self._limits = LIMITS if limits is None else limits
        self._longest: dict[Wait, tuple[float, float]] = {}
        """Of each kind: the longest wait that ended well, and when it ended."""
        self._given_up: Counter[Wait] = Counter()
        """Of each kind: waits that were given up since one ended well."""

    def took(self, wait: Wait, seconds: float, now: float) -> None:
        """A wait has ended well."""
        self._given_up.pop(wait, None)
        if seconds >= (self.longest_s(wait, now) or 0.0):
            self._longest[wait] = (seconds, now)

    def gave_up(self, wait: Wait) -> None:
        """A wait has been given up."""
        self._given_up[wait] += 1

    def longest_s(self, wait: Wait, now: float) -> float | None:
        """Return the longest wait that ended well, less what time has taken off; None if none."""
        if wait not in self._longest:
            return None
        seconds, at_s = self._longest[wait]
        return seconds * math.exp2(-(now - at_s) / HALF_LIFE_S)

    def limit_s(self, wait: Wait, now: float) -> float:
        """Return how long a wait may last now."""
        limit, longest_s = self._limits[wait], self.longest_s(wait, now)
        if longest_s is None:
            return limit.first_s
        doubled = 2.0 ** min(self._given_up[wait], MOST_DOUBLINGS)
        return doubled * max(limit.least_s, limit.times * longest_s)

    def lost(self, wait: Wait, seconds: float, now: float) -> str | None:
        """Return why a wait that has lasted for so long is given up; None if it is not."""
        if seconds <= self.limit_s(wait, now):
            return None
        longest_s = self.longest_s(wait, now)
        before = "it was the first" if longest_s is None else f"which took {longest_s:.2g} s before"
        return f"nothing for {seconds:.0f} s, {before}"


class Watch:
    """The calls that are under way, each with what it is and since when."""

    def __init__(self, patience: Patience) -> None:
        """Nothing is under way."""
        self._patience = patience
        self._since: dict[Hashable, tuple[Wait, float]] = {}

    def began(self, call: Hashable, wait: Wait, now: float) -> None:
        """A call has been made."""
        self._since[call] = (wait, now)

    def ended(self, call: Hashable, now: float, *, well: bool) -> None:
        """A call has been answered, or has failed."""
        wait, began_s = self._since.pop(call, (None, 0.0))
        if wait is not None and well:
            self._patience.took(wait, now - began_s, now)

    def forgive(self, seconds: float) -> None:
        """Nobody has waited for so long: whoever waits stood still."""
        self._since = {call: (wait, s + seconds) for call, (wait, s) in self._since.items()}

    def overdue(self, now: float) -> list[tuple[Hashable, str]]:
        """Return the calls that last too long, each once and with the reason."""
        late = [
            (call, why)
            for call, (wait, began_s) in self._since.items()
            if (why := self._patience.lost(wait, now - began_s, now)) is not None
        ]
        for wait in {self._since.pop(call)[0] for call, _ in late}:
            self._patience.gave_up(wait)
        return late
