"""The members of a run as the controller sees them, and how its part of a run ended.

Data. What is done with them is `processes`' and `partitions`', what is done about their loss
`recovery`'s.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from downpour.cluster.run.early_stopping import Ended

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.actor import Evaluation

RATE_WINDOWS = 3
"""A replica's rate is that of its last few windows."""


@dataclass(kw_only=True)
class Process:
    """A process of replicas as the controller sees it."""

    index: int
    replicas: tuple[int, ...]
    starting: bool = False
    """It is being started, or connected again."""
    ready: bool = False
    """It is connected, and may be lent windows."""
    wanted: bool = True
    """Some of its replicas are to train."""
    runs: bool = False
    """It was up once, and has not died: what is not ready has lost its connections."""
    rates: dict[int, deque[float]] = field(default_factory=dict)
    """Mini-batches a second of its last windows, by replica."""
    told_slow: bool = False
    """People have heard that it is slower than the others."""

    @property
    def name(self) -> str:
        """What people call it."""
        numbers = ", ".join(map(str, self.replicas))
        return f"the process of replica{'s' if len(self.replicas) > 1 else ''} {numbers}"

    @property
    def cut_off(self) -> bool:
        """It is to train, but neither does nor is being brought back."""
        return self.wanted and not self.ready and not self.starting

    @property
    def rate(self) -> float | None:
        """Mini-batches a second of all its replicas; None until each has done enough windows."""
        rates = [self.rates.get(r, ()) for r in self.replicas]
        if not self.ready or any(len(of) < RATE_WINDOWS for of in rates):
            return None
        return sum(map(statistics.fmean, rates))

    def trained(self, replica: int, batches_per_s: float) -> None:
        """One of its replicas has done a window."""
        self.rates.setdefault(replica, deque(maxlen=RATE_WINDOWS)).append(batches_per_s)


@dataclass(kw_only=True)
class Partition:
    """A partition as the controller sees it."""

    index: int
    up: bool = False
    incarnation: int = 0
    """Counts its starts: what an earlier one still has to say is of no interest."""
    asked_s: float | None = None
    """When it was asked for a report that has not come."""
    version: int | None = None
    """In its first report since it started."""


@dataclass(kw_only=True)
class Outcome:
    """How the controller's part of a run ended."""

    finished: bool
    """Every epoch is complete, or the run has arrived; otherwise it was asked to stop."""
    ended: Ended
    """Why it is finished, if it is."""
    reached: Mapping[str, Mapping[str, float]]
    """When it first had which accuracy, see `EarlyStopping.reached`."""
    unfinished_epochs: Mapping[int, int]
    """Of a finished run that ended early: by epoch that is not complete, its mini-batches that
    were trained on."""
    reports: list[PartitionReport]
    evaluation: Evaluation | None
    best_accuracy: float | None
    exactly_once: bool
    """Every partition has settled every mini-batch once, of all epochs or, where the run ended
    early, of those that were trained on."""
    refused: int
    """Distinct mini-batches that some partition refused."""
    skipped: dict[int, str]
    """Training rows whose image could not be decoded and was left out, each with a line on why."""
    quarantined: tuple[int, ...]
    """Replicas that were lent nothing any more, for what they sent."""
    restarts: Mapping[str, int]
    """Members that were replaced, by kind."""
    updates_before: int
    """Updates at the beginning of this session."""
    all_replicas_at: float | None
    """Unix time at which the last process of replicas was ready."""
    elapsed_s: float
    """Seconds of training, over all sessions of the run."""
    wall_s: float
    checkpoint: int | None
    """Number of the last checkpoint of this session, if there was one."""
