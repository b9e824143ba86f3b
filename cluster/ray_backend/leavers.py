"""Which actors are on nodes that are to leave, and when the first of these nodes does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from downpour.cluster.ray_backend.nodes import alive, leaving


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
        self._met = {driver} & ends.keys()
        """Nodes that something was found on."""

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
        self._met.update(node for node in nodes if node is not None)
        return tuple(index for index, node in enumerate(nodes) if node is not None)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the first node leaves that something was found on; None if none says."""
        ends = [end for node in self._met if (end := self._ends[node]) is not None]
        return max(0.0, min(ends) - time.time()) if ends else None
