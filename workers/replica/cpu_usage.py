"""What steps cost a process in processor time, as the kernel counts it.

Read once a window, so it costs the steps nothing. `cluster.simulate` takes its costs from it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Since a process connected; all of these only grow."""

    source: str
    """Names the process and its connection: figures of two sources may be added up."""
    steps: int
    """Steps computed."""
    steps_cpu_s: float
    """Processor seconds of the thread that runs the steps, with their pushes and pulls."""
    process_cpu_s: float
    """Processor seconds of all of the process's threads."""


class Meter:
    """Reads what a thread and its process have spent. Made anywhere, read by that thread."""

    def __init__(self) -> None:
        """What the process has spent until now is not counted."""
        self._source = secrets.token_hex(8)
        self._process_cpu_s = time.process_time()

    def read(self, steps: int) -> Spent:
        """What has been spent on so many steps by the thread that calls."""
        return Spent(
            source=self._source,
            steps=steps,
            steps_cpu_s=time.thread_time(),
            process_cpu_s=time.process_time() - self._process_cpu_s,
        )
