"""The backend on Ray: places actors, starts them, calls them, and replaces those that die.

No gradient passes through here. Ray carries windows of rows to the replicas, and calls that come a
few times a second at the most. Not here: decisions (`cluster.controller`), nodes (`nodes`),
shufflers (`shufflers`), and what Ray's exceptions mean (`translation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from downpour.cluster.config.derive import spares
from downpour.cluster.config.resolve import RunSpecs
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.protocol.backend import (
    Done,
    FollowerLost,
    PartitionLost,
    PendingCall,
    ProcessLost,
    ShufflerLost,
)
from downpour.cluster.ray_backend.leavers import Ends, Leavers
from downpour.cluster.ray_backend.members import (
    Members,
    Survivors,
    partition_role,
    process_role,
)
from downpour.cluster.ray_backend.nodes import Nodes, leaving
from downpour.cluster.ray_backend.shufflers import Shufflers
from downpour.cluster.ray_backend.spares import PartitionSpare, ReplicasSpare
from downpour.cluster.ray_backend.translation import translated
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.cluster.run.provenance import write_about
from downpour.paramserver.access import Access
from downpour.paramserver.actor import FollowerActor, PartitionActor
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.spec import Origin, Papers, PartitionSpec, PartitionStart, Restore
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.network.security import Credentials, issue
from downpour.workers.actor import EvaluatorActor, ReplicasActor
from downpour.workers.messages import Keeping

START_DEADLINE_S = 120.0
PARTITION_CALLS = 4
"""That a partition answers at a time."""

EVALUATOR_CALLS = 2
"""That the evaluator answers at a time: it scores, and says how far it is."""

EVALUATOR = "evaluator"
"""What it is for, in the notes of `members`."""

Parts = Sequence[tuple[Any, Any]]
"""Parts of a window that are being delivered, each with the shuffler that does it."""


class RayBackend:
    """The actors of one run on the Ray cluster that this driver is connected to."""

    def __init__(
        self,
        *,
        config: RunConfig,
        specs: RunSpecs,
        weights: npt.NDArray[np.float32],
        statistics: npt.NDArray[np.float64],
        key: bytes,
        nodes: Nodes,
        resumed: Checkpoint | None,
        store: CheckpointStore,
        members: Members,
        survivors: Survivors | None = None,
    ) -> None:
        """Start the partitions, shufflers, replicas and the evaluator; none of them is waited for.

        Those that have outlived their driver (`survivors`) are not started again.

        If one machine has fewer processors than these want, only the first process of replicas
        starts now: each takes a processor for a second, to import PyTorch, and training can begin
        with one. The evaluator does not wait: if it imported PyTorch beside replicas that keep
        every processor busy, the first score would come seconds late.
        """
        self._config, self._specs, self._nodes = config, specs, nodes
        self._weights, self._store = weights, store
        self._statistics, self._members = statistics, members
        papers = None if survivors is None else survivors.papers
        self._key = key if papers is None else papers.key
        self._access, self._credentials = _network(
            config.server.network, specs.partitions[0], papers
        )
        self.num_partitions = len(specs.partitions)
        self.processes = tuple(spec.replicas for spec in specs.processes)
        record = specs.partitions[0].record
        if record is not None:
            write_about(Path(record), threads=specs.resolved.threads)
        count = len(self.processes)
        living = {} if survivors is None else dict(survivors.others)
        self._spares: dict[type, tuple[Any, Any]] = {}
        """Processes that can become actors of a class, each with the call that says that it can."""
        for actor in (ReplicasActor, PartitionActor):
            if (spare := living.pop(_spare_role(actor), None)) is not None:
                self._spares[actor] = (spare, spare.is_ready.remote())
        self._partitions: list[Any] = [None] * self.num_partitions
        self._followers: list[Any] = [None] * self.num_partitions
        self._spawned_partitions: list[Any] = (
            [self._spawn_partition(i, resumed) for i in range(self.num_partitions)]
            if survivors is None
            else list(survivors.partitions)
        )
        self._endpoints: dict[int, Endpoint] = {}
        self._evaluator: Any = None
        self._process_actors: list[Any] = [None] * count
        enough = nodes.several or specs.resolved.processors >= self.num_partitions + count
        self._spawned: list[Any] = [
            living.pop(process_role(self.processes[i]), None)
            or (self._spawn_process(i) if enough or i == 0 else None)
            for i in range(count)
        ]
        self._spawned_evaluator = living.pop(EVALUATOR, None) or self._spawn_evaluator()
        self._shufflers = Shufflers(config, specs.shufflers, nodes, members, living)
        for actor in living.values():  # replicas that came later, see `downpour scale`
            members.kill(actor)
        self._kinds: dict[PendingCall, tuple[type[Exception], str, Parts]] = {}
        self._averages: dict[PendingCall, list[Any]] = {}
        """What a scoring gets from each partition, if weights are averaged."""
        self._arrivals: dict[PendingCall, int] = {}
        """Calls whose answer is the endpoint of a partition."""
        self._moving_shufflers: PendingCall = None
        self._ends = Ends()

    def endpoints(self) -> list[Endpoint]:
        """The endpoints of all partitions, each of which has been up."""
        return [self._endpoints[i] for i in range(self.num_partitions)]

    def start_partition(self, index: int, checkpoint: Checkpoint | None) -> PendingCall:
        """Start, or start again, a partition; done once it can be reached."""
        self._members.kill(self._partitions[index])  # it may be out of reach only
        self.stop_follower(index)
        actor = self._spawned_partitions[index]
        if actor is None:
            actor = self._spawn_partition(index, checkpoint)
        self._spawned_partitions[index] = None
        self._partitions[index] = actor
        pending = self._partition_call(index, actor.endpoint.remote())
        self._arrivals[pending] = index
        return pending

    def start_follower(self, index: int, number: int) -> PendingCall:
        """Start a follower of a partition that is up; gives its endpoint once it has the state."""
        self.stop_follower(index)
        origin = self._start_from(self._endpoints[index])
        self._members.will_follow(index, number)
        self._followers[index] = follower = self._members.start(
            FollowerActor,
            PARTITION_CALLS,
            self._specs.partitions[index],
            dataclasses.replace(origin, follower=number),
            scheduling=self._nodes.beside(self._partitions[index], index),
            unhurried=not self._nodes.several,  # elsewhere a node that is to leave may wait for it
        )
        what = f"the follower of partition {index}"
        return self._call(follower.endpoint.remote(), FollowerLost, what)

    def watch_primary(self, index: int) -> PendingCall:
        """Gives, in words, that a partition's follower does not hear it; done once that is so."""
        what = f"the follower of partition {index}"
        return self._call(self._followers[index].watch_primary.remote(), FollowerLost, what)

    def let_alone(self, index: int, number: int) -> PendingCall:
        """Have a partition answer without its follower `number`, which will not take its place."""
        return self._partition_call(index, self._partitions[index].let_alone.remote(number))

    def stop_follower(self, index: int) -> None:
        """End a partition's follower, if it has one."""
        self._members.kill(self._followers[index])
        self._followers[index] = None

    def promote(self, index: int) -> PendingCall:
        """End a partition and have its follower take its place; done once it can be reached."""
        # Should it live all the same, the follower fences it off.
        self._members.kill(self._partitions[index])
        self._partitions[index], self._followers[index] = self._followers[index], None
        pending = self._partition_call(index, self._partitions[index].promote.remote())
        self._arrivals[pending] = index
        return pending

    def start_process(self, index: int) -> PendingCall:
        """Start, or start again, a process of replicas; done once it is connected."""
        actor = self._spawned[index]
        if actor is None:
            actor = self._spawn_process(index)
        self._spawned[index] = None
        # It may be out of reach only: it must not come back beside the new one.
        self._members.kill(self._process_actors[index])
        self._process_actors[index] = actor
        return self.reconnect_process(index)

    def add_process(self, replicas: tuple[int, ...]) -> int:
        """Make room for one more process of replicas; gives its index."""
        self.processes = (*self.processes, replicas)
        self._process_actors.append(None)
        self._spawned.append(None)
        return len(self.processes) - 1

    def make_spares(self) -> None:
        """Have a process ready for each kind that `--spares` asks for.

        On several nodes this does nothing: each would need a spare of its own. Nor does it if the
        only one is to leave.
        """
        wanted = spares(self._config)
        if self._nodes.several or (wanted != "none" and leaving()):
            return
        if wanted != "none":
            self._make_spare(ReplicasActor, ReplicasSpare, self._calls_of_replicas())
        if wanted == "all":
            self._make_spare(PartitionActor, PartitionSpare, PARTITION_CALLS)

    def _make_spare(self, actor: type, kind: type, max_concurrency: int) -> None:
        if actor not in self._spares:
            spare = self._members.start(kind, max_concurrency, scheduling="DEFAULT", unhurried=True)
            self._members.has_role(_spare_role(actor), spare)
            self._spares[actor] = (spare, spare.is_ready.remote())

    def _take_spare(self, actor: type) -> Any:
        """Return a spare for an actor, if there is one; one that still imports would come later
        than a new process.
        """
        if self._nodes.several or actor not in self._spares:
            return None
        spare, ready = self._spares[actor]
        if not ray.wait([ready], timeout=0, fetch_local=False)[0]:
            return None
        del self._spares[actor]
        return spare

    def _start_soon(
        self, actor: type, max_concurrency: int, *arguments: Any, **options: Any
    ) -> Any:
        """Have a spare become this actor, or start a new one."""
        spare = self._take_spare(actor)
        if spare is None:
            return self._members.start(actor, max_concurrency, *arguments, **options)
        spare.assume.remote(*arguments)
        return spare

    def _calls_of_replicas(self) -> int:
        """Windows that a process of replicas may have at a time, and two calls besides."""
        members = max(map(len, self.processes))
        return members * self._config.replicas.queued_windows + 2

    def stop_process(self, index: int) -> None:
        """End a process of replicas that has no windows."""
        self._members.kill(self._process_actors[index])
        self._process_actors[index] = None

    def departing(self) -> Departing:
        """The members on nodes that are to leave, by what Ray knows now."""
        leavers = Leavers.look(self._nodes.driver)
        if leavers is None:
            return Departing()
        processes = leavers.among(self._process_actors)
        room = self._nodes.free_gpu_places() if processes else None
        staying = 0 if room is None else max(0, len(processes) - room)
        return Departing(
            processes=processes[: len(processes) - staying],
            partitions=leavers.among(self._partitions),
            followers=leavers.among(self._followers),
            shufflers=len(leavers.among(self._shufflers.actors)),
            evaluator=bool(leavers.among([self._evaluator])),
            driver=leavers.has_driver,
            crowded=staying,
            remaining_s=leavers.remaining_s(self._ends),
        )

    def move_shufflers(self) -> PendingCall:
        """Start shufflers in place of those on nodes that are to leave; gives their number."""
        leavers, actors = Leavers.look(self._nodes.driver), self._shufflers.actors
        going = [] if leavers is None else [actors[i] for i in leavers.among(actors)]
        self._moving_shufflers = self._shufflers.move(going)
        return self._call(self._moving_shufflers, ShufflerLost, "a shuffler")

    def reconnect_process(self, index: int) -> PendingCall:
        """Have a process that runs drop its windows and connect to the partitions anew."""
        actor = self._process_actors[index]
        call = actor.connect.remote(self.endpoints(), self._key, self._access)
        return self._call(call, ProcessLost, f"the process of {self._names(index)}")

    def start_evaluator(self) -> PendingCall:
        """Start the evaluator; done once it is connected."""
        self._members.kill(self._evaluator)
        actor = self._spawned_evaluator
        if actor is None:
            actor = self._spawn_evaluator(unhurried=True)
        self._spawned_evaluator = None
        self._evaluator = actor
        return self.reconnect_evaluator()

    def reconnect_evaluator(self) -> PendingCall:
        """Have the evaluator connect to the partitions anew."""
        call = self._evaluator.connect.remote(self.endpoints(), self._key, self._access)
        return self._call(call, ProcessLost, "the evaluator")

    def run_window(self, replica: int, lease: Lease) -> PendingCall:
        """Deliver a window to a replica and train on it; gives a `WindowReport`."""
        delivering = self._shufflers.deliver(lease.epoch, lease.batches)
        index = next(i for i, members in enumerate(self.processes) if replica in members)
        call = self._process_actors[index].run_window.remote(
            replica, lease.epoch, lease.batches, *(part for part, _ in delivering)
        )
        what = f"the process of {self._names(index)}"
        return self._call(call, ProcessLost, what, delivering)

    def find_late_shufflers(self, window: PendingCall) -> int:
        """Note the shufflers that still owe a part of a window; gives how many those are."""
        _, _, parts = self._kinds[window]
        late = []
        for part, shuffler in parts:
            ready, _ = ray.wait([part], timeout=0, fetch_local=False)
            if not ready:
                late.append(shuffler)
                self._shufflers.lost(shuffler)
        return len(late)

    def replace_shufflers(self) -> int:
        """Replace every shuffler that failed to deliver, or was found late; gives their number."""
        return self._shufflers.replace()

    def report(self, partition: int) -> PendingCall:
        """Gives a `PartitionReport`."""
        return self._partition_call(partition, self._partitions[partition].report.remote())

    def flags(self, partition: int, epochs: tuple[int, ...]) -> PendingCall:
        """Gives the state of every mini-batch of these epochs."""
        return self._partition_call(partition, self._partitions[partition].flags.remote(epochs))

    def snapshot(self, partition: int, folder_uri: str) -> PendingCall:
        """Write a snapshot; gives a `SnapshotFile`."""
        call = self._partitions[partition].snapshot.remote(folder_uri)
        return self._partition_call(partition, call)

    def evaluate(self, keeping: Keeping) -> PendingCall:
        """Score the current weights, and keep them as `keeping` says; gives an `Evaluation`."""
        averages: list[Any] = []
        if self._config.server.ema is not None:
            averages = [partition.average.remote() for partition in self._partitions]
        call = self._evaluator.evaluate.remote(keeping, *averages)
        self._averages[call] = averages
        return self._call(call, ProcessLost, "the evaluator")

    def evaluator_progress(self) -> PendingCall:
        """Gives how many mini-batches the evaluator has scored in its life."""
        return self._call(self._evaluator.progress.remote(), ProcessLost, "the evaluator")

    def wait(self, calls: Collection[PendingCall], timeout_s: float) -> list[Done]:
        """Wait for at least one of the calls, at most `timeout_s`; gives those that are done."""
        if not calls:
            return []
        pending = list(calls)
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
        done = [self._outcome(call, *self._kinds.pop(call)) for call in ready]
        if self._shufflers.some_leave:
            parts = [part for _, _, parts in self._kinds.values() for part in parts]
            self._shufflers.end_leaving([shuffler for _, shuffler in parts])
        return [self._noted(outcome) for outcome in done]

    def _noted(self, done: Done) -> Done:
        """Note what comes of a call that changes who is who."""
        if done.call == self._moving_shufflers and done.error is None:
            return dataclasses.replace(done, value=self._shufflers.arrived())
        index = self._arrivals.pop(done.call, None)
        if index is not None and done.error is None:
            self._endpoints[index] = done.value
            self._members.has_role(partition_role(index), self._partitions[index])
        return done

    def stop(self) -> None:
        """Stop every actor."""
        self._shufflers.stop()
        actors = [*self._process_actors, *self._spawned, self._evaluator, self._spawned_evaluator]
        actors += [*(spare for spare, _ in self._spares.values()), *self._followers]
        for actor in [*actors, *self._partitions, *self._spawned_partitions]:
            self._members.kill(actor)
        self._members.forget()

    def _spawn_partition(self, index: int, checkpoint: Checkpoint | None) -> Any:
        spec = self._specs.partitions[index]
        part = spec.partition
        origin: Origin = self._weights[part.start : part.stop]
        statistics = self._statistics[:, part.feature_start : part.feature_stop]
        if checkpoint is not None:
            file = checkpoint.files[index]
            uri = f"{self._store.folder_uri(checkpoint.number)}/{file.name}"
            origin = Restore(uri=uri, sha256=file.sha256)
        return self._start_soon(
            PartitionActor,
            PARTITION_CALLS,
            spec,
            self._start_from(origin, statistics),
            scheduling=self._nodes.scheduling("partitions", index),
        )

    def _start_from(
        self, origin: Origin, statistics: npt.NDArray[np.float64] | None = None
    ) -> PartitionStart:
        return PartitionStart(
            key=self._key,
            origin=origin,
            statistics=statistics,
            credentials=self._credentials,
            client_credentials=self._access.credentials,
        )

    def _spawn_process(self, index: int) -> Any:
        # A process that came later is like the first, with other replicas.
        spec = dataclasses.replace(self._specs.processes[0], replicas=self.processes[index])
        process = self._start_soon(
            ReplicasActor,
            self._calls_of_replicas(),
            spec,
            **self._nodes.options("replicas", index),
        )
        self._members.has_role(process_role(self.processes[index]), process)
        return process

    def _spawn_evaluator(self, *, unhurried: bool = False) -> Any:
        evaluator = self._members.start(
            EvaluatorActor,
            EVALUATOR_CALLS,
            self._specs.evaluator,
            scheduling=self._nodes.scheduling("evaluator", 0),
            unhurried=unhurried,
        )
        self._members.has_role(EVALUATOR, evaluator)
        return evaluator

    def _names(self, index: int) -> str:
        return f"replicas {', '.join(map(str, self.processes[index]))}"

    def _partition_call(self, partition: int, call: Any) -> PendingCall:
        return self._call(call, PartitionLost, f"partition {partition}")

    def _call(self, call: Any, lost: type[Exception], what: str, parts: Parts = ()) -> PendingCall:
        self._kinds[call] = (lost, what, parts)
        return call

    def _outcome(self, call: Any, lost: type[Exception], what: str, parts: Sequence[Any]) -> Done:
        averages = self._averages.pop(call, ())
        try:
            return Done(call=call, value=ray.get(call, timeout=START_DEADLINE_S))
        except Exception as error:
            for index, average in enumerate(averages):
                if (
                    failed := _failure_of(average, PartitionLost, f"partition {index}")
                ) is not None:
                    return Done(call=call, error=failed)
            for part, shuffler in parts:
                if (failed := self._delivery_error(part, shuffler)) is not None:
                    return Done(call=call, error=failed)
            return Done(call=call, error=translated(error, lost, what))

    def _delivery_error(self, part: Any, shuffler: Any) -> Exception | None:
        """Why a part of a window could not be delivered, if it was that."""
        failure = _failure_of(part, ShufflerLost, "a shuffler")
        if isinstance(failure, ShufflerLost):
            self._shufflers.lost(shuffler)
        return failure


def _failure_of(call: Any, lost: type[Exception], what: str) -> Exception | None:
    """What a call has failed of by now, if it has."""
    try:
        ready, _ = ray.wait([call], timeout=0, fetch_local=False)
        if ready:
            ray.get(call, timeout=START_DEADLINE_S)
    except Exception as error:
        return translated(error, lost, what)
    return None


def _spare_role(actor: type) -> str:
    return f"spare of {actor.__name__}"


def _network(
    config: NetworkConfig, spec: PartitionSpec, papers: Papers | None
) -> tuple[Access, Credentials | None]:
    """How clients reach the partitions, and the partitions' credentials.

    Credentials are made here if need be, unless the partitions have outlived their driver.
    """
    access = Access(transport=config.transport, wire=config.wire)
    if papers is not None:
        access = dataclasses.replace(access, credentials=papers.client_credentials)
        return access, papers.credentials
    if spec.listen is None or not config.encrypt:
        return access, None
    credentials = issue()
    access = dataclasses.replace(access, credentials=credentials.clients)
    return access, credentials.partitions
