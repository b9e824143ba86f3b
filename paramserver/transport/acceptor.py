"""A listening socket that never waits and never gets stuck."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from downpour.paramserver.errors import ConnectionLost


class Acceptor:
    """Accepts connections off a bound socket."""

    def __init__(self, listening: socket.socket) -> None:
        """Takes over `listening`, and listens."""
        self.socket = listening
        self.socket.listen(256)
        self.socket.setblocking(False)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self) -> socket.socket | None:
        """Return a new connection, non-blocking; None if none waits.

        Raises:
            ConnectionLost: A connection went again, or no descriptor is left for it. It is closed.
        """
        try:
            peer, _ = self.socket.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            raise ConnectionLost(f"a connection could not be taken: {error}") from None
        peer.setblocking(False)
        return peer

    def _turn_away(self) -> None:
        # A connection that is left waiting would wake us again at once, and for ever.
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self.socket.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
