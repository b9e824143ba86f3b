"""What can go wrong between a replica and a partition, by cause.

::

    ServerError
    ├── MalformedMessage    bytes that are not one of our messages, or a message out of place
    ├── NotAuthenticated    a peer without the run's key or certificate, or of another user
    ├── NotColocated        a partition is out of reach of the transport asked for
    ├── ConnectionLost      the partition went away; what was unacknowledged may or may not be in
    ├── DeadlineExceeded    a wait ran out
    ├── BadConfiguration    a value that no rule or partitioning can work with
    ├── BadSnapshot         a snapshot that is damaged, or of another model
    └── BadRecord           a record of pushes that is damaged, or that explains another run

    Diverged                a follower whose state is not its primary's
    Fenced                  of a primary and its follower, the other one is the partition
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of this package's errors."""


class MalformedMessage(ServerError):
    """Bytes that are not one of our messages, or a message out of place."""


class NotAuthenticated(ServerError):
    """A peer without the run's key or certificate, or of another user."""


class NotColocated(ServerError):
    """A partition is out of reach of the transport asked for."""

    user_facing = True


class ConnectionLost(ServerError):
    """The partition is gone; pushes without an answer may or may not have been applied."""

    partition: int | None = None
    """Which one, if a connection to it ended."""

    @classmethod
    def of(cls, partition: int, why: object) -> ConnectionLost:
        """Return the error for a connection to this partition that has ended."""
        error = cls(f"partition {partition}: {why}")
        error.partition = partition
        return error


class DeadlineExceeded(ServerError):
    """A wait ran out."""


class BadConfiguration(ServerError, ValueError):
    """A value that no rule or partitioning can work with."""

    user_facing = True


class BadSnapshot(ServerError):
    """A snapshot that is damaged, or of another model."""

    user_facing = True


class BadRecord(ServerError):
    """A record of pushes that is damaged, or that explains another run."""

    user_facing = True


class Diverged(Exception):
    """A follower's state is not its primary's, so the follower has to end."""


class Fenced(Exception):
    """Of a primary and its follower, the other one has the token and is the partition.

    It is no `ServerError`, which would cost one connection only: whoever is fenced has to end.
    """
