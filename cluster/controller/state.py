"""The state of a run, and its one door: `handle(event, now) -> instructions`. Pure.

`RunState` decides everything that goes on in a run, without Ray, clocks, input or output. It keeps
nothing that the partitions do not know: the leases follow from their applied sets, and are set
right by them when a process or a partition is lost, and when a run is resumed. What it is made of
is in `parts`, what it does in `reactions`, `stages` and what these call. The `controller` hands in
the events and carries the instructions out.
"""

from __future__ import annotations

from downpour.cluster.controller.failures.account import GaveUp
from downpour.cluster.controller.hang_reactions import stood_still
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.events import (
    Answered,
    Begin,
    EndRequested,
    Event,
    Failed,
    ReplicasRequested,
    StoodStill,
    StopRequested,
    Tick,
)
from downpour.cluster.controller.protocol.instructions import (
    Call,
    Finish,
    GiveUp,
    Instruction,
    Tell,
)
from downpour.cluster.controller.protocol.waits import wait_of
from downpour.cluster.controller.reactions import answered, failed
from downpour.cluster.controller.stages import go_on


class RunState(RunParts):
    """All that is known and decided of one session of a run."""

    is_over = False
    """The last instruction has been given."""

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take note of an event, and decide what follows from it.

        Args:
            event: what has happened.
            now: seconds by the run's clock.

        Returns:
            What is to be done, in this order. `Finish` or `GiveUp` is the last instruction of all.
        """
        if self.is_over:
            return []
        self.out.clear()
        try:
            self._take(event, now)
        except GaveUp as end:
            self.stage = "ended"
            self.out.append(GiveUp(error=end.error, cause=end.cause))
        for given in self.out:
            if (wait := wait_of(given)) is not None:
                self.watch.began(given, wait, now)
        self.is_over = any(isinstance(given, Finish | GiveUp) for given in self.out[-1:])
        return list(self.out)

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Begin():
                self.partitions.start()
            case Tick():
                go_on(self, now)
            case Answered():
                self._heard(event.call, now, well=True)
                answered(self, event, now)
            case Failed():
                self._heard(event.call, now, well=False)
                failed(self, event, now)
            case StoodStill():
                stood_still(self, event.seconds)
            case StopRequested():
                self.stop_reason = self.stop_reason or event.reason
            case EndRequested():
                self.end_wanted = self.end_wanted or event.reason
            case ReplicasRequested():
                self._scale(event.replicas)

    def _heard(self, call: Call, now: float, *, well: bool) -> None:
        if wait_of(call) is not None:
            self.watch.ended(call, now, well=well)

    def _scale(self, replicas: int) -> None:
        before, self.replicas_wanted = self.replicas_wanted, replicas
        self.out.append(Tell(text=f"from {before} replicas to {replicas}, as asked for"))
        self.processes.scale(replicas)
