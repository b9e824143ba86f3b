"""What is known of nodes that are to leave, and until when members there may finish what they do.

Pure: the clock is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAVE_BEFORE_S = 10.0
"""So long before a node leaves, what is not finished there is given up, and done elsewhere."""
NO_DEADLINE_S = 600.0
"""If nobody says when a node leaves, it is taken to leave after so long."""
SAME_S = 3.0
"""Two notices whose ends are no further apart are one."""


@dataclass(frozen=True, kw_only=True)
class Departing:
    """Members of the run on nodes that are to leave, if there is a place for them elsewhere."""

    processes: tuple[int, ...] = ()
    """Processes of replicas."""
    partitions: tuple[int, ...] = ()
    followers: tuple[int, ...] = ()
    """Partitions whose followers are there."""
    shufflers: int = 0
    """How many."""
    evaluator: bool = False
    driver: bool = False
    """The driver is on such a node itself: so it may be with others, which are not among these."""
    crowded: int = 0
    """Processes of replicas that no other node has a free GPU for."""
    remaining_s: float | None = None
    """Seconds until the first of these nodes leaves; None if nobody says."""

    @property
    def any(self) -> bool:
        """Whether there are some."""
        members = (*self.processes, *self.partitions, *self.followers)
        one = self.evaluator or self.driver
        return bool(members or self.shufflers or self.crowded or one)


class Notice:
    """Until when members on nodes that are to leave may finish what they do."""

    def __init__(self) -> None:
        """No node is to leave."""
        self._ends_s: float | None = None
        """When the node leaves, as far as is known."""
        self._half_s: float | None = None
        self._over_s: float | None = None
        self._told: set[str] = set()
        self.of_driver = False
        """The driver's own node is to leave."""

    def heard(self, departing: Departing, now: float) -> None:
        """Note what is known at this time."""
        self.of_driver = departing.driver
        if not departing.any:
            self._ends_s = self._half_s = self._over_s = None
            self._told.clear()
            return
        if departing.remaining_s is None:
            if self._ends_s is None:
                self._begin(NO_DEADLINE_S, now)
            return
        ends_s = now + departing.remaining_s
        if self._ends_s is None or abs(ends_s - self._ends_s) > SAME_S:
            self._begin(departing.remaining_s, now)

    def _begin(self, remaining_s: float, now: float) -> None:
        self._ends_s = now + remaining_s
        there_s = max(remaining_s - LEAVE_BEFORE_S, remaining_s / 2)
        self._half_s, self._over_s = now + there_s / 2, now + there_s

    def is_over(self, now: float) -> bool:
        """Whether nothing there may be waited for any more."""
        return self._over_s is not None and now >= self._over_s

    def is_half_over(self, now: float) -> bool:
        """Whether half of the time has passed until `is_over`."""
        return self._half_s is not None and now >= self._half_s

    def is_news(self, text: str) -> bool:
        """Return whether this has not been said of the present notice; True once."""
        news = text not in self._told
        self._told.add(text)
        return news
