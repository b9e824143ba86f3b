"""Staleness: version when applied − version pulled, counted exactly, by replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt


class Histogram:
    """Counts of the integers 0, 1, 2, ...; grows as needed, and merges."""

    def __init__(self, counts: Sequence[int] | npt.NDArray[np.int64] = ()) -> None:
        """A histogram that holds `counts[i]` observations of i."""
        self._counts: list[int] = [int(c) for c in counts]

    def add(self, value: int) -> None:
        """Count one observation."""
        assert value >= 0, f"{value} is not a count of versions"
        counts = self._counts
        if value >= len(counts):
            counts.extend([0] * (value + 1 - len(counts)))
        counts[value] += 1

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Observations of each value from 0 on: int64 [largest value + 1]."""
        return np.asarray(self._counts, np.int64)

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
        """Return the least value that at least `share` (0 to 1) of all observations stay within."""
        counts = self.counts
        total = int(counts.sum())
        if not total:
            return 0
        return int(np.searchsorted(np.cumsum(counts), share * total - 1e-9))

    def summary(self) -> dict[str, float]:
        """Return `mean`, `p50`, `p99` and `max`, in versions; zeros if nothing was observed."""
        counts = self.counts
        total = int(counts.sum())
        if not total:
            return {"mean": 0.0, "p50": 0, "p99": 0, "max": 0}
        return {
            "mean": float(counts @ np.arange(len(counts)) / total),
            "p50": self.percentile(0.50),
            "p99": self.percentile(0.99),
            "max": int(np.flatnonzero(counts)[-1]),
        }


class StalenessRecord:
    """The staleness of every applied push, by the replica that sent it."""

    def __init__(self, by_replica: Mapping[int, Sequence[int]] | None = None) -> None:
        """A record that starts from `by_replica`, as `dump` gave it."""
        self._by_replica: dict[int, Histogram] = {}
        self.load(by_replica or {})

    def load(self, by_replica: Mapping[int, Sequence[int]]) -> None:
        """Start again from `by_replica`, as `dump` gave it."""
        self._by_replica = {r: Histogram(c) for r, c in by_replica.items()}

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
        """Return the counts by replica, plain."""
        return {r: h.counts.tolist() for r, h in sorted(self._by_replica.items())}
