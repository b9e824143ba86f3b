"""A parameter server and processes of replicas without Ray: for a machine that has none.

The actors are the product's own classes, each in a process of the standard library's, or all of
them in this one on threads. There is no controller: nobody is replaced. Needs PyTorch, NumPy and
PyArrow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from downpour.models.flat import FlatModel
from downpour.paramserver.actor import PartitionActor
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.spec import PartitionSpec, PartitionStart
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.shuffler.processors import processors
from downpour.workers.actor import ReplicasActor
from downpour.workers.replica.replicas import Joined, Window, WindowReport
from downpour.workers.replica.windows import join_rows
from downpour.workers.spec import ReplicasSpec

KEY = bytes(range(32))
CALLS = 64
"""Calls that a process runs at a time."""
DEADLINE_S, END_DEADLINE_S = 90.0, 15.0
KEPT = 4
"""Mini-batches that synthetic replicas train on, over and over."""

Batch = tuple[Tensor, Tensor]


class Actor(Protocol):
    """An object somewhere, whose methods are called."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method; gives what it returns, or raises what it raised."""

    def end(self) -> None:
        """End it, with whatever it does."""


class Here:
    """An object in this process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Make it with these arguments."""
        self._object = make(*arguments)
        self._pool = ThreadPoolExecutor(CALLS)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """See `Actor.call`."""
        return self._pool.submit(getattr(self._object, method), *arguments)

    def end(self) -> None:
        """See `Actor.end`."""
        self._object.stop()
        self._pool.shutdown(cancel_futures=True)


class Child:
    """An object in a process of its own, which ends with this one."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Have it made with these arguments; the first call waits for that."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._numbers, self._calls = itertools.count(), dict[int, Future[Any]]()
        self._lock = threading.Lock()
        threading.Thread(target=self._collect, daemon=True).start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """See `Actor.call`."""
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = future
            self._pipe.send((number, method, arguments))
        return future

    def _collect(self) -> None:
        try:
            while True:
                number, value, error = self._pipe.recv()
                future = self._calls.pop(number)
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(RuntimeError(error))
        except (EOFError, OSError):
            for future in list(self._calls.values()):
                future.set_exception(RuntimeError("the process has ended"))

    def end(self) -> None:
        """See `Actor.end`."""
        self._process.terminate()
        self._process.join(END_DEADLINE_S)
        self._process.kill()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's side: makes the object, and answers calls until the pipe is closed."""
    lock = threading.Lock()
    try:
        made, problem = make(*arguments), None
    except Exception as error:
        made, problem = None, f"{type(error).__name__}: {error}"

    def answer(number: int, method: str, given: tuple[Any, ...]) -> None:
        value, text = None, problem
        if problem is None:
            try:
                value = getattr(made, method)(*given)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
        with lock:
            pipe.send((number, value, text))

    with ThreadPoolExecutor(CALLS) as pool:
        while True:
            try:
                call = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            pool.submit(answer, *call)


