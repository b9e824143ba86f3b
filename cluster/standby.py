"""Actors that are built in two halves: a process with everything imported, and later the actor.

What keeps a new actor from its work is the import of PyTorch, a second and more of processor time.
A spare has that behind it; what it is to be, it is told when somebody has died. Which spares there
are is `ray_backend`'s; Ray is not imported here.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from paramserver.actor import PartitionActor
from workers.actor import ReplicasActor

ASSUME_DEADLINE_S = 60.0


class _Spare:
    """What both kinds have in common. Calls may come from several threads, in any order."""

    _assumed: Future[None]

    def ready(self) -> None:
        """Answers once the process is up."""

    def _become(self, build: Any, arguments: tuple[Any, ...]) -> None:
        try:
            build(*arguments)
        except BaseException as error:
            self._assumed.set_exception(error)
            raise
        self._assumed.set_result(None)


class ReplicasSpare(_Spare, ReplicasActor):
    """A process that may become one of replicas."""

    def __init__(self) -> None:
        """Nothing but the imports, which are done by now."""
        self._assumed = Future()

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return super().__repr__() if self._assumed.done() else "Spare(replicas)"

    def assume(self, *arguments: Any) -> None:
        """Become a `ReplicasActor` with these arguments."""
        self._become(super().__init__, arguments)

    def connect(self, *arguments: Any) -> int:
        """As the actor's, once it is one."""
        self._assumed.result(ASSUME_DEADLINE_S)
        return super().connect(*arguments)


class PartitionSpare(_Spare, PartitionActor):
    """A process that may become a partition."""

    def __init__(self) -> None:
        """Nothing but the imports, which are done by now."""
        self._assumed = Future()

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return super().__repr__() if self._assumed.done() else "Spare(partition)"

    def assume(self, *arguments: Any) -> None:
        """Become a `PartitionActor` with these arguments."""
        self._become(super().__init__, arguments)

    def endpoint(self) -> Any:
        """As the actor's, once it is one."""
        self._assumed.result(ASSUME_DEADLINE_S)
        return super().endpoint()
