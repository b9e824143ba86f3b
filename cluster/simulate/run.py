"""A whole run on the virtual clock: windows lent, steps taken, members that die and come back.

What the controller decides is decided by its own pieces: the lease book, the warm start, when to
score. Not here: where the inputs come from, and how the forecast is shown.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.cluster.config.derive import make_plan, step_config, update_config
from downpour.cluster.config.policy import next_evaluation_s
from downpour.cluster.config.resolve import num_processes, num_threads
from downpour.cluster.controller.leases.book import Lease, LeaseBook
from downpour.cluster.errors import UserError
from downpour.cluster.simulate.clock import Clock, Processors, Wire
from downpour.cluster.simulate.forecast import Forecast, Reading
from downpour.cluster.simulate.inputs import Inputs
from downpour.cluster.simulate.partition import Line, VirtualPartition
from downpour.cluster.simulate.process import Counts, VirtualProcess, VirtualTask, speeds
from downpour.cluster.simulate.ways import Local, Queue, Remote
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.applied_set import WAITING
from downpour.paramserver.partition.staleness import Histogram
from downpour.shuffler.plan.keys import stream_key

if TYPE_CHECKING:
    from downpour.cluster.simulate.arithmetic import VirtualArithmetic

TURNS_BEFORE = 3
"""Turns of every slot that are simulated before anything is counted."""
TURNS_COUNTED = 4
"""Turns of every slot over which figures are taken, unless a number of seconds is given."""
FEWEST_UPDATES = 5_000
"""That figures are taken over, however few slots there are."""
UNLIMITED_EPOCHS = 1 << 20
EVENTS_BETWEEN_LOOKS = 2_000
STUCK_AFTER_S = 1_000.0


@dataclass(eq=False)
class _Member:
    """A process of replicas as the controller sees it."""

    replicas: tuple[int, ...]
    machine: int
    step_times: float
    decoding: Queue
    process: VirtualProcess | None = None
    lines: Sequence[Line] = ()
    alive: bool = True
    """It runs, or would if all partitions did."""


class Simulation:
    """One run. `forecast` runs it; so does `learning`, which gives it arithmetic."""

    def __init__(self, inputs: Inputs, arithmetic: VirtualArithmetic | None = None) -> None:
        """Nothing has begun.

        With `arithmetic` it computes gradients and weights, and ends after the epochs of its
        configuration; without, it goes on as long as one likes.
        """
        self._inputs = inputs
        self._config, machines = inputs.config, inputs.machines
        self.clock = clock = Clock()
        self._rng = random.Random(stream_key(inputs.seed, "simulation"))
        count = machines.machines + machines.server_machines
        self._machines = [
            Processors(clock, machines.processors - (machines.background if i == 0 else 0.0))
            for i in range(count)
        ]
        self._wires = [Wire(clock, machines.bytes_per_s, machines.latency_s) for _ in range(count)]
        self._arithmetic, epochs = arithmetic, self._config.policy.epochs
        if arithmetic is None:
            plan = make_plan(self._config, inputs.num_rows)
            self._plan, epochs = dataclasses.replace(plan, past_bound="rekey"), UNLIMITED_EPOCHS
        else:
            self._plan = arithmetic.plan
        unit = step_config(self._config).batches_per_push
        self.book = LeaseBook(self._plan, epochs, unit=unit)
        self._first_server = machines.machines if machines.server_machines else 0
        updates = update_config(self._config, self._plan)
        self.partitions = [
            VirtualPartition(
                i,
                config=updates,
                clock=clock,
                processors=self._machines[self._machine_of(i)],
                costs=inputs.costs,
                rng=self._rng,
                num_partitions=inputs.num_partitions,
                make_keeper=None if arithmetic is None else arithmetic.keeper(i, updates),
            )
            for i in range(inputs.num_partitions)
        ]
        self._shufflers = [Queue(self._machines[0]) for _ in range(self._config.data.shufflers)]
        self._evaluator = Queue(self._machines[0])
        self.counts = Counts()
        self._members = self._make_members()
        self._member_of = {r: m for m in self._members for r in m.replicas}
        self._holding = dict.fromkeys(self._member_of, 0)
        self.deaths = 0
        """Processes and partitions that have died."""

    def _machine_of(self, partition: int) -> int:
        servers = self._inputs.machines.server_machines
        return self._first_server + partition % servers if servers else 0

    def _make_members(self) -> list[_Member]:
        machines, costs = self._inputs.machines, self._inputs.costs
        replicas = self._config.replicas
        total = machines.machines * machines.processors
        count = num_processes(replicas, total)
        self._width = num_threads(self._config.policy, count, total)
        spread = speeds(count, costs.speed_spread, self._inputs.seed)
        members = []
        for i in range(count):
            machine = i % machines.machines
            slow = self._rng.random() < costs.slow_share
            members.append(
                _Member(
                    replicas=tuple(range(i, replicas.replicas, count)),
                    machine=machine,
                    step_times=spread[i] * (costs.slow_times if slow else 1.0),
                    decoding=Queue(self._machines[machine]),
                )
            )
        return members

    # What goes on all the time

    def start(self) -> None:
        """Have everybody begin."""
        for member in self._members:
            self._connect(member)
            self._fate(self._inputs.faults.process_mtbf_s, functools.partial(self._kill, member))
        for partition in self.partitions:
            self._fate(
                self._inputs.faults.partition_mtbf_s,
                functools.partial(self._kill_partition, partition),
            )
        if self._inputs.costs.score_s:
            self.clock.after(self._config.policy.evaluate_every_s, self._score)
        self.clock.after(self._config.policy.checkpoint_every_s, self._save)
        self._grant()

    def _connect(self, member: _Member) -> None:
        inputs, machine = self._inputs, member.machine
        process = VirtualProcess(
            replicas=member.replicas,
            config=step_config(self._config),
            clock=self.clock,
            processors=self._machines[machine],
            costs=inputs.costs,
            width=self._width,
            step_times=member.step_times,
            rng=self._rng,
            counts=self.counts,
            finished=lambda task: self._on_finished(member, process, task),
            batch_size=self._config.data.batch_size,
            learner=self._arithmetic,
        )
        costs, share = inputs.costs, 1 / inputs.num_partitions
        sizes = costs.gradient_bytes * share, costs.weights_bytes * share
        ways: list[Local | Remote] = []
        for partition in self.partitions:
            there = self._machine_of(partition.index)
            if there == machine:
                ways.append(Local(partition, process))
            else:
                wires = self._wires[machine], self._wires[there]
                ways.append(Remote(partition, process, *wires, *sizes))
        member.process, member.lines = process, [way.line for way in ways]
        process.start(ways)

    def _grant(self) -> None:
        if not all(p.up for p in self.partitions):
            return
        for replica, member in self._member_of.items():
            if member.process is None:
                continue
            while self._holding[replica] < self._config.replicas.queued_windows:
                lease = self.book.grant(replica)
                if lease is None:
                    return  # everything is done, or lent
                self._holding[replica] += 1
                self._deliver(member, replica, lease)

    def _deliver(self, member: _Member, replica: int, lease: Lease) -> None:
        """A window's rows: read by every shuffler, then decoded by the process, then queued."""
        costs, process = self._inputs.costs, member.process
        size = len(lease.batches)
        parts = len(self._shufflers)
        missing = [parts]

        def decoded() -> None:
            if process is not None and member.process is process:
                process.assign(replica, lease)

        def read() -> None:
            missing[0] -= 1
            if not missing[0]:
                member.decoding.add(costs.beside_s * size, decoded)

        def begin() -> None:
            for shuffler in self._shufflers:
                shuffler.add(costs.read_s * size / parts, read)

        self.clock.after(self._inputs.call_s, begin)

    def _on_finished(self, member: _Member, process: VirtualProcess, task: VirtualTask) -> None:
        if member.process is not process:
            return
        if task.unsettled:
            self.book.reconcile(task.lease.id, self._settled(task.lease.epoch))
        else:
            self.book.complete(task.lease.id, task.replica)
        self._holding[task.replica] -= 1
        self._grant()

    def _settled(self, epoch: int) -> npt.NDArray[np.bool_]:
        flags = [p.ledger.applied.flags(epoch) != WAITING for p in self.partitions]
        settled: npt.NDArray[np.bool_] = np.logical_and.reduce(flags)
        return settled

    def _score(self) -> None:
        began_s = self.clock.now_s

        def scored() -> None:
            next_s = next_evaluation_s(self._config.policy, began_s, self.clock.now_s)
            self.clock.at(max(next_s, self.clock.now_s), self._score)

        self._evaluator.add(self._inputs.costs.score_s, scored)

    def _save(self) -> None:
        if all(p.up for p in self.partitions):
            for partition in self.partitions:
                partition.save()
        self.clock.after(self._config.policy.checkpoint_every_s, self._save)

    # Deaths

    def _fate(self, mean_s: float, die: Callable[[], None]) -> None:
        if mean_s != float("inf"):
            self.clock.after(self._rng.expovariate(1 / mean_s), die)

    def _drop(self, member: _Member) -> None:
        """A process ends, or lets go of its windows: what is not settled of them is lent again."""
        if member.process is None:
            return
        member.process.end()
        member.process = None
        for line, partition in zip(member.lines, self.partitions, strict=True):
            partition.leave(line)
        for replica in member.replicas:
            self._holding[replica] = 0
            for lease in self.book.lost(replica):
                self.book.reconcile(lease.id, self._settled(lease.epoch))

    def _kill(self, member: _Member) -> None:
        self.deaths += 1
        self._drop(member)
        member.alive = False

        def back() -> None:
            member.alive = True
            if all(p.up for p in self.partitions):
                self._connect(member)
                self._grant()
            self._fate(self._inputs.faults.process_mtbf_s, functools.partial(self._kill, member))

        self.clock.after(self._inputs.faults.restart_s, back)
        self._grant()

    def _kill_partition(self, partition: VirtualPartition) -> None:
        self.deaths += 1
        partition.die()
        for member in self._members:
            self._drop(member)

        def back() -> None:
            partition.start()
            if all(p.up for p in self.partitions):
                for epoch in range(self.book.epochs_entered):
                    self.book.reopen(epoch, self._settled(epoch))
                for member in self._members:
                    if member.alive:
                        self._connect(member)
                self._grant()
            self._fate(
                self._inputs.faults.partition_mtbf_s,
                functools.partial(self._kill_partition, partition),
            )

        self.clock.after(self._inputs.faults.restart_s, back)

    # Figures

    def forecast(
        self,
        *,
        seconds: float | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Forecast:
        """Run until it is steady, and then for `seconds`, or until there are enough updates.

        `progress` is told of the updates done, and of those wanted in all, now and then. Raises
        `UserError` where members die so often that nothing is trained.
        """
        slots = self._config.replicas.replicas * self._config.replicas.steps.concurrent_steps
        before = TURNS_BEFORE * slots
        wanted = max(FEWEST_UPDATES, TURNS_COUNTED * slots)
        self.start()
        self.until(lambda: self._applied >= before, progress, before + wanted)
        begin = self._reading()
        for partition in self.partitions:
            partition.seen = Histogram()
        self.counts = Counts()
        for member in self._members:
            if member.process is not None:
                member.process.counts = self.counts
        if seconds is None:
            enough = begin.applied + wanted
            self.until(lambda: self._applied >= enough, progress, before + wanted)
        else:
            end_s = self.clock.now_s + seconds
            self.until(lambda: self.clock.now_s >= end_s, progress, 0)
        self.check()
        return self._forecast(begin, self._reading())

    @property
    def _applied(self) -> int:
        """Updates of the partition that has had fewest, those lost again included."""
        return min(p.applied for p in self.partitions)

    @property
    def _settled_batches(self) -> int:
        """Mini-batches that every partition has settled, and that no death has taken back."""
        return min(p.ledger.applied.num_applied for p in self.partitions)

    def until(
        self, ready: Callable[[], bool], progress: Callable[[int, int], None], total: int
    ) -> None:
        """Go on until `ready`, which is asked before each event.

        `progress` is told of the updates done, and of `total`, now and then.

        Raises:
            UserError: members die so often that nothing is trained.
        """
        best, since_s, events = self._settled_batches, self.clock.now_s, 0
        while not ready():
            self.clock.advance()
            events += 1
            if events % EVENTS_BETWEEN_LOOKS:
                continue
            progress(self._applied, total)
            if self._settled_batches > best:
                best, since_s = self._settled_batches, self.clock.now_s
            elif self.clock.now_s - since_s > STUCK_AFTER_S:
                raise UserError(
                    f"nothing was trained for {STUCK_AFTER_S:,.0f} s of simulated time: members "
                    "die before they have done anything; give them a longer life "
                    "(--process-mtbf-s, --partition-mtbf-s) or a shorter --restart-s"
                )

    def check(self) -> None:
        """Assert the invariants of everything that has any."""
        self.book.check()
        for partition in self.partitions:
            partition.keeper.check()

    def _reading(self) -> Reading:
        return Reading(
            now_s=self.clock.now_s,
            applied=self._applied,
            settled=self._settled_batches,
            busy_s=tuple(m.busy_s for m in self._machines),
            deaths=self.deaths,
        )

    def _forecast(self, begin: Reading, end: Reading) -> Forecast:
        machines, seconds = self._inputs.machines, end.now_s - begin.now_s
        staleness = Histogram()
        for partition in self.partitions:
            staleness = staleness.merge(partition.seen)

        def busy(machine: int) -> float:
            used = (end.busy_s[machine] - begin.busy_s[machine]) / seconds
            return (used + (machines.background if machine == 0 else 0.0)) / machines.processors

        counts = self.counts
        return Forecast(
            replicas=self._config.replicas.replicas,
            concurrent_steps=self._config.replicas.steps.concurrent_steps,
            processes=len(self._members),
            partitions=len(self.partitions),
            updates=end.applied - begin.applied,
            seconds=seconds,
            updates_per_s=(end.applied - begin.applied) / seconds,
            batches_per_s=(end.settled - begin.settled) / seconds,
            staleness=staleness,
            push_ms=1e3 * counts.push_s / max(1, counts.pushes),
            pull_wait_ms=1e3 * counts.pull_s / max(1, counts.steps),
            busy=(busy(0), busy(self._first_server)),
            deaths=end.deaths - begin.deaths,
            repeated=sum(p.ledger.outcomes[Outcome.DUPLICATE] for p in self.partitions),
        )
