"""Which actors are on nodes that are to leave, and when the first of these nodes does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from downpour.cluster.ray_backend.nodes import alive, leaving

CLOCK_ANSWER_S = 1.0
"""For so long an actor is waited for that is asked for its node's time of day, once a notice."""


class Ends:
    """When nodes leave, in elapsed time.

    Ray tells it as a time of day, by the clock of whoever drains the node. That is mostly the node
    itself: only it is told of its preemption. So its own clock says how long it still has, or the
    driver's, if nobody there answers. It is asked once a notice: clocks that are set later change
    nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """No node leaves. `clock` gives seconds from some moment on."""
        self._clock = clock
        self._at_s: dict[tuple[str, float], float] = {}
        """When a node leaves, by its id and the time of day that Ray tells."""

    def remaining_s(self, node: str, end: float, actor: Any) -> float:
        """Return the seconds until a node leaves.

        Args:
            node: its id.
            end: Unix time.
            actor: one that is there; None if none is.
        """
        if (node, end) not in self._at_s:
            left_s = end - _time_of_day(actor)
            self._at_s[node, end] = self._clock() + left_s
        return max(0.0, self._at_s[node, end] - self._clock())


def _time_of_day(actor: Any) -> float:
    """Unix time by the clock of an actor's node, or the driver's."""
    if actor is not None:
        with contextlib.suppress(Exception):
            there: float = ray.get(actor.__ray_call__.remote(_now), timeout=CLOCK_ANSWER_S)
            return there
    return time.time()


def _now(_: object) -> float:
    return time.time()


class Leavers:
    """What Ray knows at one time of nodes that are to leave, and of the actors there."""

    def __init__(
        self, ends: Mapping[str, float | None], on: Mapping[str, str], *, driver: str
    ) -> None:
        """Nothing has been asked.

        Args:
            ends: when each of these nodes leaves, by its id: Unix time, or None if nobody says.
            on: on which node each actor is, by ids; only those that can go on elsewhere.
            driver: id of the driver's node.
        """
        self._ends = ends
        self._on = {actor: node for actor, node in on.items() if node in ends and node != driver}
        self.has_driver = driver in ends
        """The driver's node is to leave; what is there ends with the run."""
        self._met: dict[str, Any] = {driver: None} if self.has_driver else {}
        """Nodes that something was found on, with an actor there; the driver is on its own."""

    @classmethod
    def look(cls, driver: str) -> Leavers | None:
        """Ask Ray; None if no node is to leave."""
        going = leaving()
        if not going:
            return None
        if all(node.id in going for node in alive()):
            return cls(going, {}, driver=driver)  # there is no other place
        from ray._private.state import actors

        on = {id: about["Address"]["NodeID"] for id, about in actors().items()}
        return cls(going, on, driver=driver)

    def among(self, actors: Sequence[Any]) -> tuple[int, ...]:
        """Return which of some actors are on such nodes; those that are None are nowhere."""
        nodes = [None if actor is None else self._on.get(actor._actor_id.hex()) for actor in actors]
        for node, actor in zip(nodes, actors, strict=True):
            if node is not None:
                self._met.setdefault(node, actor)
        return tuple(index for index, node in enumerate(nodes) if node is not None)

    def remaining_s(self, ends: Ends) -> float | None:
        """Return the seconds until the first node leaves that something was found on.

        None if nobody says. `ends` remembers when nodes leave.
        """
        left_s = [
            ends.remaining_s(node, end, actor)
            for node, actor in self._met.items()
            if (end := self._ends[node]) is not None
        ]
        return min(left_s, default=None)
