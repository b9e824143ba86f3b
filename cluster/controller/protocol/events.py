"""What goes into the state of a run: events, plain frozen data. What comes out: `instructions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from downpour.cluster.controller.protocol.instructions import Call


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The session begins."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed, or all events of one moment have been handed in: do what is due."""


@dataclass(frozen=True, kw_only=True)
class StoodStill:
    """The driver itself did nothing for a while: it was stopped, or the machine was suspended."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class StopRequested:
    """Somebody asks for a checkpoint and an end."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class EndRequested:
    """Somebody has seen enough: the run is to be finished as it stands."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ReplicasRequested:
    """Somebody asks for another number of replicas."""

    replicas: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A call has been answered."""

    call: Call
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A call has failed, by one of the exceptions in `backend` or by another one."""

    call: Call
    error: Exception


Event = (
    Begin | Tick | StoodStill | StopRequested | EndRequested | ReplicasRequested | Answered | Failed
)
