"""Gradients as they travel between machines: float32, or 16 bits with error feedback.

With 16 bits, what rounding takes from one gradient is added to the next one of the same process
(Seide et al. 2014; Karimireddy et al. 2019):

    q_t = round(g_t + r_t);    r_(t+1) = g_t + r_t - q_t

so the sum of what is sent never lags behind the sum of the gradients by more than one residual. A
process has one residual for each partition, not one for each concurrent step. Steps take turns, so
what one rounds away goes out with the next one's push instead of waiting for a whole rotation, and
P floats are kept instead of P for each step.

A push that was not applied takes nothing with it: its share is put back (`restore`), so that the
sum over the pushes that were applied is that of their gradients, but for the one residual.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from downpour.paramserver.messages import WireDtype
from downpour.paramserver.transport.names import WireDtypeName
from downpour.paramserver.transport.network.channel import SLICE_BYTES
from downpour.paramserver.transport.network.frames import as_bytes

TORCH_DTYPES = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.FLOAT16: torch.float16,
}
_SLICE = SLICE_BYTES // 4


def wire_dtype(name: WireDtypeName) -> WireDtype:
    """Return the dtype that torch calls `name`."""
    return WireDtype[name.upper()]


class Plain:
    """Float32: straight from the gradients' own memory."""

    def __init__(self, gradients: list[Tensor]) -> None:
        """`gradients` are the partition's slices [n] of each mailbox."""
        self._views = [as_bytes(gradient) for gradient in gradients]

    def slices(self, mailbox: int, *, finite: bool) -> Generator[memoryview, None, None]:
        """Yield the bytes to send for a mailbox; they must stay until the push is answered."""
        yield self._views[mailbox]

    def restore(self, mailbox: int) -> None:
        """Note that the mailbox's last push was not applied."""


class ErrorFeedback:
    """16 bits an element, and a residual for what that leaves out."""

    def __init__(self, gradients: list[Tensor], wire: WireDtype) -> None:
        """`gradients` are the partition's slices [n] of each mailbox, float32."""
        self._gradients = gradients
        self._dtype = TORCH_DTYPES[wire]
        self._largest = torch.finfo(self._dtype).max
        self._rounded: dict[int, Tensor] = {}
        self.residual = torch.zeros(len(gradients[0]))
        """What is still to be sent, float32 [n]."""
        self._scratch = torch.empty(min(_SLICE, len(gradients[0])))
        self._took_residual = [False] * len(gradients)

    def slices(self, mailbox: int, *, finite: bool) -> Generator[memoryview, None, None]:
        """Yield the bytes to send for a mailbox, made as they are asked for.

        A gradient that is not `finite` is sent as it is, to be refused, and leaves no residual.
        """
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
        """Note that the mailbox's last push was not applied: r <- r + q - g."""
        if self._took_residual[mailbox]:
            self.residual.add_(self._rounded[mailbox]).sub_(self._gradients[mailbox])


def encoder(gradients: list[Tensor], wire: WireDtype) -> Plain | ErrorFeedback:
    """Return how a process's gradients, float32 [n] for each mailbox, go to one partition."""
    if wire is WireDtype.FLOAT32 or not gradients:
        return Plain(gradients)
    return ErrorFeedback(gradients, wire)
