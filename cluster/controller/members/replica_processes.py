"""The processes of replicas of a run: starting them, bringing them back, more or fewer of them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from downpour.cluster.controller.failures.account import Failures, GaveUp, detail_of
from downpour.cluster.controller.failures.policy import Cause, Failure, stragglers
from downpour.cluster.controller.hangs.patience import Patience
from downpour.cluster.controller.leases.manager import LeaseManager
from downpour.cluster.controller.members.partitions import REPORT_EVERY_S, Partitions
from downpour.cluster.controller.protocol.backend import PartitionLost, ProcessLost
from downpour.cluster.controller.protocol.instructions import (
    AddProcess,
    Instruction,
    ReconnectProcess,
    StartProcess,
    StopProcess,
    Tell,
)
from downpour.cluster.errors import user_message
from downpour.workers.config import ReplicaConfig

if TYPE_CHECKING:
    from downpour.workers.replica.replicas import WindowReport

RATE_WINDOWS = 3
"""A replica's rate is that of its last few windows."""


@dataclass(kw_only=True)
class ReplicaProcess:
    """A process of replicas as the controller sees it."""

    index: int
    replicas: tuple[int, ...]
    starting: bool = False
    """It is being started, or connected again."""
    ready: bool = False
    """It is connected, and may be leased windows."""
    wanted: bool = True
    """Some of its replicas are to train."""
    runs: bool = False
    """It was up once, and has not died. If it is not ready, it has lost its connections."""
    due_s: float = -math.inf
    """When it may be started again, after it has failed too often."""
    rates: dict[int, deque[float]] = field(default_factory=dict)
    """Mini-batches a second of its last windows, by replica."""
    told_slow: bool = False
    """People have heard that it is slower than the others."""
    leaving: bool = False
    """Its node is to leave: it is granted nothing more, and goes on elsewhere once it is done."""
    life: int = 0
    """How often it has hung."""
    pushes: int = 0
    """Of its replicas, that a partition knew of at the last look."""
    alive_s: float | None = None
    """When it was last seen to get on with a window; None if it has none."""
    late_looks: int = 0
    """Looks in a row that found it silent for too long."""

    @property
    def name(self) -> str:
        """What people call it."""
        numbers = ", ".join(map(str, self.replicas))
        return f"the process of replica{'s' if len(self.replicas) > 1 else ''} {numbers}"

    def cut_off(self, now: float) -> bool:
        """Return whether it is to train now, but neither does nor is being brought back."""
        return self.wanted and not self.ready and not self.starting and now >= self.due_s

    @property
    def rate(self) -> float | None:
        """Mini-batches a second of all its replicas; None until each has done enough windows."""
        rates = [self.rates.get(r, ()) for r in self.replicas]
        if not self.ready or any(len(of) < RATE_WINDOWS for of in rates):
            return None
        return sum(map(statistics.fmean, rates))


