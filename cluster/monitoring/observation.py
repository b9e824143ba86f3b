"""What those who look on are told of a run: Prometheus through Ray, TensorBoard, callbacks.

`Telemetry` makes an `Observation` about once a second and hands it to each `Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.leases.manager import Leases
from downpour.cluster.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.replica.replicas import WindowReport


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Where a run stands; `values` are a line of metrics.jsonl."""

    values: Mapping[str, Any]
    reports: Sequence[PartitionReport]
    replicas: Mapping[str, int]
    """Replicas by state: training, waiting, starting, held (back by the warm start's guard)."""
    leases: Leases = field(default_factory=Leases)
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Actors replaced in this session, by kind."""


class Sink(Protocol):
    """Takes figures. If it raises anything but `OSError`, the training ends."""

    def trained(self, report: WindowReport) -> None:
        """A window is done."""

    def observed(self, observation: Observation) -> None:
        """All partitions have reported."""

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """Weights were scored; a line of metrics.jsonl."""

    def saved(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is whole."""

    def close(self) -> None:
        """The session is over."""


@dataclass(frozen=True, kw_only=True)
class Handle:
    """A run that trains, for those who look on from outside."""

    folder: Path
    """The run's folder."""
    config: RunConfig
    """Its configuration."""
    finish: Callable[[str], None]
    """Asks for the run to be finished as it stands; takes the reason."""
    tell: Callable[[str], None]
    """Shows people a line, and keeps it among the run's events."""


Onlooker = Callable[[Handle], Sink]
"""Is called when a session begins, and gives what is told of it from then on."""
