"""How a vector is cut for coding: into pieces of whole blocks, and a last block that may be short.

A block shares one scale. A piece is what is coded at a time: large enough that PyTorch's calls
cost little, and small enough that it and its scratch stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 256
"""Elements that share a scale, unless something else is said."""
PIECE = 1 << 16
"""Elements of a piece, at most; a multiple of every length of blocks."""


class Piece(NamedTuple):
    """Part of a vector: `rows` blocks of `width` elements, one after the other."""

    start: int
    rows: int
    width: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.width

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.size


def pieces(size: int, block: int = BLOCK) -> Iterator[Piece]:
    """Yield the pieces of a vector of `size` elements, in order, with blocks of `block`."""
    whole = size - size % block
    for start in range(0, whole, PIECE):
        yield Piece(start, min(PIECE, whole - start) // block, block)
    if whole < size:
        yield Piece(whole, 1, size - whole)


def num_blocks(size: int) -> int:
    """Blocks of `BLOCK` of a vector of `size` elements."""
    return -(-size // BLOCK)
