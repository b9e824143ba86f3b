"""Gradients as they travel between machines: float32, 16 bits with error feedback, or fewer.

With 16 bits, what rounding takes from one gradient is added to the next one of the same process
(Seide et al. 2014; Karimireddy et al. 2019):

    q_t = round(g_t + r_t);    r_(t+1) = g_t + r_t - q_t

so the sum of what is sent never lags behind the sum of the gradients by more than one residual. A
process has one residual for each partition, not one for each concurrent step. Steps take turns, so
what one rounds away goes out with the next one's push instead of waiting for a whole rotation, and
P floats are kept instead of P for each step.

A push that was not applied takes nothing with it: its share is put back (`restore`), so that the
sum over the pushes that were applied is that of their gradients, but for the one residual.

With 8 and 4 bits rounding is random and unbiased, and has no residual (`transport.wire.gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor

from downpour.paramserver.messages import Push, WireDtype
from downpour.paramserver.transport.names import WireName
from downpour.paramserver.transport.network.channel import SLICE_BYTES
from downpour.paramserver.transport.network.frames import as_bytes
from downpour.paramserver.transport.wire.gradients import (
    Bits,
    GradientCoder,
    num_bytes,
    place_of,
)

_TORCH_DTYPES = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.FLOAT16: torch.float16,
}
BITS: dict[WireDtype, Bits] = {WireDtype.INT8: 8, WireDtype.INT4: 4}
"""Of an element of a gradient that is rounded without bias."""
_SLICE = SLICE_BYTES // 4


def wire_dtype(name: WireName) -> WireDtype:
    """Return the wire that users call `name`."""
    return WireDtype[name.upper()]


def room_for(wire: WireDtype, size: int) -> Tensor:
    """Return memory for a gradient of `size` elements as it travels."""
    if wire in BITS:
        return torch.empty(num_bytes(size, BITS[wire]), dtype=torch.uint8)
    return torch.empty(size, dtype=_TORCH_DTYPES[wire])


class Encoder(Protocol):
    """How a process's gradients go to one partition."""

    def slices(self, push: Push) -> Generator[memoryview, None, None]:
        """Yield the bytes to send for the gradient in the push's mailbox, made as they are asked.

        They must stay until the push is answered.
        """

    def restore(self, mailbox: int) -> None:
        """Note that the mailbox's last push was not applied."""


class Plain:
    """Float32: straight from the gradients' own memory."""

    def __init__(self, gradients: list[Tensor]) -> None:
        """`gradients` are the partition's slices [n] of each mailbox."""
        self._views = [as_bytes(gradient) for gradient in gradients]

    def slices(self, push: Push) -> Generator[memoryview, None, None]:
        """See `Encoder`."""
        yield self._views[push.mailbox]

    def restore(self, mailbox: int) -> None:
        """See `Encoder`: nothing was kept back."""


class ErrorFeedback:
    """16 bits an element, and a residual for what that leaves out."""

    def __init__(self, gradients: list[Tensor], wire: WireDtype) -> None:
        """`gradients` are the partition's slices [n] of each mailbox, float32."""
        self._gradients = gradients
        self._dtype = _TORCH_DTYPES[wire]
        self._largest = torch.finfo(self._dtype).max
        self._rounded: dict[int, Tensor] = {}
        self.residual = torch.zeros(len(gradients[0]))
        """What is still to be sent, float32 [n]."""
        self._scratch = torch.empty(min(_SLICE, len(gradients[0])))
        self._took_residual = [False] * len(gradients)

    def slices(self, push: Push) -> Generator[memoryview, None, None]:
        """See `Encoder`.

        A gradient that is not finite is sent as it is, to be refused, and leaves no residual.
        """
        mailbox, finite = push.mailbox, math.isfinite(push.gradient_norm)
        gradient = self._gradients[mailbox]
        # Each mailbox has its own, since it is read until the push has gone out.
        rounded = self._rounded.get(mailbox)
        if rounded is None:
            rounded = self._rounded[mailbox] = torch.empty(len(gradient), dtype=self._dtype)
        self._took_residual[mailbox] = finite
        data = as_bytes(rounded)
        for start in range(0, len(gradient), _SLICE):
            stop = min(start + _SLICE, len(gradient))
            if finite:
                residual, scratch = self.residual[start:stop], self._scratch[: stop - start]
                residual.add_(gradient[start:stop])
                # Beyond the largest, the rest is left for the next push.
                torch.clamp(residual, -self._largest, self._largest, out=scratch)
                rounded[start:stop].copy_(scratch)
                residual.sub_(rounded[start:stop])
            else:
                rounded[start:stop].copy_(gradient[start:stop])
            yield data[2 * start : 2 * stop]

    def restore(self, mailbox: int) -> None:
        """See `Encoder`: r <- r + q - g."""
        if self._took_residual[mailbox]:
            self.residual.add_(self._rounded[mailbox]).sub_(self._gradients[mailbox])


class Unbiased:
    """8 or 4 bits an element, rounded at random by the push's own name."""

    def __init__(self, gradients: list[Tensor], wire: WireDtype, partition: int) -> None:
        """`gradients` are the slices [n] of each mailbox, float32, of this partition."""
        self._gradients, self._wire, self._partition = gradients, wire, partition
        self._coder = GradientCoder(len(gradients[0]), BITS[wire])
        self._rounded: dict[int, Tensor] = {}

    def slices(self, push: Push) -> Generator[memoryview, None, None]:
        """See `Encoder`. A gradient that is not finite is sent as such, to be refused."""
        gradient, coder = self._gradients[push.mailbox], self._coder
        rounded = self._rounded.get(push.mailbox)
        if rounded is None:
            rounded = room_for(self._wire, len(gradient))
            self._rounded[push.mailbox] = rounded
        data = as_bytes(rounded)
        if not math.isfinite(push.gradient_norm):
            coder.spoil(rounded)
            yield data
            return
        place, sent = place_of(push.epoch, push.batches[0], self._partition), 0
        for stop in coder.encode(gradient, place, rounded):
            if stop - sent >= SLICE_BYTES // 4:
                yield data[sent:stop]
                sent = stop
        yield data[sent:]

    def restore(self, mailbox: int) -> None:
        """See `Encoder`: nothing was kept back."""


class Decoder:
    """The partition's side: gradients, as they came, are float32 again."""

    def __init__(self, size: int) -> None:
        """Of gradients of `size` elements; takes no memory before one comes in fewer bits."""
        self._size = size
        self._coders: dict[WireDtype, GradientCoder] = {}
        self._scratch = torch.empty(0)

    def gradient(self, came: Tensor, wire: WireDtype) -> Tensor:
        """Return a gradient, float32 [n].

        Args:
            came: As it travelled; see `room_for`.
            wire: How it did.

        Returns:
            `came` itself if it is float32; if not, memory that the next call writes over.
        """
        if wire is WireDtype.FLOAT32:
            return came
        if len(self._scratch) < self._size:
            self._scratch = torch.empty(self._size)
        if wire not in BITS:
            return self._scratch.copy_(came)
        if wire not in self._coders:
            self._coders[wire] = GradientCoder(self._size, BITS[wire])
        return self._coders[wire].decode(came, self._scratch)


def encoder(gradients: list[Tensor], wire: WireDtype, partition: int) -> Encoder:
    """Return how a process's gradients, float32 [n] for each mailbox, go to one partition."""
    if wire is WireDtype.FLOAT32 or not gradients:
        return Plain(gradients)
    if wire in BITS:
        return Unbiased(gradients, wire, partition)
    return ErrorFeedback(gradients, wire)
