"""Spares: processes that wait to become an actor of a run with everything imported.

What keeps a new actor from its work is the import of PyTorch, a second and more of processor time.
A spare has that behind it; what it is to be, it is told when somebody has died. Which spares there
are is `ray_backend`'s; Ray is not imported here.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, ClassVar

from downpour.paramserver.actor import PartitionActor
from downpour.workers.actor import ReplicasActor

ASSUME_DEADLINE_S = 60.0


class _Spare:
    """What both kinds have in common; comes before the actor's class among the bases.

    Calls may come from several threads, in any order.
    """

    _kind: ClassVar[str]

    def __init__(self) -> None:
        """Nothing but the imports, which are done by now."""
        self._assumed: Future[None] = Future()

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return super().__repr__() if self._assumed.done() else f"Spare({self._kind})"

    def assume(self, *arguments: Any) -> None:
        """Become the actor, with these arguments."""
        try:
            super().__init__(*arguments)
        except BaseException as error:
            self._assumed.set_exception(error)
            raise
        self._assumed.set_result(None)


class ReplicasSpare(_Spare, ReplicasActor):
    """A process that may become one of replicas."""

    _kind = "replicas"

    def connect(self, *arguments: Any) -> int:
        """As the actor's, once it is one."""
        self._assumed.result(ASSUME_DEADLINE_S)
        return super().connect(*arguments)


class PartitionSpare(_Spare, PartitionActor):
    """A process that may become a partition."""

    _kind = "partition"

    def endpoint(self) -> Any:
        """As the actor's, once it is one."""
        self._assumed.result(ASSUME_DEADLINE_S)
        return super().endpoint()