class ReplicaProcesses:
    """All processes of replicas of one run."""

    def __init__(
        self,
        processes: Sequence[tuple[int, ...]],
        *,
        config: ReplicaConfig,
        failures: Failures,
        partitions: Partitions,
        leases: LeaseManager,
        patience: Patience,
        out: list[Instruction],
    ) -> None:
        """None has been started. `processes` are the replicas of each."""
        self._config = config
        self._failures = failures
        self._partitions = partitions
        self._leases = leases
        self._patience = patience
        self._out = out
        self.members = [ReplicaProcess(index=i, replicas=r) for i, r in enumerate(processes)]
        self._following: list[ReplicaProcess] = []
        """Those that are started when the first is up."""
        self._of = {r: p for p in self.members for r in p.replicas}

    @property
    def all_up(self) -> bool:
        """Whether every process is connected."""
        return all(p.ready for p in self.members)

    def all_wanted_up(self, now: float) -> bool:
        """Return whether all are connected whose replicas are to train now."""
        return all(p.ready or now < p.due_s for p in self.members if p.wanted)

    def some_wait(self, now: float) -> bool:
        """Return whether one has failed so often that it is not to train yet."""
        return any(now < p.due_s for p in self.members if p.wanted)

    @property
    def quiet(self) -> bool:
        """Whether no process is there that may still push from windows that it has lost."""
        return not any(p.runs and not p.ready for p in self.members)

    @property
    def any_starts(self) -> bool:
        """Whether one is being started, or connected again."""
        return any(p.starting for p in self.members)

    @property
    def any_move(self) -> bool:
        """Whether one goes on elsewhere as soon as its windows are done."""
        return any(p.leaving and p.ready and p.wanted for p in self.members)

    def any_cut_off(self, now: float) -> bool:
        """Return whether one that is to train now runs without its connections, or not at all."""
        return any(p.cut_off(now) for p in self.members)

    def of(self, replica: int) -> ReplicaProcess:
        """Return a replica's process."""
        return self._of[replica]

    def is_up(self, replica: int) -> bool:
        """Return whether a replica's process is connected."""
        return self._of[replica].ready

    def num_alive(self, wanted: int) -> int:
        """Return how many of the replicas below `wanted` have a process that is connected."""
        return sum(r < wanted for p in self.members if p.ready for r in p.replicas)

    def num_working(self) -> int:
        """Return how many replicas are connected, and have a window in work."""
        held = self._leases.num_held_by
        return sum(held(r) > 0 for p in self.members if p.ready for r in p.replicas)

    def start(self) -> None:
        """Start the first, and the others once it is up.

        If all are there already, they follow at once. If a backend starts them only now, since
        there are not processors enough for all, the run trains before they have come.
        """
        first, *self._following = self.members
        for process in self._following:
            process.starting = True
        self._start(first)

    def start_cut_off(self, now: float) -> None:
        """Connect those that lack their connections again, now that all partitions answer."""
        for process in self.members:
            if process.cut_off(now):
                self._start(process)

    def started(self, index: int) -> None:
        """A process is connected."""
        process = self.members[index]
        process.starting = False
        process.ready = process.runs = True
        following, self._following = self._following, []
        for other in following:
            self._start(other)

    def start_failed(self, index: int, error: Exception, now: float) -> None:
        """A process could not be started, or not be connected."""
        process = self.members[index]
        process.starting = False
        process.runs = isinstance(error, PartitionLost)
        self._on_error(process, error, now)

    def _start(self, process: ReplicaProcess) -> None:
        process.starting, process.leaving = True, False
        call = ReconnectProcess if process.runs else StartProcess
        self._out.append(call(process=process.index, life=process.life))

    # Their windows

    def trained(self, replica: int, report: WindowReport, now: float) -> None:
        """A replica has done a window."""
        process = self._of[replica]
        self._seen(process, now)
        self._failures.policy.progressed("replicas", process.index)
        if report.wall_s > 0:
            rates = process.rates.setdefault(replica, deque(maxlen=RATE_WINDOWS))
            rates.append(report.num_batches / report.wall_s)

    def window_failed(self, replica: int, error: Exception, now: float) -> None:
        """A replica's window ended by an error that is not the delivery's."""
        self._on_error(self._of[replica], error, now)

    def drop_windows(self) -> None:
        """Put every window of all of them in doubt; they are to connect again."""
        for process in self.members:
            self._drop_windows(process)

    def _drop_windows(self, process: ReplicaProcess) -> None:
        process.ready = False
        process.rates.clear()
        self._leases.lost(process.replicas)

    # Failures

    def _on_error(self, process: ReplicaProcess, error: Exception, now: float) -> None:
        if isinstance(error, ProcessLost):
            self._on_lost(process, "died", now)
        elif isinstance(error, PartitionLost):
            self._on_disconnected(process, error, now)
        elif user_message(error) is not None:
            raise GaveUp(error)
        else:
            self._on_lost(process, "failed", now, detail=detail_of(error), error=error)

    def _on_lost(
        self,
        process: ReplicaProcess,
        cause: Cause,
        now: float,
        *,
        detail: str = "",
        error: Exception | None = None,
    ) -> None:
        process.runs = process.starting = process.leaving = False
        self._drop_windows(process)
        failure = self._failure(process, cause, detail)
        process.due_s = now + self._failures.recover(failure, now, error=error).pause_s
        if self._partitions.all_up and process.cut_off(now):
            self._start(process)
        # Otherwise it is started once its time has come, and all partitions are there again.

    def _on_disconnected(self, process: ReplicaProcess, error: PartitionLost, now: float) -> None:
        """A process has lost a connection. The next reports tell which partition's fault it is."""
        self._drop_windows(process)
        if error.partition is not None:
            self._partitions.cut(error.partition, now)
        self._partitions.ask_reports_now(now)
        if self._partitions.all_up:
            failure = self._failure(process, "disconnected", str(error))
            recovery = self._failures.recover(failure, now)
            process.runs, process.due_s = recovery.action == "reconnect", now + recovery.pause_s

    def _failure(self, process: ReplicaProcess, cause: Cause, detail: str) -> Failure:
        return Failure(
            part="replicas", index=process.index, name=process.name, cause=cause, detail=detail
        )

    def look_for_stragglers(self, now: float) -> None:
        """Tell of processes that are slower than the others, or replace them."""
        rates = {p.index: p.rate for p in self.members}
        known = {index: rate for index, rate in rates.items() if rate is not None}
        for index, detail in stragglers(known, self._config.straggler_ratio).items():
            process = self.members[index]
            if self._config.stragglers == "replace":
                self._on_lost(process, "slow", now, detail=detail)
            elif not process.told_slow:
                process.told_slow = True
                text = f"{process.name} is slow: {detail}; --stragglers replace"
                self._out.append(Tell(text=text))

    # Hangs

    def look_for_hangs(self, now: float) -> list[tuple[ReplicaProcess, str]]:
        """Return the processes that have windows and do not get on, each with the reason.

        A push that a partition knows of is a sign of life, and so is a window that is done. If none
        of several shows one, they may all wait for the same: then only the first that fell silent
        is named, and the others have time again.
        """
        busy, late = [], []
        for process in self.members:
            held = self._leases.num_held_by(*process.replicas)
            if not process.ready or not held:
                process.alive_s, process.late_looks = None, 0
                continue
            busy.append(process)
            pushes = self._partitions.num_pushes_of(process.replicas)
            if process.alive_s is None or pushes != process.pushes:
                process.pushes = pushes
                self._seen(process, now)
            assert process.alive_s is not None
            why = self._patience.lost("life", now - process.alive_s, now)
            process.late_looks += why is not None
            if why is not None and process.late_looks > 1:  # reports have come since the first
                late.append((process, why))
        if not late or not self._partitions.all_answer(now):
            return []
        if len(busy) > 1 and all(process.late_looks for process in busy):
            late = [min(late, key=lambda found: found[0].alive_s or 0.0)]
            self.be_patient(now)
        for _ in late:
            self._patience.gave_up("life")
        return late

    def _seen(self, process: ReplicaProcess, now: float) -> None:
        """A process gets on. One that does at every look has been waited for by nobody."""
        if process.alive_s is not None:
            waited_s = now - process.alive_s - REPORT_EVERY_S
            self._patience.took("life", max(0.0, waited_s), now)
        process.alive_s, process.late_looks = now, 0

    def forgive(self, seconds: float) -> None:
        """Nobody has looked for signs of life for so long."""
        for process in self.members:
            if process.alive_s is not None:
                process.alive_s += seconds

    def be_patient(self, now: float) -> None:
        """None of them is to blame for what it waits for: give them time again."""
        for process in self.members:
            process.alive_s, process.late_looks = now, 0

    def hung(self, index: int, why: str, now: float) -> None:
        """A process hangs: it is ended, and another takes its place."""
        process = self.members[index]
        process.life += 1
        self._on_lost(process, "silent", now, detail=why)

    # How many there are

    def scale(self, replicas: int) -> None:
        """Have so many replicas from now on: more processes, or processes that are let go."""
        new = [r for r in range(replicas) if r not in self._of]
        # As many in a process as there are already, so that they take turns just as fast.
        size = max(len(p.replicas) for p in self.members)
        for start in range(0, len(new), size):
            of = tuple(new[start : start + size])
            process = ReplicaProcess(index=len(self.members), replicas=of)
            self._out.append(AddProcess(process=process.index, replicas=of))
            self.members.append(process)
            self._of |= dict.fromkeys(of, process)
        for process in self.members:
            process.wanted = any(r < replicas for r in process.replicas)

    def depart(self, departing: Collection[int]) -> None:
        """Have processes whose nodes are to leave finish what they have, and take it from there.

        This is no restart, and nothing is computed twice if they are done in time.
        """
        for process in self.members:
            if process.index in departing and process.ready and not process.leaving:
                process.leaving = True
                self._out.append(Tell(text=f"{process.name} moves: its node is to leave"))

    def move(self, *, over: bool) -> None:
        """Start processes that are to move elsewhere, once they have no windows left.

        If the time for that is `over`, they leave what they have to others.
        """
        for process in self.members:
            idle = not self._leases.num_held_by(*process.replicas)
            if process.leaving and process.ready and process.wanted and (idle or over):
                self._drop_windows(process)
                process.leaving = process.runs = False
                self._out.append(StopProcess(process=process.index))
                self._start(process)

    def may_take(self, replica: int) -> bool:
        """Return whether a replica's process is connected, and stays."""
        return self._of[replica].ready and not self._of[replica].leaving

    def retire(self) -> None:
        """End processes that are not wanted, once they have no windows left."""
        for process in self.members:
            idle = not self._leases.num_held_by(*process.replicas)
            if process.ready and not process.wanted and idle:
                process.ready = process.runs = False
                self._out.append(StopProcess(process=process.index))
                self._out.append(Tell(text=f"{process.name} is let go"))

    def check(self) -> None:
        """Assert that only replicas whose process is connected have live leases."""
        for process in self.members:
            assert process.ready or not self._leases.num_held_by(*process.replicas), process
            assert process.runs or not process.ready, process
            assert not (process.ready and process.starting), process
        assert [p.index for p in self.members] == list(range(len(self.members)))
        assert all(r in p.replicas for r, p in self._of.items())
