"""Actors that outlive their driver for a while, so that the next one finds them.

They belong to no driver, so they have to end by themselves if none comes. Ray knows when a driver
is gone: its process has ended, or its node is dead. One that was stopped or suspended is not gone.
Every actor's process imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

ORPHAN_S = 60.0
"""How long an actor waits for another driver."""
LOOK_EVERY_S = 5.0
ASK_DEADLINE_S = 10.0


class Attendance:
    """Which driver an actor works for, and for how long that one has been gone."""

    def __init__(self, driver: str) -> None:
        """The driver is there, as far as is known.

        Args:
            driver: Ray's id of its job.
        """
        self.driver = driver
        self._seen: tuple[str, float] | None = None
        """The driver that was seen to be gone, and when that was first seen."""

    def look(self, over: Callable[[str], bool], now: float) -> bool:
        """Return whether the actor has been without a driver for so long that it is to end.

        Args:
            over: tells of a driver whether it is gone.
            now: seconds, monotonic.
        """
        driver = self.driver
        if not over(driver):
            self._seen = None
            return False
        if self._seen is None or self._seen[0] != driver:
            self._seen = (driver, now)
        return now - self._seen[1] >= ORPHAN_S


def end_as_orphan(attendance: Attendance) -> None:
    """Have this process end once it has had no driver for too long. Does not wait."""
    threading.Thread(target=_watch, args=(attendance,), name="orphan", daemon=True).start()


def _watch(attendance: Attendance) -> None:
    while not attendance.look(is_over, time.monotonic()):
        time.sleep(LOOK_EVERY_S)
    os._exit(1)


def is_over(driver: str) -> bool:
    """Whether a driver of this cluster is gone, by what Ray knows; False if Ray does not tell.

    Args:
        driver: Ray's id of its job.
    """
    from ray._private import worker  # Ray has no public name that asks for one job

    ours: Any = worker.global_worker
    client = ours.gcs_client
    try:
        jobs = client.get_all_job_info(
            job_or_submission_id=driver,
            skip_submission_job_info_field=True,
            skip_is_running_tasks_field=True,
            timeout=ASK_DEADLINE_S,
        )
    except Exception:  # Ray's head is out of reach: if it stays so, Ray ends this process
        return False
    return any(job.is_dead for id, job in jobs.items() if id.hex() == driver)
