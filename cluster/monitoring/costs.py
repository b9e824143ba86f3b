"""What a run costs in processor time, summed up over its processes from what they report.

Cumulative seconds, for `metrics.jsonl`: two lines of it give what went on between them. Not here:
what is made of that (`simulate`).
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


class Costs:
    """Processor seconds by part of the run, since its session began."""

    def __init__(self) -> None:
        """Nothing has been spent yet."""
        self._spent: dict[str, Spent] = {}
        self._reading_s = 0.0
        self._scoring_s = 0.0
        self._scorings = 0

    def trained(self, report: WindowReport) -> None:
        """A window is done."""
        if report.spent is not None:
            self._spent[report.spent.source] = report.spent
        self._reading_s += sum(reading.seconds for reading in report.readings)

    def evaluated(self, wall_s: float) -> None:
        """Weights were scored, on one thread."""
        self._scoring_s += wall_s
        self._scorings += 1

    def values(self, reports: Iterable[PartitionReport]) -> dict[str, float]:
        """The sums, as a line of metrics has them.

        `machine_cpu_s` is of all processors that the driver sees, since they were started, and of
        whatever runs on them; it is left out where the system does not tell.
        """
        spent = self._spent.values()
        values = {
            "steps": sum(s.steps for s in spent),
            "steps_cpu_s": sum(s.steps_cpu_s for s in spent),
            "replicas_cpu_s": sum(s.process_cpu_s for s in spent),
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
    """Processor seconds that this machine has worked since it started; None if it does not tell."""
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; time of guests is in user already.
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
