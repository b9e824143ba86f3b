"""Spares: processes that have everything imported, and wait to become an actor of a run.

A new actor first has to import PyTorch, which takes a second and more of processor time. A spare
has done that. When an actor has died, a spare is told what it is to be. Not here: how many spares
there are (`backend`).
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, ClassVar

from downpour.paramserver.actor import PartitionActor
from downpour.workers.actor import ReplicasActor

ASSUME_DEADLINE_S = 60.0


class _Spare:
    """What both kinds have in common. It comes before the actor's class among the bases.

    Ray may call from several threads, in any order.
    """

    _kind: ClassVar[str]

    def __init__(self) -> None:
        """Do nothing: the imports are done by now."""
        self._assumed: Future[None] = Future()

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return super().__repr__() if self._assumed.done() else f"Spare({self._kind})"

    def is_ready(self) -> bool:
        """Answer: that it can means that all is imported."""
        return True

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
