"""What the collectors of figures are told of a run: Prometheus through Ray, TensorBoard.

`Telemetry` makes an `Observation` about once a second and hands it to each `Sink`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from downpour.cluster.controller.leases.manager import Leases

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

    def close(self) -> None:
        """The session is over."""
