"""Random numbers of many examples at once, each example's from a stream of its own.

A stream is named by (key, example) and needs no state: its numbers are hashes of the name and
their place, so any of them is found alone, in any order, on any machine. Keys are made in `keys`;
what is drawn for is not known here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.plan.permutation import mix64

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_TO_UNIT: Final = 2.0**-53
_DROPPED_BITS: Final = np.uint64(11)


def uniforms(key: int, examples: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Return the first `count` numbers of each example's stream, uniform in [0, 1).

    SplitMix64 (Steele et al. 2014): number j of example i is the finaliser of s_i + (j + 1) * phi
    in the upper 53 bits, where the stream's seed s_i is itself the finaliser of the example's
    number under `key`.

    Args:
        key: 64 bits; see `keys.stream_key`.
        examples: [n], any integers from 0 up.
        count: numbers of each.

    Returns:
        float64 [n, count].
    """
    numbers = np.asarray(examples).astype(np.uint64).reshape(-1)
    seeds = mix64(mix64(numbers, np.uint64(key)), _GOLDEN)
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = mix64(np.add.outer(seeds, steps), np.uint64(0))
    return (bits >> _DROPPED_BITS).astype(np.float64) * _TO_UNIT


def normals(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return standard normal numbers made of uniform ones in pairs: [n, 2k] to [n, 2k].

    Box and Muller (1958): sqrt(-2 ln(1 - u)) times cosine and sine of 2 pi v.
    """
    radius = np.sqrt(-2 * np.log1p(-uniform[:, 0::2]))
    angle = 2 * np.pi * uniform[:, 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
