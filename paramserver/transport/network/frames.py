"""Frames: a message and its payload, one after the other on a channel.

A frame is the message's length, the payload's length, the message and the payload. A receiver
knows beforehand how long a payload has to be, and where it goes. It refuses a frame that announces
another length before it reads a byte of the payload, and allocates nothing on a peer's word.
"""

from __future__ import annotations

import struct
import typing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.codec import encode
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import MAX_MESSAGE, Message
from downpour.paramserver.transport.network.channel import Channel

_PREFIX = struct.Struct("<IQ")
if TYPE_CHECKING:
    from typing_extensions import Buffer

M = TypeVar("M")


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, writable."""
    if not tensor.numel():
        return memoryview(bytearray())
    assert tensor.is_contiguous()
    return memory_of(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def memory_of(array: npt.NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array."""
    return memoryview(typing.cast("Buffer", array)).cast("B")


def frame(message: Message, payload: Sequence[memoryview] = ()) -> list[memoryview]:
    """Return the views that make up a frame; the payload is not copied."""
    return [head(message, sum(map(len, payload))), *(view for view in payload if len(view))]


def head(message: Message, payload_bytes: int) -> memoryview:
    """Return a frame up to its payload, which has to follow."""
    return head_of(encode(message), payload_bytes)


def head_of(data: bytes, payload_bytes: int) -> memoryview:
    """As `head`, of a message's bytes."""
    return memoryview(_PREFIX.pack(len(data), payload_bytes) + data)


class FrameReader(Generic[M]):
    """Reads frames off a channel, as far as they have come."""

    def __init__(
        self,
        channel: Channel,
        destinations: Callable[[M], Sequence[memoryview]],
        decoded: Callable[[bytes], M],
    ) -> None:
        """Nothing has come.

        Args:
            channel: Where frames come from.
            destinations: Says where a message's payload goes; it may refuse the message.
            decoded: The message that some bytes are; it may refuse them.
        """
        self._channel = channel
        self._destinations = destinations
        self._decoded = decoded
        self._reading = self._read()
        self.midway = False
        """Whether a frame has come in part."""

    def next(self) -> M | None:
        """Return the next frame's message, its payload in place; None if not all of it has come.

        Raises:
            ConnectionLost: The peer is gone.
            MalformedMessage: The bytes are no frame that is expected.
        """
        return next(self._reading)

    def _read(self) -> Generator[M | None, None, None]:
        prefix = memoryview(bytearray(_PREFIX.size))
        buffer = memoryview(bytearray(MAX_MESSAGE))
        while True:
            yield from self._fill(prefix)
            length, payload_bytes = _PREFIX.unpack(prefix)
            if not 0 < length <= MAX_MESSAGE:
                raise MalformedMessage(f"a message of {length} bytes")
            yield from self._fill(buffer[:length])
            message = self._decoded(bytes(buffer[:length]))
            places = self._destinations(message)
            if payload_bytes != sum(map(len, places)):
                raise MalformedMessage(
                    f"a {type(message).__name__} with {payload_bytes} bytes behind it"
                )
            for place in places:
                yield from self._fill(place)
            self.midway = False
            yield message

    def _fill(self, view: memoryview) -> Generator[None, None, None]:
        read_into = self._channel.read_into
        while len(view):
            num = read_into(view)
            if num:
                self.midway = True
                view = view[num:]
            else:
                yield


class Outbox:
    """Views that wait to be sent, in order."""

    def __init__(self, channel: Channel) -> None:
        """Nothing waits."""
        self._channel = channel
        self.views: deque[memoryview] = deque()
        self.empty = True
        """Whether all has gone out, from the channel too."""

    def put(self, views: Sequence[memoryview]) -> None:
        """Queue some; `flush` sends them."""
        self.views.extend(views)
        self.empty = False

    def flush(self) -> bool:
        """Send what can be sent now; returns `empty`."""
        if not self.empty:
            self.empty = self._channel.write(self.views)
        return self.empty
