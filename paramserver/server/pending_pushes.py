"""Pushes that a partition holds back where steps begin by permit, with whatever belongs to them.

Who may begin and whose turn it is, is `bounded`'s or `rounds`'s; here messages become that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from downpour.paramserver.admission.permits import Permit, Permits, Turn
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import PermitRequest, Push, decode_all
from downpour.paramserver.transport.local import ServerSide
from downpour.paramserver.transport.network import NetworkSide


class Held(NamedTuple):
    """A push that waits for its turn."""

    push: Push
    gradient: Tensor
    moments: Tensor


class Holding:
    """What waits on one partition."""

    def __init__(self, permits: Permits[Held]) -> None:
        """`permits` decides."""
        self._permits = permits

    def take(self, side: ServerSide, data: bytes) -> None:
        """Take in a packet. Raises `MalformedMessage`."""
        fd, views = side.socket.fileno(), side.views
        for message in decode_all(data):
            if not isinstance(message, Push | PermitRequest):
                raise MalformedMessage(f"{type(message).__name__} in place of a push")
            box = message.mailbox
            if views is None or box >= len(views.gradients):
                raise MalformedMessage(f"a {type(message).__name__} of mailbox {box}")
            if isinstance(message, PermitRequest):
                self._permits.ask((fd, box))
                continue
            count = len(message.batches)
            if count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            held = Held(message, views.gradients[box], views.moments[box][:count])
            self._permits.push((fd, box), message.version, held)

    def take_network(
        self, side: NetworkSide, push: Push, gradient: Tensor, moments: Tensor
    ) -> None:
        """Take in a push that came over the network. Raises `MalformedMessage`."""
        # The connection's next push is received where this one lies.
        held = Held(push, gradient.clone(), moments.clone())
        self._permits.push((side.socket.fileno(), push.mailbox), push.version, held)

    def ask(self, fd: int, boxes: Iterable[int]) -> None:
        """Permits are wanted for these mailboxes. Raises `MalformedMessage`."""
        for box in boxes:
            self._permits.ask((fd, box))

    def next(self, version: int, weights_version: int) -> Permit | Turn[Held] | None:
        """What can be done at the partition's `version`, if anything; it counts as done.

        Its weights have been the same since `weights_version`.
        """
        return self._permits.next(version, weights_version)

    def leave(self, fd: int) -> None:
        """A connection is gone."""
        self._permits.leave(fd)
