"""The line of requests that wait to be answered: who may begin, who waits, who is sent away. Pure.

Serve's router slows down if it is offered more than its replicas take: it asks them again and
again, less and less often, who has room. So requests wait here, before it, in the order in which
they came, and only as many go on as the replicas take.

A request is sent away at once if too many wait already, or if it would wait too long by the rate at
which others were answered of late. Not here: sockets and clocks (`gate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_S = 20.0
"""Seconds after which an answer counts half in the rate."""
LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class LineBounds:
    """How long the line may be."""

    at_once: int
    """Most requests that are being answered."""
    most_waiting: int
    """Most requests that wait."""
    longest_wait_s: float
    """Longest that a request is expected to wait, and may wait."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that has come in."""

    ticket: int
    """Its number."""
    begins: bool
    """Whether it may begin; if not, it waits."""


@dataclass(frozen=True, kw_only=True)
class SentAway:
    """A request that is not answered, since the line is too long."""

    retry_after_s: int
    """When it may be worth to come again: in so many seconds."""


class Line:
    """Requests that are being answered, and those that wait, the first first."""

    def __init__(self, bounds: LineBounds) -> None:
        """There are none."""
        self._bounds = bounds
        self._waiting: dict[int, None] = {}  # in the order of arrival
        self._next = self._answered = 0
        self._last_s: float | None = None
        self._busy_s = self._recent = 0.0
        self.num_begun = 0
        """Requests that are being answered."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def rate(self) -> float | None:
        """Answers a second of late, while there was something to answer; None if not known yet."""
        known = self._answered >= self._bounds.at_once and self._busy_s > 0
        return self._recent / self._busy_s if known else None

    @property
    def wait_s(self) -> float | None:
        """How long one that came now would take; None if that is not known."""
        if self.rate is None:
            return None
        return (self.num_begun + self.num_waiting + 1) / max(self.rate, 1e-9)

    def arrive(self, now: float) -> Arrival | SentAway:
        """A request comes in."""
        self._pass_time(now)
        if self.num_begun < self._bounds.at_once and not self._waiting:
            self.num_begun += 1
            return Arrival(ticket=self._take_ticket(), begins=True)
        wait_s = self.wait_s
        if self.num_waiting >= self._bounds.most_waiting or (
            wait_s is not None and wait_s > self._bounds.longest_wait_s
        ):
            return self.sent_away()
        ticket = self._take_ticket()
        self._waiting[ticket] = None
        return Arrival(ticket=ticket, begins=False)

    def leave(self, now: float, *, answered: bool) -> int | None:
        """One that had begun is done; returns the ticket of the one that begins now, if any."""
        assert self.num_begun > 0, "nobody has begun"
        self._pass_time(now)
        if answered:
            self._answered += 1
            self._recent += 1
        self.num_begun -= 1
        if not self._waiting:
            return None
        ticket = next(iter(self._waiting))
        del self._waiting[ticket]
        self.num_begun += 1
        return ticket

    def give_up(self, ticket: int) -> SentAway:
        """One that waited has waited too long."""
        self._waiting.pop(ticket, None)
        return self.sent_away()

    def sent_away(self) -> SentAway:
        """What is said to one that comes while the line is as it is: come when half is gone."""
        half_s = (self.wait_s or 0.0) / 2
        return SentAway(retry_after_s=min(LONGEST_RETRY_S, max(1, math.ceil(half_s))))

    def check(self) -> None:
        """Assert that nobody waits while there is room."""
        assert 0 <= self.num_begun <= self._bounds.at_once
        assert not self._waiting or self.num_begun == self._bounds.at_once

    def _take_ticket(self) -> int:
        self._next += 1
        return self._next

    def _pass_time(self, now: float) -> None:
        elapsed_s = 0.0 if self._last_s is None else max(0.0, now - self._last_s)
        self._last_s = now
        if self.num_begun:  # while there is nothing to answer, the rate says nothing
            kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
            self._busy_s = self._busy_s * kept + elapsed_s
            self._recent *= kept
