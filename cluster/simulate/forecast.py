"""What a simulation comes to: its figures, and what they are taken from."""

from __future__ import annotations

from dataclasses import dataclass

from downpour.paramserver.partition.staleness import Histogram


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would show in steady state."""

    replicas: int
    concurrent_steps: int
    processes: int
    partitions: int
    updates: int
    """Updates that figures are taken over."""
    seconds: float
    """Of virtual time that they took."""
    updates_per_s: float
    """Of each partition."""
    batches_per_s: float
    """Mini-batches that every partition has settled, less those that deaths took back."""
    staleness: Histogram
    """Over all partitions."""
    push_ms: float
    """Mean from a push to the last partition's answer."""
    pull_wait_ms: float
    """Mean wait of a step for weights."""
    busy: tuple[float, float]
    """Share of the processors that is used, background included, on the first of the replicas'
    machines and on the first of the partitions'."""
    deaths: int
    """Processes and partitions that died in that time."""
    repeated: int
    """Pushes of mini-batches that a partition had settled before, since the run began."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where a simulation stands."""

    now_s: float
    applied: int
    settled: int
    busy_s: tuple[float, ...]
    deaths: int
