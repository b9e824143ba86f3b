"""Staleness: version when applied − version pulled, by replica, in histograms of bounded size.

The bins are exact below `EXACT`, where staleness is unless somebody pauses. From there on each
octave [2^k, 2^(k+1)) has `PER_OCTAVE` bins of one width, so a bin is at most 1/32 of its values
wide. A process that was paused for an hour may be a million versions behind: that is a bin more,
not a million.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

EXACT = 1024
"""Values below this, a power of 2, have a bin each."""
PER_OCTAVE = 32
"""Bins of each octave above that, a power of 2."""
_FIRST_OCTAVE = EXACT.bit_length() - 1
_SHIFT = PER_OCTAVE.bit_length() - 1


def bin_of(value: int) -> int:
    """Return the bin that a value is counted in."""
    if value < EXACT:
        return value
    octave = value.bit_length() - 1
    within = (value >> (octave - _SHIFT)) - PER_OCTAVE
    return EXACT + (octave - _FIRST_OCTAVE) * PER_OCTAVE + within


def lower_edge(index: int) -> int:
    """Return the least value of a bin."""
    if index < EXACT:
        return index
    octaves, within = divmod(index - EXACT, PER_OCTAVE)
    return (PER_OCTAVE + within) << (octaves + _FIRST_OCTAVE - _SHIFT)


class Histogram:
    """Counts of the integers 0, 1, 2, ... in bins; grows as needed, and merges."""

    def __init__(self, counts: Sequence[int] | npt.NDArray[np.int64] = ()) -> None:
        """A histogram that holds `counts[i]` observations in bin i."""
        self._counts: list[int] = [int(c) for c in counts]

    @classmethod
    def of_values(cls, counts: Iterable[int]) -> Histogram:
        """Return the histogram of `counts[i]` observations of the value i."""
        new = cls()
        values = iter(counts)
        new._counts = [int(c) for c in itertools.islice(values, EXACT)]
        for value, count in enumerate(values, EXACT):
            new.add(value, int(count))
        return new

    def add(self, value: int, times: int = 1) -> None:
        """Count an observation, or several of one value."""
        assert value >= 0, f"{value} is not a count of versions"
        counts = self._counts
        index = value if value < EXACT else bin_of(value)
        if index >= len(counts):
            counts.extend([0] * (index + 1 - len(counts)))
        counts[index] += times

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Observations in each bin: int64 [last bin + 1]."""
        return np.asarray(self._counts, np.int64)

    @property
    def bars(self) -> list[tuple[int, int]]:
        """The bins that hold something: (least value, observations)."""
        return [(lower_edge(i), n) for i, n in enumerate(self._counts) if n]

    @property
    def total(self) -> int:
        """How many observations there are."""
        return sum(self._counts)

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both sets of observations."""
        a, b = self.counts, other.counts
        if len(a) < len(b):
            a, b = b, a
        merged = a.copy()
        merged[: len(b)] += b
        return Histogram(merged)

    def percentile(self, share: float) -> int:
        """Return a value that at least `share` (0 to 1) of all observations stay within.

        The least one; from `EXACT` on, the largest of its bin.
        """
        counts = self.counts
        total = int(counts.sum())
        if not total:
            return 0
        return _upper(int(np.searchsorted(np.cumsum(counts), share * total - 1e-9)))

    def summary(self) -> dict[str, float]:
        """Return `mean`, `p50`, `p99` and `max`, in versions; zeros if nothing was observed.

        From `EXACT` on, the mean takes the middle of each bin, the others its largest value.
        """
        counts = self.counts
        total = int(counts.sum())
        if not total:
            return {"mean": 0.0, "p50": 0, "p99": 0, "max": 0}
        weighed = sum(n * (lower_edge(i) + _upper(i)) / 2 for i, n in enumerate(self._counts) if n)
        return {
            "mean": float(weighed / total),
            "p50": self.percentile(0.50),
            "p99": self.percentile(0.99),
            "max": _upper(int(np.flatnonzero(counts)[-1])),
        }


def _upper(index: int) -> int:
    """The largest value of a bin."""
    return lower_edge(index + 1) - 1


class StalenessRecord:
    """The staleness of every applied push, by the replica that sent it."""

    def __init__(self, by_replica: Mapping[int, Sequence[int]] | None = None) -> None:
        """A record that starts from `by_replica`, as `dump` gave it."""
        self._by_replica: dict[int, Histogram] = {}
        self.load(by_replica or {})

    def load(self, by_replica: Mapping[int, Sequence[int]]) -> None:
        """Start again from `by_replica`, as `dump` gave it."""
        self._by_replica = {r: Histogram(c) for r, c in by_replica.items()}

    def load_values(self, by_replica: Mapping[int, Sequence[int]]) -> None:
        """Start again from counts of each value, which is what snapshots of old hold."""
        self._by_replica = {r: Histogram.of_values(c) for r, c in by_replica.items()}

    def add(self, replica: int, staleness: int) -> None:
        """Count one applied push."""
        histogram = self._by_replica.get(replica)
        if histogram is None:
            histogram = self._by_replica[replica] = Histogram()
        histogram.add(staleness)

    def of(self, replica: int) -> Histogram:
        """Return one replica's histogram."""
        return self._by_replica.get(replica, Histogram())

    def all(self) -> Histogram:
        """Return the histogram over all replicas."""
        whole = Histogram()
        for histogram in self._by_replica.values():
            whole = whole.merge(histogram)
        return whole

    def dump(self) -> dict[int, list[int]]:
        """Return the counts of each bin by replica, plain."""
        return {r: h.counts.tolist() for r, h in sorted(self._by_replica.items())}
