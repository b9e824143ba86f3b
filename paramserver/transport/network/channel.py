"""Streams of bytes over a non-blocking TCP socket: as they are, or sealed.

A channel never waits. `write` takes as much as the kernel does, `read_into` gives what has come.
What the bytes mean is `frames`'; how the two sides came to trust each other is `handshake`'s.

Sealed, the stream is cut into blocks of up to `BLOCK_BYTES`, each behind its length and encrypted
and authenticated by AES-256-GCM. The nonce of a block is its number, each direction has a key of
its own, and the keys are fresh for each connection. So a block that is altered, repeated, left out
or moved does not open. After `REKEY_BLOCKS` blocks, a direction goes on with a key that is derived
from the last one, which is forgotten: below 2^34.5 AES blocks under one key, RFC 8446 (section 5.5)
puts the odds of an attack on AES-GCM at 2^-57. TLS records would do the same, 16 KB at a time, but
their calls cost two to three times the encryption itself. So TLS ends with the handshake.
"""

from __future__ import annotations

import hmac
import itertools
import socket
import struct
import sys
from collections import deque
from typing import Protocol

from downpour.paramserver.errors import ConnectionLost, MalformedMessage

BLOCK_BYTES = 1 << 17
SLICE_BYTES = 1 << 22
"""What one `write`, or all of `read_into` since `allow`, moves at most."""
REKEY_BLOCKS = 1 << 20
"""Blocks of one direction under one key: at most 2^33 AES blocks, 128 GiB."""
_LENGTH = struct.Struct("<I")
TAG_BYTES = 16
"""What sealing adds to a block."""
_BLOCK_OVERHEAD = _LENGTH.size + TAG_BYTES
_STAGE_BYTES = 2 * (BLOCK_BYTES + _BLOCK_OVERHEAD)
_TCP_INFO = struct.Struct("<24xI28xI")
"""Of the kernel's `tcp_info`: segments without acknowledgement, milliseconds since the last one."""
_GATHER = 8
_READ_AHEAD_BYTES = 4096


class Channel(Protocol):
    """One side of a connection between machines."""

    socket: socket.socket
    moved: int
    """Bytes read and written so far."""

    def allow(self, num_bytes: int) -> None:
        """Let `read_into` take up to `num_bytes` off the socket from now on."""

    def read_into(self, view: memoryview) -> int:
        """Fill a part of `view`, which is not empty.

        Returns:
            How many bytes; 0 if nothing has come or nothing may be taken.

        Raises:
            ConnectionLost: The stream has ended.
            MalformedMessage: A seal is broken.
        """

    def write(self, views: deque[memoryview]) -> bool:
        """Send the bytes of `views`, which are taken off it as they go.

        Returns:
            Whether all have gone. If not, it has to be called again when the socket is writable,
            even if nothing is left in `views` by then.

        Raises:
            ConnectionLost: The peer is gone.
        """


