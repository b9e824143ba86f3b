"""The processor time of a run, summed over its processes from what they report.

The sums are cumulative seconds, for `metrics.jsonl`: the difference of two lines is what was used
between them. What is made of that is in `cluster.simulate.likeness`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.replica.cpu_usage import Spent
    from downpour.workers.replica.replicas import WindowReport

STAT = Path("/proc/stat")
TICKS_PER_S = 100
"""Of /proc/stat, whatever the kernel's own clock (USER_HZ; proc(5))."""


class CpuTotals:
    """Processor seconds by part of the run, since its session began."""

    def __init__(self) -> None:
        """Nothing has been used yet."""
        self._by_source: dict[str, Spent] = {}
        self._reading_s = 0.0
        self._scoring_s = 0.0
        self._scorings = 0

    def trained(self, report: WindowReport) -> None:
        """A window is done."""
        if report.spent is not None:
            self._by_source[report.spent.source] = report.spent
        self._reading_s += sum(reading.seconds for reading in report.readings)

    def evaluated(self, wall_s: float) -> None:
        """Weights were scored, on one thread."""
        self._scoring_s += wall_s
        self._scorings += 1

    def values(self, reports: Iterable[PartitionReport]) -> dict[str, float]:
        """Return the sums, as a line of metrics has them.

        `machine_cpu_s` is of all processors that the driver sees, since they were started, and of
        whatever runs on them. It is left out if the system does not tell.
        """
        used = self._by_source.values()
        values = {
            "steps": sum(u.steps for u in used),
            "steps_cpu_s": sum(u.steps_cpu_s for u in used),
            "replicas_cpu_s": sum(u.process_cpu_s for u in used),
            "partitions_cpu_s": sum(r.cpu_s for r in reports),
            "reading_s": self._reading_s,
            "scoring_s": self._scoring_s,
            "scorings": self._scorings,
        }
        busy_s = machine_cpu_s()
        if busy_s is not None:
            values["machine_cpu_s"] = busy_s
        return {name: round(value, 4) for name, value in values.items()}


def machine_cpu_s() -> float | None:
    """Return the processor seconds that this machine has worked since it started.

    None if it does not tell.
    """
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; time of guests is in user already.
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
