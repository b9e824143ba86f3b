"""The processes of replicas of a run: starting them, bringing them back, more or fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from downpour.cluster.controller.backend import Backend, Done, PartitionLost, ProcessLost
from downpour.cluster.controller.failure_policy import Cause, stragglers
from downpour.cluster.controller.failures import Losses
from downpour.cluster.controller.lease_manager import Lending
from downpour.cluster.controller.members import Process
from downpour.cluster.controller.partitions import Partitions
from downpour.cluster.controller.pending_calls import Tickets
from downpour.cluster.errors import user_message
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.workers.config import ReplicaConfig

if TYPE_CHECKING:
    from downpour.workers.replica.replicas import WindowReport


class Processes:
    """All processes of replicas of one run."""

    def __init__(
        self,
        backend: Backend,
        *,
        config: ReplicaConfig,
        tickets: Tickets,
        losses: Losses,
        telemetry: Telemetry,
        partitions: Partitions,
        lending: Lending,
        up: Callable[[], None],
    ) -> None:
        """None has been started. They connect to `partitions`, and their windows are of `lending`;
        `up` is told of each that has come up.
        """
        self._backend = backend
        self._config = config
        self._tickets = tickets
        self._losses = losses
        self._telemetry = telemetry
        self._partitions = partitions
        self._lending = lending
        self._up = up
        self._all = [Process(index=i, replicas=r) for i, r in enumerate(backend.processes)]
        self._next: list[Process] = []
        """Those that are started when the first is up."""
        self._of = {r: p for p in self._all for r in p.replicas}

    @property
    def all_up(self) -> bool:
        """Whether every process is connected."""
        return all(p.ready for p in self._all)

    @property
    def all_wanted_up(self) -> bool:
        """Whether all are connected whose replicas are to train."""
        return all(p.ready for p in self._all if p.wanted)

    @property
    def quiet(self) -> bool:
        """Whether no process is there that may still push from windows that it has lost."""
        return not any(p.runs and not p.ready for p in self._all)

    @property
    def any_cut_off(self) -> bool:
        """Whether one that is to train runs without its connections, or not at all."""
        return any(p.cut_off for p in self._all)

    def is_up(self, replica: int) -> bool:
        """Whether a replica's process is connected."""
        return self._of[replica].ready

    def num_alive(self, wanted: int) -> int:
        """Of the replicas below `wanted`, those whose process is connected."""
        return sum(r < wanted for p in self._all if p.ready for r in p.replicas)

    def num_working(self) -> int:
        """Replicas that are connected, and have a window in work."""
        return sum(
            p.ready and self._lending.num_held_by(r) > 0 for p in self._all for r in p.replicas
        )

    def start(self) -> None:
        """Start the first, and the others once it is up.

        Where all are there already they follow at once. Where a backend starts them only now,
        since there are not processors enough for all, the run trains before they have come.
        """
        first, *self._next = self._all
        for process in self._next:
            process.starting = True
        self._start(first)

    def start_cut_off(self) -> None:
        """Connect those that lack their connections again, now that all partitions answer."""
        for process in self._all:
            if process.cut_off:
                self._start(process)

    def _start(self, process: Process) -> None:
        process.starting = True
        backend = self._backend
        start = backend.reconnect_process if process.runs else backend.start_process

        def handle(done: Done) -> None:
            process.starting = False
            if done.error is None:
                process.ready = process.runs = True
                following, self._next = self._next, []
                for other in following:
                    self._start(other)
                self._up()
                return
            process.runs = isinstance(done.error, PartitionLost)
            self._on_error(process, done.error)

        self._tickets.expect(start(process.index), handle)

    # Their windows

    def trained(self, replica: int, report: WindowReport) -> None:
        """A replica has done a window."""
        process = self._of[replica]
        self._losses.progressed("replicas", process.index)
        if report.wall_s > 0:
            process.trained(replica, report.num_batches / report.wall_s)

    def failed(self, replica: int, error: Exception) -> None:
        """A replica's window ended by an error that is not the delivery's."""
        self._on_error(self._of[replica], error)

    def drop_windows(self) -> None:
        """Put every window of all of them in doubt; they are to connect again."""
        for process in self._all:
            self._drop_windows(process)

    def _drop_windows(self, process: Process) -> None:
        process.ready = False
        process.rates.clear()
        self._lending.lost(process.replicas)

    # Losses

    def _on_error(self, process: Process, error: Exception) -> None:
        if isinstance(error, ProcessLost):
            self._on_lost(process, "died")
        elif isinstance(error, PartitionLost):
            self._cut(process, error)
        elif user_message(error) is not None:
            raise error
        else:
            self._on_lost(process, "failed", error=error)

    def _on_lost(
        self,
        process: Process,
        cause: Cause,
        *,
        detail: str = "",
        error: Exception | None = None,
    ) -> None:
        process.runs = process.starting = False
        self._drop_windows(process)
        self._losses.recover(
            "replicas", process.index, process.name, cause, detail=detail, error=error
        )
        if self._partitions.all_up and process.wanted:
            self._start(process)
        # Otherwise it is started once all partitions are there again.

    def _cut(self, process: Process, error: Exception) -> None:
        """A process has lost a connection. Which partition's fault that is, the probe will tell."""
        self._drop_windows(process)
        self._partitions.ask_reports_now()
        if self._partitions.all_up:
            action = self._losses.recover(
                "replicas", process.index, process.name, "disconnected", detail=str(error)
            )
            process.runs = action == "reconnect"

    def look_for_stragglers(self) -> None:
        """Tell of processes that are slower than the others, or replace them."""
        rates = {p.index: p.rate for p in self._all}
        known = {index: rate for index, rate in rates.items() if rate is not None}
        for index, detail in stragglers(known, self._config.straggler_ratio).items():
            process = self._all[index]
            if self._config.stragglers == "replace":
                self._on_lost(process, "slow", detail=detail)
            elif not process.told_slow:
                process.told_slow = True
                self._telemetry.event(f"{process.name} is slow: {detail}; --stragglers replace")

    # How many there are

    def scale(self, replicas: int) -> None:
        """Have so many replicas from now on: more processes, or processes that are let go."""
        before, self._telemetry.replicas_wanted = self._telemetry.replicas_wanted, replicas
        self._telemetry.event(f"from {before} replicas to {replicas}, as asked for")
        new = [r for r in range(replicas) if r not in self._of]
        # As many in a process as there are already, so that they take turns just as fast.
        size = max(len(p.replicas) for p in self._all)
        for start in range(0, len(new), size):
            members = tuple(new[start : start + size])
            process = Process(index=self._backend.add_process(members), replicas=members)
            self._all.append(process)
            self._of |= dict.fromkeys(members, process)
        for process in self._all:
            process.wanted = any(r < replicas for r in process.replicas)

    def retire(self) -> None:
        """End processes that are not wanted, once they have no windows left."""
        for process in self._all:
            idle = not self._lending.num_held_by(*process.replicas)
            if process.ready and not process.wanted and idle:
                process.ready = process.runs = False
                self._backend.stop_process(process.index)
                self._telemetry.event(f"{process.name} is let go")