def prepare(peer: socket.socket, dead_after_s: int = 30) -> None:
    """Set the options of a TCP connection: no delays, and a peer that vanished is noticed."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, dead_after_s // 3)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, dead_after_s // 6)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * dead_after_s)


def unanswered_s(peer: socket.socket) -> float:
    """Return for how long the other machine has not acknowledged what it was sent.

    Kernels acknowledge, so this says nothing of a process, and does not depend on how busy it is.

    Args:
        peer: A TCP connection.

    Returns:
        Seconds since the last acknowledgement; 0.0 if all that was sent has been acknowledged, or
        the connection or the system cannot tell.
    """
    if not sys.platform.startswith("linux"):
        return 0.0
    try:
        about = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return 0.0
    if len(about) < _TCP_INFO.size:
        return 0.0
    unacknowledged, last_ms = _TCP_INFO.unpack(about)
    return last_ms / 1000 if unacknowledged else 0.0


class PlainChannel:
    """Bytes as they are."""

    def __init__(self, peer: socket.socket) -> None:
        """Takes over `peer`, which is non-blocking."""
        self.socket = peer
        self.moved = 0
        self._allowed = SLICE_BYTES
        self._ahead = memoryview(bytearray(_READ_AHEAD_BYTES))
        self._ahead_start = self._ahead_stop = 0

    def allow(self, num_bytes: int) -> None:
        """See `Channel`."""
        self._allowed = num_bytes

    def read_into(self, view: memoryview) -> int:
        """See `Channel`. Small reads take in some of what follows, to save calls."""
        if self._ahead_start == self._ahead_stop:
            if self._allowed <= 0:
                return 0
            is_small = len(view) < _READ_AHEAD_BYTES
            num = _receive(self.socket, self._ahead if is_small else view)
            self.moved += num
            self._allowed -= num
            if not is_small:
                return num
            self._ahead_start, self._ahead_stop = 0, num
        num = min(len(view), self._ahead_stop - self._ahead_start)
        view[:num] = self._ahead[self._ahead_start : self._ahead_start + num]
        self._ahead_start += num
        return num

    def write(self, views: deque[memoryview]) -> bool:
        """See `Channel`."""
        left = SLICE_BYTES
        while views and left > 0:
            num = _send(self.socket, list(itertools.islice(views, _GATHER)))
            if not num:
                return False
            self.moved += num
            left -= num
            while num:
                if num < len(views[0]):
                    views[0] = views[0][num:]
                    break
                num -= len(views.popleft())
        return not views


class SealedChannel:
    """Bytes that nobody else can read, or change without being noticed."""

    def __init__(self, peer: socket.socket, *, seal: bytes, open_: bytes) -> None:
        """Takes over `peer`, which is non-blocking; `seal` and `open_` are keys for AES-256."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.socket = peer
        self.moved = 0
        self._allowed = SLICE_BYTES
        self._invalid_tag = InvalidTag
        self._make_cipher = AESGCM
        self._seal_key, self._open_key = seal, open_
        self._seal, self._open = AESGCM(seal).encrypt_into, AESGCM(open_).decrypt_into
        self._num_sealed = self._num_opened = 0
        self._out = memoryview(bytearray(_STAGE_BYTES))
        self._out_start = self._out_stop = 0
        self._in = memoryview(bytearray(_STAGE_BYTES))
        self._in_start = self._in_stop = 0
        self._plain = memoryview(bytearray(BLOCK_BYTES))
        self._plain_start = self._plain_stop = 0

    def allow(self, num_bytes: int) -> None:
        """See `Channel`."""
        self._allowed = num_bytes

    def read_into(self, view: memoryview) -> int:
        """See `Channel`. What has come is always given: only the socket is rationed."""
        while True:
            if self._plain_start < self._plain_stop:  # the rest of a block
                num = min(len(view), self._plain_stop - self._plain_start)
                view[:num] = self._plain[self._plain_start : self._plain_start + num]
                self._plain_start += num
                return num
            if (length := self._whole_block()) is not None:
                if length <= len(view):
                    self._open_block(length, view[:length])
                    return length
                self._open_block(length, self._plain[:length])
                self._plain_start, self._plain_stop = 0, length
            elif not self._receive():
                return 0

    def _whole_block(self) -> int | None:
        """Length of the next block, if all of it has come."""
        come = self._in_stop - self._in_start
        if come < _LENGTH.size:
            return None
        length: int = _LENGTH.unpack_from(self._in, self._in_start)[0]
        if not 0 < length <= BLOCK_BYTES:
            raise MalformedMessage(f"a block of {length} bytes")
        return length if come >= length + _BLOCK_OVERHEAD else None

    def _open_block(self, length: int, into: memoryview) -> None:
        start = self._in_start
        body = start + _LENGTH.size
        stop = body + length + TAG_BYTES
        nonce = self._num_opened.to_bytes(12, "little")
        try:
            self._open(nonce, self._in[body:stop], self._in[start:body], into)
        except self._invalid_tag:
            raise MalformedMessage("a block that was not sealed for this place") from None
        self._num_opened += 1
        self._in_start = stop
        if not self._num_opened % REKEY_BLOCKS:
            self._open_key = _next_key(self._open_key)
            self._open = self._make_cipher(self._open_key).decrypt_into

    def _receive(self) -> bool:
        if self._allowed <= 0:
            return False
        start, stop = self._in_start, self._in_stop
        if start == stop:
            self._in_start = self._in_stop = 0
        elif start + BLOCK_BYTES + _BLOCK_OVERHEAD > _STAGE_BYTES:  # it might not fit any more
            self._in[: stop - start] = self._in[start:stop]
            self._in_start, self._in_stop = 0, stop - start
        num = _receive(self.socket, self._in[self._in_stop :])
        self._in_stop += num
        self.moved += num
        self._allowed -= num
        return num > 0

    def write(self, views: deque[memoryview]) -> bool:
        """See `Channel`. What has been sealed is on its way, and needs no more of `views`."""
        left = SLICE_BYTES
        while True:
            while self._out_start < self._out_stop:
                num = _send(self.socket, [self._out[self._out_start : self._out_stop]])
                if not num:
                    return False
                self._out_start += num
                self.moved += num
            if not views or left <= 0:
                return not views
            self._seal_blocks(views)
            left -= self._out_stop

    def _seal_blocks(self, views: deque[memoryview]) -> None:
        stop = 0
        while views and stop < BLOCK_BYTES:
            view = views[0]
            length = min(len(view), BLOCK_BYTES)
            body = stop + _LENGTH.size
            _LENGTH.pack_into(self._out, stop, length)
            nonce = self._num_sealed.to_bytes(12, "little")
            end = body + length + TAG_BYTES
            self._seal(nonce, view[:length], self._out[stop:body], self._out[body:end])
            self._num_sealed += 1
            if not self._num_sealed % REKEY_BLOCKS:
                self._seal_key = _next_key(self._seal_key)
                self._seal = self._make_cipher(self._seal_key).encrypt_into
            stop = end
            if length == len(view):
                views.popleft()
            else:
                views[0] = view[length:]
        self._out_start, self._out_stop = 0, stop


def _next_key(key: bytes) -> bytes:
    """The key that follows on one, from which that one cannot be computed."""
    return hmac.digest(key, b"downpour: the next key of this direction", "sha256")


def _receive(peer: socket.socket, view: memoryview) -> int:
    try:
        num = peer.recv_into(view)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise ConnectionLost(str(error)) from None
    if not num:
        raise ConnectionLost("the peer closed the connection")
    return num


def _send(peer: socket.socket, views: list[memoryview]) -> int:
    try:
        return peer.sendmsg(views)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise ConnectionLost(str(error)) from None
