"""Small whole numbers, several to a byte, with a few larger ones behind them.

Of a byte's numbers, the first is of the vector's first part, the second of its second, and so on:
so packing is a few operations on long vectors. NumPy's, because PyTorch's comparisons of bytes take
ten times as long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from downpour.paramserver.errors import MalformedMessage

WIDTHS = (2, 4, 8)
"""Bits of a number."""
Int16Array = npt.NDArray[np.int16]
ByteArray = npt.NDArray[np.uint8]


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of `size` numbers."""
    return -(-size * bits // 8)


def largest(bits: int) -> int:
    """The largest magnitude of a number in so many bits; larger ones are exceptions."""
    return int(2 ** (bits - 1)) - 1


def exceptional(numbers: Int16Array, bits: int) -> npt.NDArray[np.bool_]:
    """Which of the numbers, int16 [n], are too large for so many bits: bool [n]."""
    most = np.int16(largest(bits))
    # One comparison for both ends: as unsigned ones, negative numbers are the largest.
    found: npt.NDArray[np.bool_] = (numbers + most).view(np.uint16) > np.uint16(2 * most)
    return found


def pack(
    numbers: Int16Array, large: npt.NDArray[np.bool_] | None, bits: int, into: ByteArray
) -> Int16Array:
    """Pack numbers.

    Args:
        numbers: int16 [n].
        large: The exceptions among them, bool [n]; None if there are none.
        bits: One of `WIDTHS`.
        into: Where the packed ones go, uint8 [packed_bytes].

    Returns:
        The exceptions, int16 [e], in order. In their place the smallest number is packed.
    """
    room = len(into)
    shifted = numbers.astype(np.uint8)
    shifted += np.uint8(largest(bits) + 1)
    if large is not None:
        shifted *= ~large
    into[:] = shifted[:room]
    for number in range(1, 8 // bits):
        plane = shifted[number * room : (number + 1) * room]
        plane *= np.uint8(1 << bits * number)  # faster than a shift
        into[: len(plane)] += plane
    return numbers[:0] if large is None else numbers[large]


def unpack(data: ByteArray, bits: int, size: int, exceptions: Int16Array) -> Int16Array:
    """Return what `pack` was given, int16 [n].

    Args:
        data: uint8 [packed_bytes].
        bits: As it was packed.
        size: n.
        exceptions: int16 [e].

    Raises:
        MalformedMessage: There are more exceptions, or fewer, than places for them.
    """
    parts, mask = 8 // bits, np.uint8((1 << bits) - 1)
    planes = np.empty((parts, len(data)), np.uint8)
    for number in range(parts):
        np.right_shift(data, bits * number, out=planes[number])
    planes &= mask
    shifted = planes.reshape(-1)[:size]
    numbers = shifted.astype(np.int16)
    numbers -= largest(bits) + 1
    if len(exceptions):
        places = shifted == 0
        if (wanted := np.count_nonzero(places)) != len(exceptions):
            raise MalformedMessage(f"{len(exceptions)} exceptions for {wanted} places")
        numbers[places] = exceptions
    elif int(shifted.min(initial=1)) == 0:
        raise MalformedMessage("places for exceptions, and none of them")
    return numbers
