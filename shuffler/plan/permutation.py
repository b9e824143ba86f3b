"""Stateless keyed permutations of [0, n): a Feistel network with cycle-walking.

Any element is found from `n` and a 64-bit key in constant time and memory, forwards or backwards,
so a shuffled order of a billion rows needs no table and no state to save. What is permuted, and
where keys come from (`keys`), is not decided here. This is a shuffle, not a cipher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.errors import PlanError

NUM_ROUNDS: Final = 8
"""Feistel rounds. Three fail the uniformity tests by far; four and five pass those few, which see
one pair at a time. Six are asked for at least, and eight keep a margin."""

_MIN_BITS: Final = 6
"""Least width of the network. Halves of one or two bits leave too few round functions to reach
all orders of 5 values alike in eight rounds; the price is some more walking when n is tiny."""

_MAX_BITS: Final = 62
_CHUNK: Final = 1 << 15
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_SHIFT_1: Final = np.uint64(30)
_SHIFT_2: Final = np.uint64(27)
_SHIFT_3: Final = np.uint64(31)


@dataclass(frozen=True, slots=True)
class Permutation:
    """The permutation of [0, n) that `key` names.

    The network runs over the least power of two 2^bits >= n (and >= 64), as an alternating
    unbalanced Feistel network: with the value split in `left` (bits // 2 bits) and `right` (the
    rest), even rounds do `left ^= F(right)`, odd rounds `right ^= F(left)`. Each round undoes
    itself, so this is a bijection of [0, 2^bits) for any F and any split. A value that lands in
    [n, 2^bits) is sent through again until it is below n (cycle-walking): it follows its own
    cycle, which returns to [0, n) at the latest at its start, so the result is a bijection of
    [0, n). Fewer than two passes are expected from n = 33 up because 2^bits < 2n.

    F is the 64-bit finaliser of SplitMix64 (Steele et al. 2014) over the half plus a round key;
    the round keys are BLAKE2b of `key`.

    Raises:
        PlanError: `n` is not in [1, 2^62], or `key` is not a 64-bit number.
    """

    n: int
    """Size of the domain."""

    key: int
    """Which permutation, in [0, 2^64); see `keys.stream_key`."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 1 << _MAX_BITS:
            raise PlanError(f"n={self.n} cannot be permuted; give a size from 1 to 2**{_MAX_BITS}")
        if not 0 <= self.key < 1 << 64:
            raise PlanError(f"key={self.key} is not a 64-bit key; make keys with stream_key")

    def forward(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the images of `positions` (any shape, values in [0, n)); an array alike."""
        return self._walk(positions, range(NUM_ROUNDS))

    def inverse(self, values: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the positions whose images are `values` (any shape, values in [0, n))."""
        return self._walk(values, range(NUM_ROUNDS - 1, -1, -1))

    def order(self) -> NDArray[np.int64]:
        """Return the whole permutation, int64 [n]: for domains known to be small."""
        order = np.empty(self.n, dtype=np.int64)
        for start in range(0, self.n, _CHUNK):  # what is in between takes several times as much
            stop = min(start + _CHUNK, self.n)
            order[start:stop] = self.forward(np.arange(start, stop, dtype=np.int64))
        return order

    def _walk(self, inputs: NDArray[np.integer], rounds: Iterable[int]) -> NDArray[np.int64]:
        domain = np.asarray(inputs)
        if domain.size and (domain.min() < 0 or domain.max() >= self.n):
            raise PlanError(
                f"positions {domain.min()}..{domain.max()} are not all in [0, {self.n}); "
                "ask only for positions of the permuted domain"
            )
        schedule = [(number % 2 == 0, key) for number, key in self._round_keys(rounds)]
        bits = max((self.n - 1).bit_length(), _MIN_BITS)
        step: Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
        step = partial(_feistel, bits=bits, schedule=schedule)
        if bits == _MIN_BITS:  # walks are long where n is tiny: take their steps from a table
            step = step(np.arange(1 << bits, dtype=np.uint64)).take
        size = np.uint64(self.n)
        outputs = step(domain.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(outputs >= size)
        while outside.size:
            outputs[outside] = step(outputs[outside])
            outside = outside[outputs[outside] >= size]
        return outputs.astype(np.int64).reshape(domain.shape)

    def _round_keys(self, rounds: Iterable[int]) -> list[tuple[int, np.uint64]]:
        digest = blake2b(self.key.to_bytes(8, "little"), digest_size=8 * NUM_ROUNDS).digest()
        keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        return [(number, keys[number]) for number in rounds]


def _feistel(
    values: NDArray[np.uint64], bits: int, schedule: list[tuple[bool, np.uint64]]
) -> NDArray[np.uint64]:
    """Run the rounds of `schedule` (changes the left half?, round key) over values of `bits`."""
    left_bits = bits // 2
    right_bits = bits - left_bits
    left_mask = np.uint64((1 << left_bits) - 1)
    right_mask = np.uint64((1 << right_bits) - 1)
    split = np.uint64(right_bits)
    left = values >> split
    right = values & right_mask
    for changes_left, key in schedule:
        if changes_left:
            left ^= mix64(right, key) & left_mask
        else:
            right ^= mix64(left, key) & right_mask
    return (left << split) | right


def mix64(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's finaliser of `values + key`; arithmetic is modulo 2^64."""
    mixed = values + key
    mixed ^= mixed >> _SHIFT_1
    mixed *= _MIX_1
    mixed ^= mixed >> _SHIFT_2
    mixed *= _MIX_2
    mixed ^= mixed >> _SHIFT_3
    return mixed