class SyntheticReplicas(ReplicasActor):
    """A process of replicas whose mini-batches are there already: nothing is read or decoded."""

    def __init__(self, spec: ReplicasSpec, batch_size: int) -> None:
        """Make a few mini-batches."""
        super().__init__(spec)
        generator = torch.Generator().manual_seed(1)
        shape, classes = spec.model.image.input_shape, spec.model.num_classes
        self._batches = [
            Joined(
                torch.rand(batch_size, *shape, generator=generator),
                torch.randint(classes, (batch_size,), generator=generator),
            )
            for _ in range(KEPT)
        ]
        self._joined: dict[tuple[int, int], list[Joined]] = {}

    def train(self, replica: int, batches: tuple[int, ...]) -> WindowReport:
        """Train a replica on these mini-batches of epoch 0."""

        def load(place: int, count: int) -> list[Joined]:
            key = batches[place] % KEPT, count
            if key not in self._joined:
                parts = [self._batches[(key[0] + i) % KEPT] for i in range(count)]
                self._joined[key] = join_rows(parts)
            return self._joined[key]

        window = Window(epoch=0, batches=batches, load=load)
        return self._replicas.assign(replica, window).result()

    def computed(self) -> int:
        """Mini-batches computed so far."""
        return sum(self._replicas.steps.values())

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU: the most that tensors took, that PyTorch held, and all that is used."""
        if self._device is None or self._device.where.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "tensors": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "used_on_gpu": total - free,
        }


class Server:
    """All partitions of a model."""

    def __init__(
        self, actor: type[Here | Child], model: FlatModel, update: UpdateConfig, count: int | None
    ) -> None:
        """Start them, from the model's weights.

        Args:
            actor: where they are.
            model: on the processor.
            update: how a push changes them.
            count: how many; None: as many as a run would have.
        """
        layout, weights = model.layout, model.weights.numpy()
        if count is None:
            count = ServerConfig().num_partitions(layout.num_parameters, processors())
        statistics = model.initial.table(model.statistics).numpy()
        self.actors: list[Actor] = []
        for part in split(
            num_parameters=layout.num_parameters,
            num_features=layout.num_features,
            num_decayed=layout.decayed,
            num_partitions=count,
            num_frozen=layout.num_parameters - layout.trained,
        ):
            start = PartitionStart(
                key=KEY,
                origin=weights[part.start : part.stop].copy(),
                statistics=statistics[:, part.feature_start : part.feature_stop],
            )
            spec = PartitionSpec(partition=part, update=update)
            self.actors.append(actor(PartitionActor, spec, start))

    def endpoints(self) -> list[Endpoint]:
        """Where replicas find them."""
        calls = [each.call("endpoint") for each in self.actors]
        return [call.result(DEADLINE_S) for call in calls]

    def reports(self) -> list[Any]:
        """A `PartitionReport` of each."""
        calls = [each.call("report") for each in self.actors]
        return [call.result(DEADLINE_S) for call in calls]

    def end(self) -> None:
        """End them all."""
        for each in self.actors:
            each.end()


def check_once(reports: Sequence[Any], batches: int, *, may_refuse: bool = False) -> None:
    """Check that each partition settled every mini-batch once.

    Args:
        reports: a `PartitionReport` of each.
        batches: mini-batches that were settled.
        may_refuse: whether one that was refused counts as settled; otherwise none may be.

    Raises:
        RuntimeError: a partition applied more or fewer, or one twice.
    """
    for report in reports:
        refused = report.refused if may_refuse else 0
        wanted = (batches - refused, 0, refused)
        if (report.batches_applied, report.duplicates, report.refused) != wanted:
            raise RuntimeError(
                f"of {batches} mini-batches partition {report.index} applied "
                f"{report.batches_applied}, refused {report.refused}, saw {report.duplicates} twice"
            )


class Workers:
    """Processes of replicas, connected to a server."""

    def __init__(
        self,
        actor: type[Here | Child],
        spec: ReplicasSpec,
        count: int,
        endpoints: Sequence[Endpoint],
        make: Callable[..., Any] = ReplicasActor,
        *arguments: Any,
    ) -> None:
        """Spread the spec's replicas over so many processes, and start these."""
        self.members = [spec.replicas[i::count] for i in range(count)]
        self.actors: list[Actor] = [
            actor(make, dataclasses.replace(spec, replicas=members), *arguments)
            for members in self.members
        ]
        connected = [each.call("connect", endpoints, KEY) for each in self.actors]
        for call in connected:
            call.result(DEADLINE_S)

    def of(self, replica: int) -> Actor:
        """The process of a replica."""
        found = [a for a, m in zip(self.actors, self.members, strict=True) if replica in m]
        return found[0]

    def end(self) -> None:
        """Have them stop, and end them."""
        for call in [each.call("stop") for each in self.actors]:
            with contextlib.suppress(Exception):  # it may be gone, or hang
                call.result(END_DEADLINE_S)
        for each in self.actors:
            each.end()
