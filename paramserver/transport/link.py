"""What a client needs of its connection to a partition, over either transport."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from downpour.paramserver.messages import Answer, Push
from downpour.paramserver.partition.ranges import Partition

FloatArray = npt.NDArray[np.float32]


class Pull:
    """Weights that are on their way."""

    __slots__ = ("versions", "waiting")

    def __init__(self, versions: list[int]) -> None:
        self.versions = versions
        """Version by partition; undefined for those that have not come."""
        self.waiting = 0
        """Partitions whose weights have not come."""


class Link(Protocol):
    """A client's connection to one partition. Every method is called by one thread."""

    partition: Partition
    inbox: list[Answer]
    """Answers that `service` has taken in, and nobody has read."""

    @property
    def torn(self) -> int:
        """Copies of weights that were thrown away because the writer overtook them."""

    @property
    def events(self) -> int:
        """What to `poll` its descriptor for."""

    @property
    def moved(self) -> int:
        """Grows as long as bytes are sent or received."""

    def fileno(self) -> int:
        """For `poll`: what has come is taken in by `service`."""

    def push(self, push: Push) -> None:
        """Send off the gradient that is in the push's mailbox."""

    def ask(self, mailbox: int) -> None:
        """Ask for a permit for the step that will push from there; `flush` sends it off."""

    def flush(self) -> None:
        """Send off what `push` may have kept back."""

    def start_pull(self, pull: Pull, weights: FloatArray, statistics: FloatArray | None) -> None:
        """Ask for weights, float32 [n], and statistics, float32 [2, f], or copy them at once.

        Raises:
            ConnectionLost: The partition is gone.
        """

    def service(self) -> None:
        """Take in what has come, without waiting.

        Raises:
            ConnectionLost: The partition is gone.
            MalformedMessage: It says what it may not.
        """

    def interrupt(self) -> None:
        """Cut the connection while another thread uses it."""

    def close(self) -> None:
        """Close the connection."""
