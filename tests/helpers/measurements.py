"""What benchmarks measure of this system, made up."""

from __future__ import annotations

from downpour.benchmarks.system import SystemMeasurement


def measured(updates_per_s: float, *, replicas: int) -> SystemMeasurement:
    """A measurement with this rate; the rest is of no meaning."""
    return SystemMeasurement(
        updates_per_s=updates_per_s,
        updates=100,
        seconds=1.0,
        cpu_ms_per_update=2.0,
        cpu_ms_by_role={},
        staleness_mean=3.0,
        duplicates=0,
        refused=0,
        replicas=replicas,
    )
