"""Weights on a grid of 10 bits, and what has changed since a client's last ones.

A block of 256 weights has one step 2^e, a power of two such that its largest magnitude is below
512 steps, and each weight w travels as z = round(w / 2^e). So what a client gets,

    z 2^e,

follows from the version alone, whoever pulls it, whenever, and whatever was pulled before. A replay
rounds the version's weights and has what the gradient was computed on (`on_grid`). Nothing that is
rounded away is ever lost: the partition's own weights are float32, and each version is rounded
anew.

The z of two versions that follow on each other differ little: mostly by 0, 1 or -1. So a client
that holds some version gets the differences, in 0, 2, 4 or 8 bits each, piece by piece (`blocks`),
and a piece whole if that is shorter. If a block's step has changed, both sides first shift the z
that they hold. The partition keeps, for each connection, the z that it has sent (`WeightsSender`).
A client of a new connection gets all of them.

The bytes are, for each piece: 0 for no change; 2, 4 or 8 for differences in so many bits, then the
number of exceptions (uint32), the packed numbers and the exceptions as int16 (`packing`); or 16,
then z as int16. If 128 is added to it, each block's e follows as int8.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.transport.wire import packing
from downpour.paramserver.transport.wire.blocks import PIECE, Piece, num_blocks, pieces

_SAME, _WHOLE, _STEPS = 0, 16, 128
_STEPS_LOG2 = 9
"""Of the steps that a block's largest magnitude is below."""
_NOT_FINITE = 127
"""In place of e: the block has a weight that is not finite, and the client gets no number."""
_COUNT_BYTES = 4
Int8Array = npt.NDArray[np.int8]


def most_bytes(size: int) -> int:
    """The most that `size` weights take."""
    return sum(1 for _ in pieces(size)) + num_blocks(size) + 2 * size


_E_MIN, _E_MAX = -126, 119


@functools.cache
def _tables() -> _Tables:
    # By the 8 bits of a float32's exponent: the largest magnitude is below 2^(bits - 126).
    steps = np.clip(np.arange(256) - 126 - _STEPS_LOG2, _E_MIN, _E_MAX).astype(np.int8)
    steps[255] = _NOT_FINITE
    powers = 2.0 ** np.clip(np.arange(-128, 128), _E_MIN, _E_MAX)
    inverse, powers = 1 / powers, powers.copy()
    powers[255], inverse[255] = np.nan, 0.0
    return _Tables(steps, powers.astype(np.float32), inverse.astype(np.float32))


class _Tables(NamedTuple):
    """Powers of two, looked up: cheaper than computed, and the same everywhere."""

    steps: Int8Array
    """e, by the exponent of a block's largest magnitude."""
    powers: npt.NDArray[np.float32]
    """2^e, by e + 128; no number for `_NOT_FINITE`."""
    inverse: npt.NDArray[np.float32]
    """2^-e likewise; 0 for `_NOT_FINITE`."""


def _steps(magnitudes: Tensor) -> Int8Array:
    """Return e of blocks whose largest magnitudes are float32 [rows], int8 [rows]."""
    exponents = magnitudes.numpy().view(np.int32) >> 23
    found: Int8Array = _tables().steps[exponents & 255]
    return found


def _looked_up(table: npt.NDArray[np.float32], steps: Int8Array) -> Tensor:
    """The table's entries for e, float32 [rows, 1]."""
    return torch.from_numpy(table[steps.astype(np.intp) + 128]).unsqueeze(1)


class _Held:
    """The grid's numbers that a client holds."""

    def __init__(self, size: int) -> None:
        self.numbers = torch.zeros(size, dtype=torch.int16)
        self.pieces = list(pieces(size))
        self.steps = [np.zeros(piece.rows, np.int8) for piece in self.pieces]

    def shift(self, number: int, steps: Int8Array) -> None:
        """Have what is held of a piece in multiples of other steps; both sides round alike."""
        piece, before = self.pieces[number], self.steps[number]
        moved = np.flatnonzero(before != steps)
        by = before[moved].astype(np.int16) - steps[moved]
        rows = self.numbers[piece.start : piece.stop].numpy().reshape(piece.rows, piece.width)
        left, right = by.clip(0, 15)[:, None], (-by).clip(0, 15)[:, None]
        rows[moved] = np.right_shift(np.left_shift(rows[moved], left), right)
        self.steps[number] = steps


