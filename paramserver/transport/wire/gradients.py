"""A gradient in 8 or 4 bits an element, rounded at random in a way that can be done again.

A block of elements has one scale s, its largest magnitude over the number of levels L, and each
element g becomes

    q = round(g / s + u),    u uniform on [-1/2, 1/2)

so E[q s] = g: the rounding is unbiased (QSGD, Alistarh et al. 2017, section 3.1), and what it adds
is noise whose variance is at most s^2 / 4 an element. With 8 bits (L = 126) that is about 1% of the
gradient's norm, with 4 bits (L = 7) about a fifth. A mini-batch's gradient has more noise than that
by itself. Nothing is carried from one push to the next. So no residual is lost with a process,
a checkpoint needs none, and a push that is sent twice is the same.

u is read from a table, from a place that follows from the push's name (epoch, first mini-batch)
and the partition. So a replay rounds as the run did. To draw it anew for each element would cost
more than all the rest.

The bytes are, piece by piece (`blocks`), the scales as float32 and then the elements. With 8 bits
these are q as int8. With 4 bits a byte has q + 8 of two elements, of the piece's first half in the
lower bits and of its second half in the higher ones. Any bytes of this length are a gradient. One
that is not finite has scales that are not.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.transport.wire.blocks import PIECE, Piece, pieces

LEVELS = {8: 126.0, 4: 6.999}
"""The largest |g / s| before u is added, by bits. With it, q is still a number of so many bits."""
BLOCKS = {8: 256, 4: 512}
"""Elements of a block, by bits."""
Bits = Literal[4, 8]
_SMALLEST = 1e-37
"""A scale below which one over it may not be a float32; such a block is sent as zeros."""
_STRIDE = 40_503
"""Places in the table from one piece to the next: odd, so that all are met."""
_NAME = struct.Struct("<III")


def num_bytes(size: int, bits: Bits) -> int:
    """Bytes of a gradient of `size` elements."""
    return sum(_piece_bytes(piece, bits) for piece in pieces(size, BLOCKS[bits]))


def _piece_bytes(piece: Piece, bits: Bits) -> int:
    """Of the scales and elements; a multiple of 4 but at the end, as more scales follow."""
    return 4 * piece.rows + -(-piece.size * bits // 8)


@functools.cache
def _dither() -> Tensor:
    """The table of u, float32 [2 * PIECE]: the second half repeats the first."""
    generator = np.random.Generator(np.random.PCG64(20_121_203))
    once = torch.from_numpy(generator.random(PIECE, np.float32) - np.float32(0.5))
    return torch.cat([once, once])


def place_of(epoch: int, batch: int, partition: int) -> int:
    """Return where in the table the rounding of a push begins.

    Args:
        epoch: The push's.
        batch: The first of its mini-batches.
        partition: Index of the partition that it goes to.
    """
    digest = hashlib.blake2b(_NAME.pack(epoch, batch, partition), digest_size=8).digest()
    return int.from_bytes(digest, "little") % PIECE


class GradientCoder:
    """Rounds gradients of one length, and reads them. Its scratch is for one thread at a time."""

    def __init__(self, size: int, bits: Bits = 8) -> None:
        """`size` is the gradients' number of elements, n; `bits` those of an element."""
        self.size, self._bits = size, bits
        self._places: list[tuple[Piece, int]] = []
        """The pieces, and where the bytes of each begin."""
        at = 0
        for piece in pieces(size, BLOCKS[bits]):
            self._places.append((piece, at))
            at += _piece_bytes(piece, bits)
        self.num_bytes = at
        self._scratch = torch.empty(min(PIECE, size + 1))

    def encode(self, gradient: Tensor, place: int, into: Tensor) -> Iterator[int]:
        """Round a gradient, piece by piece as the iterator is read.

        Args:
            gradient: float32 [n], finite.
            place: See `place_of`.
            into: uint8 [num_bytes].

        Yields:
            How many bytes of `into` are complete with each piece.
        """
        dither = _dither()
        for number, (piece, at) in enumerate(self._places):
            scales, codes = self._parts(into, piece, at)
            rows = gradient[piece.start : piece.stop].view(piece.rows, piece.width)
            scratch = self._scratch[: piece.size].view(piece.rows, piece.width)
            torch.amax(torch.abs(rows, out=scratch), 1, out=scales)
            inverse = torch.from_numpy(_scaled(scales.numpy(), LEVELS[self._bits]))
            first = (place + number * _STRIDE) % PIECE
            u = dither[first : first + piece.size].view(piece.rows, piece.width)
            torch.mul(rows, inverse.unsqueeze(1), out=scratch)
            scratch.add_(u).round_()
            if self._bits == 8:
                codes.view(torch.int8).view(piece.rows, piece.width).copy_(scratch)
            else:
                self._pack(piece.size, codes)
            yield at + _piece_bytes(piece, self._bits)

    def spoil(self, into: Tensor) -> None:
        """Write to `into`, uint8 [num_bytes], a gradient that is not finite: it is refused."""
        for piece, at in self._places:
            scales, codes = self._parts(into, piece, at)
            scales.fill_(math.nan)
            codes.zero_()

    def decode(self, data: Tensor, into: Tensor) -> Tensor:
        """Return `into`, float32 [n], with the gradient that `data`, uint8 [num_bytes], is."""
        for piece, at in self._places:
            scales, codes = self._parts(data, piece, at)
            numbers = codes.view(torch.int8)
            if self._bits == 4:
                numbers = _unpacked(codes.numpy(), piece.size)
            rows = into[piece.start : piece.stop].view(piece.rows, piece.width)
            rows.copy_(numbers.view(piece.rows, piece.width)).mul_(scales.unsqueeze(1))
        return into

    def _parts(self, data: Tensor, piece: Piece, at: int) -> tuple[Tensor, Tensor]:
        """Scales, float32 [rows], and elements, uint8, of a piece's bytes."""
        middle, stop = at + 4 * piece.rows, at + _piece_bytes(piece, self._bits)
        return data[at:middle].view(torch.float32), data[middle:stop]

    def _pack(self, size: int, into: Tensor) -> None:
        """Pack the scratch's q, two to a byte: still as float32, which is exact and fast."""
        half = len(into)
        if size % 2:
            self._scratch[size] = 0.0
        first, second = self._scratch[:half], self._scratch[half : 2 * half]
        packed = first.add_(second, alpha=16).add_(8 + 16 * 8)
        into.copy_(packed.to(torch.int16))  # at once to uint8 takes five times as long


def _scaled(scales: npt.NDArray[np.float32], levels: float) -> npt.NDArray[np.float32]:
    """Divide `scales`, float32 [rows], by `levels`; gives their inverses, 0 of the smallest."""
    scales *= np.float32(1 / levels)
    inverse = np.zeros_like(scales)
    return np.divide(np.float32(1), scales, out=inverse, where=scales > _SMALLEST)


def _unpacked(data: npt.NDArray[np.uint8], size: int) -> Tensor:
    """Return q, int8 [m]."""
    half = len(data)
    codes = np.empty(2 * half, np.uint8)
    np.bitwise_and(data, 15, out=codes[:half])
    np.right_shift(data, 4, out=codes[half:])
    numbers = codes.view(np.int8)
    numbers -= 8
    return torch.from_numpy(numbers[:size])


def rounded(gradient: Tensor, place: int, bits: Bits = 8) -> Tensor:
    """Return what a partition gets of a gradient, float32 [n], on memory of its own."""
    coder = GradientCoder(len(gradient), bits)
    data = torch.empty(coder.num_bytes, dtype=torch.uint8)
    for _ in coder.encode(gradient, place, data):
        pass
    return coder.decode(data, torch.empty_like(gradient))
