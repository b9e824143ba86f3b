"""Answers and weights on their way back to the processes of replicas."""

from __future__ import annotations

from collections.abc import Sequence

from downpour.paramserver.errors import ServerError
from downpour.paramserver.messages import Answer
from downpour.paramserver.server.connections import Connections
from downpour.paramserver.server.versions import Versions
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.server_side import SharedSide


class Replies:
    """Sends what is due, and drops connections that do not take it."""

    def __init__(self, connections: Connections, versions: Versions) -> None:
        """Weights are those that `versions` has published."""
        self.connections = connections
        self._versions = versions

    def answer(self, side: SharedSide, answers: Sequence[Answer]) -> None:
        """Send answers to a process on this machine, if it is still connected. Raises nothing."""
        fd = side.socket.fileno()
        if self.connections.sides.get(fd) is side:
            try:
                side.answer(answers)
            except ServerError as error:
                self.connections.failed(fd, error)

    def answer_network(self, side: NetworkSide, answers: Sequence[Answer]) -> None:
        """Send answers over the network, if that process is still connected. Raises nothing."""
        fd = side.socket.fileno()
        if self.connections.sides.get(fd) is side:
            try:
                for answer in answers:
                    side.answer(answer)
                self.send(side)
            except (ServerError, OSError) as error:
                self.connections.failed(fd, error)

    def send(self, side: NetworkSide) -> None:
        """Send the answers and weights that are due over the network, as far as goes now.

        Raises:
            ConnectionLost: The connection is gone.
        """
        while True:
            if side.pulls and not side.sending:
                self._versions.send(side)
            all_sent = side.flush()  # answers and weights at once: each call wakes the peer
            if not all_sent or not side.pulls:
                break
        self.connections.watch_writable(side, not all_sent)
