"""What Ray's exceptions mean to the controller."""

from __future__ import annotations

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from downpour.cluster.controller.protocol.backend import PartitionLost, RunFailed, WriteFailed
from downpour.cluster.errors import one_line, user_message
from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded

LOST = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
    TaskUnschedulableError,
)
"""Ray raises these if a process has died, or is out of reach."""


def translated(error: Exception, lost: type[Exception], what: str) -> Exception:
    """The controller's exception for one that a call to an actor raised.

    Args:
        error: what `ray.get` raised.
        lost: the exception for the death of the actor that was called.
        what: that actor, in words.

    Returns:
        `PartitionLost` if the actor lost its connection to a partition, `lost` if it died,
        `WriteFailed` if a file could not be written, `RunFailed` if the user's own error kept it
        from starting, and otherwise `error` itself.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, ConnectionLost):
            return PartitionLost(str(cause), partition=cause.partition)
        if isinstance(cause, DeadlineExceeded):
            return PartitionLost(str(cause))
        if isinstance(cause, LOST):
            return lost(f"{what} died")
        if isinstance(cause, OSError) and user_message(cause) is None:
            return WriteFailed(f"{what}: {one_line(cause)}")
        return error
    if isinstance(error, LOST):
        message = user_message(error)
        if message is not None:
            return RunFailed(message)
        reason = _start_failure(error)
        return reason if reason is not None else lost(f"{what} died")
    return error


def _start_failure(error: BaseException) -> Exception | None:
    """The user's own error that kept an actor from starting, if it was that."""
    seen: BaseException | None = error
    while seen is not None:
        if (message := user_message(seen)) is not None:
            return RunFailed(message)
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return None
