"""The backend on Ray: places actors, starts them, reaches them, and replaces those that die.

No gradient passes through here: Ray carries windows of rows to the replicas, and calls that are
made a few times a second at the most. Who decides is `controller`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.backend import (
    Done,
    PartitionLost,
    ProcessLost,
    RunFailed,
    ShufflerLost,
    Ticket,
)
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.config import NetworkConfig, RunConfig, num_processes
from cluster.errors import user_message
from paramserver.actor import PartitionActor
from paramserver.errors import ConnectionLost, DeadlineExceeded
from paramserver.partition import Partition
from paramserver.transport.access import Access
from paramserver.transport.greeting import NetworkListen
from paramserver.transport.local import Endpoint
from paramserver.transport.security import issue
from shuffler.actor import ShufflerActor
from shuffler.lease import Lease
from shuffler.plan import Plan
from workers.actor import EvaluatorActor, ReplicasActor

NUM_SHUFFLERS = 1
START_DEADLINE_S = 120.0

_LOST = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
    TaskUnschedulableError,
)


class RayBackend:
    """The actors of one run on the Ray cluster that this driver is connected to."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        partitions: Sequence[Partition],
        weights: npt.NDArray[np.float32],
        key: bytes,
        num_processors: int,
        resumed: Checkpoint | None,
        store: CheckpointStore,
    ) -> None:
        """Start the partitions, shufflers and replicas; none of them is waited for."""
        self._config = config
        self._plan = plan
        self._key = key
        self._spec = config.model_spec()
        self.num_partitions = len(partitions)
        cluster: Any = ray  # these have no types
        num_nodes = sum(bool(node["Alive"]) for node in cluster.nodes())
        self._beside_us: Any = "DEFAULT"
        self._anywhere = "DEFAULT"
        if num_nodes > 1:
            num_processors = max(1, int(cluster.cluster_resources().get("CPU", num_processors)))
            # The run's folder and the data may be this machine's only: what touches them stays.
            us = ray.get_runtime_context().get_node_id()
            self._beside_us = NodeAffinitySchedulingStrategy(us, soft=False)
            self._anywhere = "SPREAD"
        self._access, listen = _network(config.server.network, num_nodes)
        count = num_processes(config.replicas, num_processors)
        # Replica r is in process r mod count, so that a warm start spreads over all processes.
        self.processes = tuple(
            tuple(range(i, config.replicas.replicas, count)) for i in range(count)
        )
        self._threads = max(1, num_processors // count)
        update_config = config.update_config(plan)
        self._partitions = []
        for partition in partitions:
            if resumed is None:
                start: tuple[Any, ...] = (weights[partition.start : partition.stop], None, None)
            else:
                file = resumed.files[partition.index]
                uri = f"{store.folder_uri(resumed.number)}/{file.name}"
                start = (None, uri, file.sha256)
            self._partitions.append(
                _start(
                    PartitionActor,
                    4,
                    *(partition, update_config, key, *start, listen),
                    scheduling=self._beside_us,
                )
            )
        self._endpoints: list[Endpoint] | None = None
        self._evaluator: Any = None
        self._process_actors: list[Any] = [None] * count
        self._spawned: list[Any] = [self._spawn_process(i) for i in range(count)]
        self._shufflers = [self._spawn_shuffler(i) for i in range(NUM_SHUFFLERS)]
        self._next_shuffler = 0
        self._kinds: dict[Ticket, tuple[type[Exception], str, Any]] = {}

    def endpoints(self) -> list[Endpoint]:
        """Where the partitions are reached, once all of them are up."""
        if self._endpoints is None:
            calls = [actor.endpoint.remote() for actor in self._partitions]
            done = [self._outcome(c, PartitionLost, "a partition", None) for c in calls]
            for outcome in done:
                if outcome.error is not None:
                    raise outcome.error
            self._endpoints = [outcome.value for outcome in done]
        return self._endpoints

    def start_process(self, index: int) -> Ticket:
        """Start, or start again, a process of replicas; done once it is connected."""
        actor = self._spawned[index]
        if actor is None:
            actor = self._spawn_process(index)
        self._spawned[index] = None
        old = self._process_actors[index]
        if old is not None:  # it may be out of reach only: it must not come back beside the new
            with contextlib.suppress(Exception):
                ray.kill(old)
        self._process_actors[index] = actor
        call = actor.connect.remote(self.endpoints(), self._key, self._access)
        return self._ticket(call, ProcessLost, f"the process of {self._names(index)}")

    def start_evaluator(self) -> Ticket:
        """Start the evaluator; done once it is connected."""
        data = self._config.data
        self._evaluator = _start(
            EvaluatorActor,
            1,
            *(self._spec, data.data, data.eval_split),
            *(self.endpoints(), self._key, self._access),
            scheduling=self._beside_us,
        )
        return self._ticket(self._evaluator.ready.remote(), ProcessLost, "the evaluator")

    def run_window(self, replica: int, lease: Lease) -> Ticket:
        """Deliver a window to a replica and train on it; gives a `WindowReport`."""
        shuffler = self._shufflers[self._next_shuffler % len(self._shufflers)]
        self._next_shuffler += 1
        delivery = shuffler.deliver.remote(lease.epoch, lease.batches)
        index = next(i for i, members in enumerate(self.processes) if replica in members)
        call = self._process_actors[index].run_window.remote(
            replica, lease.epoch, lease.batches, delivery
        )
        return self._ticket(call, ProcessLost, f"the process of {self._names(index)}", delivery)

    def replace_shufflers(self) -> None:
        """Replace every shuffler that is lost."""
        for index, actor in enumerate(self._shufflers):
            try:
                ray.get(actor.ready.remote(), timeout=START_DEADLINE_S)
            except (*_LOST, ray.exceptions.GetTimeoutError):
                with contextlib.suppress(Exception):
                    ray.kill(actor)
                self._shufflers[index] = self._spawn_shuffler(index)

    def report(self, partition: int) -> Ticket:
        """Gives a `PartitionReport`."""
        return self._partition_ticket(partition, self._partitions[partition].report.remote())

    def flags(self, partition: int, epochs: tuple[int, ...]) -> Ticket:
        """Gives the state of every mini-batch of these epochs."""
        return self._partition_ticket(partition, self._partitions[partition].flags.remote(epochs))

    def snapshot(self, partition: int, folder_uri: str) -> Ticket:
        """Write a snapshot; gives a `SnapshotFile`."""
        call = self._partitions[partition].snapshot.remote(folder_uri)
        return self._partition_ticket(partition, call)

    def evaluate(self, best: float | None, best_path: str | None) -> Ticket:
        """Score the current weights, and keep them if they beat `best`; gives an `Evaluation`."""
        call = self._evaluator.evaluate.remote(best, best_path)
        return self._ticket(call, ProcessLost, "the evaluator")

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> list[Done]:
        """Wait for at least one of the tickets, at most `timeout_s`; gives those that are done."""
        if not tickets:
            return []
        calls = list(tickets)
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return [self._outcome(call, *self._kinds.pop(call)) for call in ready]

    def stop(self) -> None:
        """Stop every actor."""
        actors = [*self._process_actors, *self._spawned, *self._shufflers, self._evaluator]
        for actor in [*actors, *self._partitions]:
            if actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    def _spawn_process(self, index: int) -> Any:
        members = self.processes[index]
        steps = self._config.replicas.steps
        windows = len(members) * self._config.replicas.queued_windows
        return _start(
            ReplicasActor,
            windows + 2,
            *(members, self._spec, steps, self._threads),
            scheduling=self._anywhere,
        )

    def _spawn_shuffler(self, index: int) -> Any:
        data = self._config.data
        split, num_classes = data.train_split, self._spec.num_classes
        return _start(
            ShufflerActor,
            2,
            *(index, data.data, split, self._plan, num_classes),
            scheduling=self._beside_us,
        )

    def _names(self, index: int) -> str:
        return f"replicas {', '.join(map(str, self.processes[index]))}"

    def _partition_ticket(self, partition: int, call: Any) -> Ticket:
        return self._ticket(call, PartitionLost, f"partition {partition}")

    def _ticket(self, call: Any, lost: type[Exception], what: str, delivery: Any = None) -> Ticket:
        self._kinds[call] = (lost, what, delivery)
        return call

    def _outcome(self, call: Any, lost: type[Exception], what: str, delivery: Any) -> Done:
        try:
            return Done(ticket=call, value=ray.get(call, timeout=START_DEADLINE_S))
        except Exception as error:
            if delivery is not None and (failed := self._delivery_error(delivery)) is not None:
                return Done(ticket=call, error=failed)
            return Done(ticket=call, error=_translated(error, lost, what))

    def _delivery_error(self, delivery: Any) -> Exception | None:
        """Why a window could not be delivered, if it was that."""
        try:
            ready, _ = ray.wait([delivery], timeout=0, fetch_local=False)
            if ready:
                ray.get(delivery, timeout=START_DEADLINE_S)
        except Exception as error:
            return _translated(error, ShufflerLost, "a shuffler")
        return None


def _network(config: NetworkConfig, num_nodes: int) -> tuple[Access, NetworkListen | None]:
    """How clients reach the partitions, and where those listen; makes keys if need be."""
    access = Access(transport=config.transport, wire_dtype=config.wire_dtype)
    host = config.listens_on(num_nodes)
    if host is None:
        return access, None
    if not config.encrypt:
        return access, NetworkListen(host=host)
    credentials = issue()
    return (
        dataclasses.replace(access, credentials=credentials.clients),
        NetworkListen(host=host, credentials=credentials.partitions),
    )


def _start(actor: type, max_concurrency: int, *arguments: Any, scheduling: Any) -> Any:
    """Start an actor of this class; does not wait for it."""
    # Ray's overloads know neither the options of actors nor a class that is not spelled out.
    remote: Any = ray.remote
    options = remote(actor).options(
        num_cpus=0, max_concurrency=max_concurrency, scheduling_strategy=scheduling
    )
    return options.remote(*arguments)


def _translated(error: Exception, lost: type[Exception], what: str) -> Exception:
    """One of our exceptions for one of Ray's."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, ConnectionLost | DeadlineExceeded):
            return PartitionLost(str(cause))
        if isinstance(cause, _LOST):
            return lost(f"{what} died")
        return error
    if isinstance(error, _LOST):
        message = user_message(error)
        if message is not None:
            return RunFailed(message)
        reason = _init_failure(error)
        return reason if reason is not None else lost(f"{what} died")
    return error


def _init_failure(error: BaseException) -> Exception | None:
    """The user's own error that kept an actor from starting, if it was that."""
    seen: BaseException | None = error
    while seen is not None:
        if (message := user_message(seen)) is not None:
            return RunFailed(message)
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return None
