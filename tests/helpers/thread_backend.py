"""The controller's backend on threads of this process: real partitions, replicas and sockets.

What Ray does for a real run is done by a thread pool; actors are the same classes, unwrapped.
Faults are scripted: `kill_process` takes a process's connections away and fails its calls, as a
kill -9 would, and lets a new one be started; `kill_partition` does so to a partition.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.resolve import Facts, resolve
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.protocol.backend import (
    Done,
    FollowerLost,
    PartitionLost,
    ProcessLost,
    ShufflerLost,
    WriteFailed,
)
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.paramserver.access import Access
from downpour.paramserver.actor import FollowerActor, PartitionActor
from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.spec import Origin, PartitionStart, Restore
from downpour.paramserver.transport.network.security import Credentials, issue
from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.processors import processors
from downpour.workers.actor import EvaluatorActor, ReplicasActor
from downpour.workers.messages import Keeping

AnyPartition = TypeVar("AnyPartition", bound=PartitionActor)
KEY = bytes(range(32))
FOLLOWER_DEADLINE_S = 30.0
"""For a follower to apply a push: threads of one process wait for each other as no process does."""


class ThreadBackend:
    """Implements `cluster.controller.backend.Backend`."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        *,
        num_processes: int = 2,
        resumed: Checkpoint | None = None,
        store: CheckpointStore | None = None,
    ) -> None:
        self.config, self.plan = config, plan
        self.spec = model_spec(config)
        model = self.spec.build_flat("cpu")
        layout = model.layout
        num_processes = min(num_processes, config.replicas.replicas)
        self.specs = resolve(
            config,
            Facts(
                num_rows=plan.num_rows,
                shard_rows=plan.shard_rows,
                num_parameters=layout.num_parameters,
                num_features=layout.num_features,
                num_decayed=layout.decayed,
                num_frozen=layout.num_parameters - layout.trained,
                stops=tuple(entry.stop for entry in layout.entries),
                num_partitions=config.server.num_partitions(layout.num_parameters, processors()),
                num_processors=num_processes,
            ),
        )
        self.partitions_layout = tuple(spec.partition for spec in self.specs.partitions)
        self.num_partitions = len(self.partitions_layout)
        self.processes = tuple(spec.replicas for spec in self.specs.processes)
        self.access, self.credentials = self._network()
        self.weights = model.weights.numpy().copy()
        self.statistics = model.initial.table(model.statistics).numpy()
        self.store = store
        self.partitions: list[Any] = [None] * self.num_partitions
        self.partition_starts = [0] * self.num_partitions
        self.followers: list[FollowerActor | None] = [None] * self.num_partitions
        self.corpses_of_partitions: list[PartitionActor] = []
        self.followers_made = 0
        self.leaving = Departing()
        self.followers_to_kill: set[int] = set()
        """Partitions whose next follower dies before it has their state."""
        self.shuffler: ShufflerActor | None = self._new_shuffler()
        self.pool = ThreadPoolExecutor(32)
        self.actors: list[ReplicasActor | None] = [None] * num_processes
        self.dead: set[int] = set()
        self.corpses: list[ReplicasActor | None] = []
        self.evaluator: EvaluatorActor | None = None
        self.windows_run = self.spares_made = 0
        self.stuck: threading.Event | None = None
        """While there, a shuffler's deliveries wait for it."""
        self._deliveries: dict[Any, threading.Event] = {}
        self.on_window: Any = None
        """Called with (backend, replica, lease) before a window is run: where faults are put."""
        self.hold: Callable[[], object] | None = None
        """Called by each window's own thread before it is run, which may wait: the run goes on."""
        self._lock = threading.Lock()

    def record_into(self, folder: Path) -> None:
        """Have partitions that start from now on record their pushes."""
        specs = self.specs.partitions
        recorded = tuple(replace(spec, record=str(folder)) for spec in specs)
        self.specs = replace(self.specs, partitions=recorded)

    def _new_shuffler(self) -> ShufflerActor:
        return ShufflerActor(replace(self.specs.shufflers[0], num_shufflers=1))

    def _network(self) -> tuple[Access, Credentials | None]:
        config = self.config.server.network
        access = Access(transport=config.transport, wire=config.wire)
        if config.listens_on(1) is None or not config.encrypt:
            return access, None
        keys = issue()
        return replace(access, credentials=keys.clients), keys.partitions

    def _start_from(self, origin: Origin, part: Partition | None = None) -> PartitionStart:
        statistics = None
        if part is not None:
            statistics = self.statistics[:, part.feature_start : part.feature_stop]
        return PartitionStart(
            key=KEY, origin=origin, statistics=statistics, credentials=self.credentials
        )

    def _endpoints(self) -> list[Any]:
        return [p.endpoint() for p in self.partitions]

    def start_partition(self, index: int, checkpoint: Checkpoint | None) -> Future[Any]:
        spec = self.specs.partitions[index]

        def run() -> None:
            origin: Origin = self.weights[spec.partition.start : spec.partition.stop]
            if checkpoint is not None:
                assert self.store is not None
                file = checkpoint.files[index]
                uri = f"{self.store.folder_uri(checkpoint.number)}/{file.name}"
                origin = Restore(uri=uri, sha256=file.sha256)
            if self.partitions[index] is not None:
                self.partitions[index].stop()
            self.stop_follower(index)
            actor = PartitionActor(spec, self._start_from(origin, spec.partition))
            self.partitions[index] = _patient(actor)
            self.partition_starts[index] += 1

        return self.pool.submit(run)

    def start_follower(self, index: int, number: int) -> Future[Any]:
        def run() -> Any:
            self.stop_follower(index)
            start = self._start_from(self.partitions[index].endpoint())
            clients = self.access.credentials
            start = replace(start, client_credentials=clients, follower=number)
            if index in self.followers_to_kill:
                self.followers_to_kill.discard(index)
                raise FollowerLost("killed by the test")
            follower = FollowerActor(self.specs.partitions[index], start)
            self.followers[index] = _patient(follower)
            self.followers_made += 1
            return follower.endpoint()

        return self.pool.submit(run)

    def watch_primary(self, index: int) -> Future[Any]:
        follower = self.followers[index]
        if follower is None:  # it has just been ended
            return self.pool.submit(_lost_follower)
        return self.pool.submit(follower.watch_primary)

    def let_alone(self, index: int, number: int) -> Future[Any]:
        return self.pool.submit(self.partitions[index].let_alone, number)

    def stop_follower(self, index: int) -> None:
        follower, self.followers[index] = self.followers[index], None
        if follower is not None:  # which may hang: a process would be killed
            self.corpses_of_partitions.append(follower)

    def promote(self, index: int) -> Future[Any]:
        def run() -> None:
            follower, self.followers[index] = self.followers[index], None
            assert follower is not None
            with self._lock:  # as if it were out of reach: it must be the follower that fences it
                self.corpses_of_partitions.append(self.partitions[index])
            self.partitions[index] = follower
            follower.promote()
            self._stays(partitions=tuple(p for p in self.leaving.partitions if p != index))

        return self.pool.submit(run)

    def start_process(self, index: int) -> Future[Any]:
        def start() -> int:
            spec = replace(self.specs.processes[0], replicas=self.processes[index], num_threads=1)
            actor = ReplicasActor(spec)
            actor.connect(self._endpoints(), KEY, self.access)
            self.actors[index] = actor
            self.dead.discard(index)
            return index

        return self.pool.submit(start)

    def make_spares(self) -> None:
        self.spares_made += 1

    def add_process(self, replicas: tuple[int, ...]) -> int:
        self.processes = (*self.processes, replicas)
        self.actors.append(None)
        return len(self.processes) - 1

    def stop_process(self, index: int) -> None:
        actor = self.actors[index]
        self.actors[index] = None
        if actor is not None:
            actor.stop()

    def reconnect_process(self, index: int) -> Future[Any]:
        def connect() -> int:
            actor = self.actors[index]
            if actor is None:
                raise ProcessLost("killed by the test")
            return actor.connect(self._endpoints(), KEY, self.access)

        return self.pool.submit(connect)

    def reconnect_evaluator(self) -> Future[Any]:
        def connect() -> None:
            assert self.evaluator is not None
            self.evaluator.connect(self._endpoints(), KEY, self.access)

        return self.pool.submit(connect)

    def start_evaluator(self) -> Future[Any]:
        def start() -> None:
            evaluator = EvaluatorActor(self.specs.evaluator)
            evaluator.connect(self._endpoints(), KEY, self.access)
            before, self.evaluator = self.evaluator, evaluator
            if before is not None:
                before.stop()
            self._stays(evaluator=False)

        return self.pool.submit(start)

    def run_window(self, replica: int, lease: Lease) -> Future[Any]:
        index = next(i for i, members in enumerate(self.processes) if replica in members)
        if self.on_window is not None:
            self.on_window(self, replica, lease)
        actor = self.actors[index]

        delivered, stuck, hold = threading.Event(), self.stuck, self.hold

        def run() -> Any:
            if hold is not None:
                hold()
            if stuck is not None:
                stuck.wait()
                raise ShufflerLost("killed by the test")
            if self.shuffler is None:
                raise ShufflerLost("killed by the test")
            delivery = self.shuffler.deliver(lease.epoch, lease.batches)
            delivered.set()
            if actor is None or index in self.dead:
                raise ProcessLost("killed by the test")
            try:
                report = actor.run_window(replica, lease.epoch, lease.batches, delivery)
            except Exception:
                if self.actors[index] is not actor or index in self.dead:
                    raise ProcessLost("killed by the test") from None
                raise
            with self._lock:
                self.windows_run += 1
            return report

        pending = self.pool.submit(run)
        self._deliveries[pending] = delivered
        return pending

    def kill_process(self, index: int) -> None:
        """Cut the process off in the middle of whatever it does."""
        actor = self.actors[index]
        self.dead.add(index)
        self.actors[index] = None
        self.corpses.append(actor)
        if actor is not None and actor._client is not None:
            for connection in actor._client._connections:
                with contextlib.suppress(OSError):
                    connection.socket.shutdown(2)

    def kill_partition(self, index: int) -> None:
        """End a partition where it stands; what it has applied since its snapshot is gone."""
        self.partitions[index].stop()

    def cut_connections(self, index: int) -> None:
        """Take a process's connections away; it lives on."""
        actor = self.actors[index]
        if actor is not None and actor._client is not None:
            actor._client.interrupt()

    def kill_shuffler(self) -> None:
        self.shuffler = None

    def departing(self) -> Departing:
        """What a test says; members that were started since are elsewhere."""
        return self.leaving

    def _stays(self, **what: object) -> None:
        """Note that some members are not on a node that is to leave, or not any more."""
        with self._lock:
            self.leaving = replace(self.leaving, **what)  # type: ignore[arg-type]

    def move_shufflers(self) -> Future[Any]:
        self.shuffler = self._new_shuffler()
        self._stays(shufflers=0)
        return self.pool.submit(lambda: 1)

    def find_late_shufflers(self, window: Future[Any]) -> int:
        return not self._deliveries[window].is_set()

    def replace_shufflers(self) -> int:
        if self.stuck is not None:
            stuck, self.stuck = self.stuck, None
            stuck.set()
            return 1
        if self.shuffler is not None:
            return 0
        self.shuffler = self._new_shuffler()
        return 1

    def report(self, partition: int) -> Future[Any]:
        return self.pool.submit(self.partitions[partition].report)

    def flags(self, partition: int, epochs: tuple[int, ...]) -> Future[Any]:
        return self.pool.submit(self.partitions[partition].flags, epochs)

    def snapshot(self, partition: int, folder_uri: str) -> Future[Any]:
        return self.pool.submit(self.partitions[partition].snapshot, folder_uri)

    def evaluate(self, keeping: Keeping) -> Future[Any]:
        evaluator = self.evaluator
        assert evaluator is not None

        def run() -> Any:
            averaged = self.config.server.ema is not None
            averages = [p.average() for p in self.partitions] if averaged else []
            return evaluator.evaluate(keeping, *averages)

        return self.pool.submit(run)

    def evaluator_progress(self) -> Future[Any]:
        assert self.evaluator is not None
        return self.pool.submit(self.evaluator.progress)

    def wait(self, calls: Collection[Future[Any]], timeout_s: float) -> list[Done]:
        done, _ = wait(calls, timeout_s, return_when=FIRST_COMPLETED)
        return [self._outcome(future) for future in done]

    def _outcome(self, future: Future[Any]) -> Done:
        error = future.exception()
        if error is None:
            return Done(call=future, value=future.result())
        assert isinstance(error, Exception)
        if isinstance(error, ConnectionLost):
            error = PartitionLost(str(error), partition=error.partition)
        elif isinstance(error, DeadlineExceeded):
            error = PartitionLost(str(error))
        elif isinstance(error, OSError):
            error = WriteFailed(str(error))
        return Done(call=future, error=error)

    def stop(self) -> None:
        self._stop_clients()
        for partition in self.partitions:
            if partition is None:
                continue
            partition._server.call(lambda state: state.check())
            partition.stop()
        self._stop_followers()
        self.pool.shutdown(cancel_futures=True)
        self._stop_clients()  # those that were just being started
        self._stop_followers()

    def _stop_clients(self) -> None:
        evaluator, self.evaluator = self.evaluator, None
        for actor in [*self.actors, *self.corpses, evaluator]:
            if actor is not None:
                actor.stop()

    def _stop_followers(self) -> None:
        for index in range(self.num_partitions):
            self.stop_follower(index)
        for partition in self.corpses_of_partitions:
            partition.stop()

    def flags_of(self, partition: int) -> np.ndarray[Any, Any]:
        """Flags of every epoch, uint8 [epochs, q]."""
        epochs = range(self.config.policy.epochs)
        flags = self.partitions[partition].flags(tuple(epochs))
        return np.stack([flags[e] for e in epochs])


def _patient(actor: AnyPartition) -> AnyPartition:
    """Give followers of a partition that has just been made more time than a process would."""
    actor._server._replication._deadline_s = FOLLOWER_DEADLINE_S
    return actor


def _lost_follower() -> None:
    raise FollowerLost("killed by the test")


class Faults:
    """A script of faults: each comes once so many windows have been run, one before a window."""

    def __init__(self, *script: tuple[int, Callable[[ThreadBackend, int], None], int]) -> None:
        """Windows that have been run, what is done then, and to which process or partition."""
        self.left = list(script)
        self._lock = threading.Lock()

    def __call__(self, backend: ThreadBackend, replica: int, lease: Lease) -> None:
        """Called by the backend before each window."""
        with self._lock:
            if not self.left or backend.windows_run < self.left[0][0]:
                return
            _, fault, index = self.left.pop(0)
        fault(backend, index)
