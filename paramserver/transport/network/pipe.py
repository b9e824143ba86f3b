"""A stream without a socket: bytes that came are fed to it, bytes to be sent are taken off it.

So one writing of a handshake serves a client that waits and a partition that does not.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Generator
from typing import Protocol

from downpour.paramserver.errors import ConnectionLost, NotAuthenticated
from downpour.paramserver.transport.network import security


class Pipe(Protocol):
    """A stream without a socket: bytes that came are fed to it, bytes to be sent taken off it."""

    come: bytearray
    """What the peer has said, and nobody has read."""

    def feed(self, data: bytes) -> None:
        """Bytes have come off the socket."""

    def take(self) -> bytes:
        """Bytes to put on the socket."""

    def send(self, data: bytes) -> None:
        """Send this to the peer."""

    def begin(self) -> Generator[None, None, None]:
        """Whatever comes before the first word; yields when it needs to be fed."""


class PlainPipe:
    """Bytes as they are."""

    def __init__(self) -> None:
        self.come = bytearray()
        self._out = bytearray()

    def feed(self, data: bytes) -> None:
        """See `Pipe`."""
        self.come += data

    def take(self) -> bytes:
        """See `Pipe`."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def send(self, data: bytes) -> None:
        """See `Pipe`."""
        self._out += data

    def begin(self) -> Generator[None, None, None]:
        """Nothing."""
        yield from ()


class TlsPipe:
    """TLS. Whatever is wrong with the peer's is `NotAuthenticated`."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.come = bytearray()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = security.wrap(context, self._in, self._out, is_server=is_server)
        self._begun = False

    def feed(self, data: bytes) -> None:
        """See `Pipe`."""
        self._in.write(data)
        if self._begun:
            self._open()

    def _open(self) -> None:
        with _as_not_authenticated(), contextlib.suppress(ssl.SSLWantReadError):
            while data := self._tls.read(1 << 14):
                self.come += data
            raise ConnectionLost("the peer closed the connection")

    def take(self) -> bytes:
        """See `Pipe`."""
        return self._out.read()

    def send(self, data: bytes) -> None:
        """See `Pipe`."""
        self._tls.write(data)

    def begin(self) -> Generator[None, None, None]:
        """The handshake."""
        with _as_not_authenticated():
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    yield
        self._begun = True
        self._open()


@contextlib.contextmanager
def _as_not_authenticated() -> Generator[None, None, None]:
    try:
        yield
    except ssl.SSLWantReadError:
        raise
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or type(error).__name__
        raise NotAuthenticated(f"TLS: {reason}") from None
