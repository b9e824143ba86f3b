"""Replicas and shufflers as processes of their own, and what lends windows to them.

What the controller, Ray and the partitions do in a run is done here by pipes and a dict, so that
real processes can be killed (-9) many times in seconds. Who has trained on what is kept as
partitions keep it: by mini-batch, the first time only.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import pyarrow as pa

from downpour.cluster.controller.leases.book import Lease, LeaseBook
from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.delivery import Part, join
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.lending"])
DEADLINE_S = 30.0

Name = tuple[int, int]
"""Epoch and index of a mini-batch."""


def content(batch: pa.RecordBatch) -> bytes:
    """All that a mini-batch holds."""
    images = batch.column("image").field("bytes").to_pylist()
    return b"|".join([*images, str(batch.column("label").to_pylist()).encode()])


def shuffler_main(pipe: Connection, index: int, data: str, plan: Plan, count: int) -> None:
    """Deliver parts until the pipe closes."""
    actor = ShufflerActor(
        ShufflerSpec(index=index, num_shufflers=count, data=data, plan=plan, num_classes=100)
    )
    while True:
        try:
            epoch, batches = pipe.recv()
        except EOFError:
            return
        part = actor.deliver(epoch, batches)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.batch.schema) as writer:
            writer.write_batch(part.batch)
        pipe.send((sink.getvalue().to_pybytes(), part.positions, part.lengths, part.rows))


def replica_main(pipe: Connection) -> None:
    """Tell of each mini-batch of the windows that come, one after the other."""
    while True:
        try:
            epoch, batches, plain = pipe.recv()
        except EOFError:
            return
        parts = []
        for data, positions, lengths, rows in plain:
            with pa.ipc.open_stream(data) as stream:
                (batch,) = stream
            parts.append(Part(batch=batch, positions=positions, lengths=lengths, rows=rows))
        delivery = join(parts)
        at = 0
        for index, length in zip(batches, delivery.lengths.tolist(), strict=True):
            pipe.send((epoch, index, content(delivery.batch.slice(at, length))))
            at += length
        pipe.send(None)


@dataclass
class Member:
    """A process and our end of its pipe."""

    process: Any
    pipe: Connection
    lease: Lease | None = None
    parts: dict[int, Any] = field(default_factory=dict)
    leaving: bool = False
    asked: list[int] = field(default_factory=list)
    """Of a shuffler: the replicas whose parts it has been asked for, in order."""


def start(target: Callable[..., None], *arguments: Any) -> Member:
    """Start a process with a pipe."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return Member(process, ours)


class Lending:
    """A run: leases out, mini-batches in, members that come, go and die."""

    def __init__(
        self, data: str, plan: Plan, epochs: int, replicas: int, shufflers: int, seed: int
    ) -> None:
        self.plan, self.epochs = plan, epochs
        self.book = LeaseBook(plan, epochs)
        self.applied: dict[Name, bytes] = {}
        self.duplicates = self.kills = self.joined = 0
        self.random = random.Random(seed)
        self._data, self._num_shufflers = data, shufflers
        self.shufflers = {i: self._start_shuffler(i) for i in range(shufflers)}
        self.replicas: dict[int, Member] = {}
        for _ in range(replicas):
            self.join()

    def _start_shuffler(self, index: int) -> Member:
        return start(shuffler_main, index, self._data, self.plan, self._num_shufflers)

    def join(self) -> None:
        """A replica more, under a number of its own."""
        self.replicas[self.joined] = start(replica_main)
        self.joined += 1

    def leave(self) -> None:
        """A replica takes no more leases, and goes after the one that it has."""
        self.replicas[self.random.choice(sorted(self.replicas))].leaving = True

    def kill_replica(self) -> None:
        """kill -9: what it had told still counts, the rest is lent again."""
        number = self.random.choice(sorted(self.replicas))
        member = self.replicas[number]
        self._kill(member)
        while member.pipe.poll():  # as a partition reads what a dead replica has sent
            try:
                told = member.pipe.recv()
            except (EOFError, ConnectionResetError):
                break
            if told is not None:
                self._apply(*told)
        self._gone(number)

    def kill_shuffler(self) -> None:
        """kill -9: windows that it had not delivered are lent again; another takes its place."""
        index = self.random.choice(sorted(self.shufflers))
        self._kill(self.shufflers[index])
        self.shufflers[index].pipe.close()
        for member in self.replicas.values():
            if member.lease is not None and len(member.parts) < self._num_shufflers:
                self.book.give_back(member.lease.id)
                member.lease = None
        for other in self.shufflers.values():
            other.asked = [-1] * len(other.asked)  # their answers are of no use any more
        self.shufflers[index] = self._start_shuffler(index)

    def _kill(self, member: Member) -> None:
        os.kill(member.process.pid, signal.SIGKILL)
        member.process.join(DEADLINE_S)
        assert member.process.exitcode == -signal.SIGKILL
        self.kills += 1

    def _gone(self, number: int) -> None:
        member = self.replicas.pop(number)
        member.pipe.close()
        for other in self.shufflers.values():
            other.asked = [-1 if asked == number else asked for asked in other.asked]
        for lease in self.book.lost(number):
            self.book.reconcile(lease.id, self._handled(lease.epoch))

    def _handled(self, epoch: int) -> np.ndarray:
        handled = np.zeros(self.plan.num_batches, dtype=np.bool_)
        handled[[index for e, index in self.applied if e == epoch]] = True
        return handled

    def _apply(self, epoch: int, index: int, told: bytes) -> None:
        before = self.applied.setdefault((epoch, index), told)
        assert before == told, f"mini-batch ({epoch}, {index}) came with two contents"

    def turn(self) -> None:
        """Lend what can be lent, and take in what has come."""
        for number, member in list(self.replicas.items()):
            if member.lease is None and member.leaving:
                self._gone(number)
                member.process.join(DEADLINE_S)
                assert member.process.exitcode == 0
            elif member.lease is None and (lease := self.book.grant(number)) is not None:
                member.lease, member.parts = lease, {}
                for shuffler in self.shufflers.values():
                    shuffler.pipe.send((lease.epoch, lease.batches))
                    shuffler.asked.append(number)
        pipes = {m.pipe: ("replica", n) for n, m in self.replicas.items()}
        pipes |= {m.pipe: ("shuffler", n) for n, m in self.shufflers.items()}
        ready = wait(list(pipes), DEADLINE_S)
        assert ready or not self.replicas, "nothing has come for too long"
        for pipe in ready:
            kind, number = pipes[pipe]
            if kind == "shuffler":
                self._delivered(number, pipe.recv())
            else:
                self._told(number, pipe.recv())
        self.book.check()

    def _delivered(self, index: int, part: Any) -> None:
        number = self.shufflers[index].asked.pop(0)
        member = self.replicas.get(number)
        if member is None or member.lease is None:
            return
        member.parts[index] = part
        if len(member.parts) == self._num_shufflers:
            parts = [member.parts[i] for i in range(self._num_shufflers)]
            member.pipe.send((member.lease.epoch, member.lease.batches, parts))

    def _told(self, number: int, told: Any) -> None:
        member = self.replicas[number]
        if told is not None:
            self.duplicates += told[:2] in self.applied
            self._apply(*told)
            return
        assert member.lease is not None
        assert self.book.complete(member.lease.id, number)
        member.lease = None

    def close(self) -> None:
        """End every process."""
        for member in [*self.replicas.values(), *self.shufflers.values()]:
            member.pipe.close()
            member.process.join(DEADLINE_S)