class WeightsSender:
    """A partition's side of one connection."""

    def __init__(self, size: int) -> None:
        """`size` is the number of weights, n. The client has none yet."""
        self._held = _Held(size)
        self._scratch = torch.empty(min(PIECE, size))
        self._found = torch.empty(min(PIECE, size), dtype=torch.int16)
        self._out = np.empty(most_bytes(size), np.uint8)

    def encode(self, weights: Tensor) -> packing.ByteArray:
        """Return the bytes, uint8, that take the client to `weights`, float32 [n].

        They are good until the next call.
        """
        at = 0
        for number, piece in enumerate(self._held.pieces):
            at = self._encode(number, piece, weights[piece.start : piece.stop], at)
        return self._out[:at]

    def _encode(self, number: int, piece: Piece, weights: Tensor, at: int) -> int:
        held, out = self._held.numbers[piece.start : piece.stop], self._out
        rows = weights.view(piece.rows, piece.width)
        scratch = self._scratch[: piece.size].view(piece.rows, piece.width)
        steps = _steps(torch.amax(torch.abs(rows, out=scratch), 1))
        torch.mul(rows, _looked_up(_tables().inverse, steps), out=scratch)
        found = self._found[: piece.size]
        found.view(piece.rows, piece.width).copy_(scratch.round_())
        same_steps = np.array_equal(steps, self._held.steps[number])
        if not same_steps:
            self._held.shift(number, steps)
        changed = _looked_at(torch.sub(found, held).numpy())
        held.copy_(found)
        out[at] = changed.bits + (0 if same_steps else _STEPS)
        at += 1
        if not same_steps:
            out[at : at + piece.rows] = steps.view(np.uint8)
            at += piece.rows
        if changed.bits == _SAME:
            return at
        if changed.bits == _WHOLE:
            stop = at + 2 * piece.size
            out[at:stop] = found.numpy().view(np.uint8)
            return stop
        first = at + _COUNT_BYTES
        stop = first + packing.packed_bytes(piece.size, changed.bits)
        exceptions = packing.pack(changed.by, changed.large, changed.bits, out[first:stop])
        out[at:first] = np.frombuffer(len(exceptions).to_bytes(_COUNT_BYTES, "little"), np.uint8)
        out[stop : stop + exceptions.nbytes] = exceptions.view(np.uint8)
        return stop + exceptions.nbytes


class _Changed(NamedTuple):
    """By how much the numbers of a piece have changed, and how to say so."""

    by: packing.Int16Array
    """int16 [m]."""
    bits: int
    large: npt.NDArray[np.bool_] | None = None
    """The exceptions, bool [m], if there are any."""


def _looked_at(by: packing.Int16Array) -> _Changed:
    """Return the cheapest way to say it."""
    low, high = int(by.min()), int(by.max())
    best, cost = _Changed(by, _SAME if low == high == 0 else _WHOLE), by.nbytes
    if best.bits == _SAME:
        return best
    for bits in packing.WIDTHS:
        most = packing.largest(bits)
        large = packing.exceptional(by, bits) if high > most or low < -most else None
        count = 0 if large is None else int(np.count_nonzero(large))
        here = packing.packed_bytes(len(by), bits) + _COUNT_BYTES + 2 * count
        if here < cost:
            best, cost = _Changed(by, bits, large), here
        if cost <= packing.packed_bytes(len(by), 2 * bits) + _COUNT_BYTES:
            break  # more bits are longer, even without exceptions
    return best


class WeightsReceiver:
    """A client's side of one connection."""

    def __init__(self, size: int) -> None:
        """`size` is the number of weights, n. None have come yet."""
        self._held = _Held(size)

    def decode(self, data: packing.ByteArray, into: Tensor) -> None:
        """Take in what `WeightsSender.encode` gave, and write the weights.

        Args:
            data: uint8.
            into: float32 [n].

        Raises:
            MalformedMessage: The bytes are no such thing.
        """
        at = 0
        for number, piece in enumerate(self._held.pieces):
            at = self._decode(number, piece, data, at)
            steps = _looked_up(_tables().powers, self._held.steps[number])
            numbers = self._held.numbers[piece.start : piece.stop].view(piece.rows, piece.width)
            rows = into[piece.start : piece.stop].view(piece.rows, piece.width)
            rows.copy_(numbers).mul_(steps)
        if at != len(data):
            raise MalformedMessage(f"weights with {len(data) - at} bytes too many")

    def _decode(self, number: int, piece: Piece, data: packing.ByteArray, at: int) -> int:
        held = self._held.numbers[piece.start : piece.stop].numpy()
        bits = int(_cut(data, at, 1)[0])
        at += 1
        if bits & _STEPS:
            bits -= _STEPS
            self._held.shift(number, _cut(data, at, piece.rows).view(np.int8).copy())
            at += piece.rows
        if bits == _SAME:
            return at
        if bits == _WHOLE:
            held[:] = _numbers(_cut(data, at, 2 * piece.size))
            return at + 2 * piece.size
        if bits not in packing.WIDTHS:
            raise MalformedMessage(f"weights in {bits} bits")
        count = int.from_bytes(_cut(data, at, _COUNT_BYTES).tobytes(), "little")
        at += _COUNT_BYTES
        length = packing.packed_bytes(piece.size, bits)
        packed = _cut(data, at, length)
        exceptions = _numbers(_cut(data, at + length, 2 * count))
        held += packing.unpack(packed, bits, piece.size, exceptions)
        return at + length + 2 * count


def _numbers(data: packing.ByteArray) -> packing.Int16Array:
    """The int16 that bytes are, wherever they lie."""
    return data.copy().view(np.int16)


def _cut(data: packing.ByteArray, at: int, length: int) -> packing.ByteArray:
    if at + length > len(data):
        raise MalformedMessage(f"weights that end after {len(data)} bytes")
    return data[at : at + length]


def on_grid(weights: Tensor) -> Tensor:
    """Return what a client gets of weights, float32 [n], on memory of its own."""
    found = torch.empty_like(weights)
    for piece in pieces(len(weights)):
        rows = weights[piece.start : piece.stop].view(piece.rows, piece.width)
        steps = _steps(rows.abs().amax(1))
        numbers = (rows * _looked_up(_tables().inverse, steps)).round_()
        into = found[piece.start : piece.stop].view(piece.rows, piece.width)
        torch.mul(numbers.to(torch.int16), _looked_up(_tables().powers, steps), out=into)
    return found
