"""One partition, served: a thread that takes pushes off sockets and publishes versions.

The thread owns the partition's state. Everything else that wants to see or change it (`call`) is
run by that thread between two pushes, so there is no lock and no half-applied state to be seen.
Deciding what a push does is `state`'s; moving bytes is `transport`'s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from paramserver.bounded import Admission, Permit, Turn
from paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    ServerError,
)
from paramserver.messages import (
    KEY_BYTES,
    Answer,
    Outcome,
    PermitRequest,
    Push,
    decode_all,
)
from paramserver.partition import Partition
from paramserver.rounds import Rounds
from paramserver.rules import updates_in_place
from paramserver.snapshot import Snapshot
from paramserver.state import Arrival, PartitionState, UpdateConfig, Version
from paramserver.transport.frames import as_bytes
from paramserver.transport.greeting import Admitted, NetworkListen, Porter
from paramserver.transport.local import Endpoint, Listener, ServerSide, machine
from paramserver.transport.memory import PublishedWeights, check_room
from paramserver.transport.network import NetworkSide
from paramserver.transport.patience import Patience

T = TypeVar("T")
log = logging.getLogger(__name__)

GREETING_DEADLINE_S = 10.0
STALL_DEADLINE_S = 60.0
"""How long a connection over the network may stay in the middle of a frame without a byte."""
SWEEP_EVERY_S = 0.5
MAX_CONNECTIONS = 4096
PUSHES_A_TURN = 16
"""Pushes taken from one connection before the next has its turn."""


class _Command(Generic[T]):
    """A function that waits for its turn on the state."""

    def __init__(self, function: Callable[[PartitionState], T]) -> None:
        self.future: Future[T] = Future()
        self._function = function

    def run(self, state: PartitionState) -> None:
        try:
            result = self._function(state)
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(result)


class _Held(NamedTuple):
    """A push that waits for its turn, where steps begin by permit."""

    push: Push
    gradient: Tensor
    moments: Tensor


class PartitionServer:
    """Serves one partition until `stop`."""

    def __init__(
        self,
        *,
        partition: Partition,
        config: UpdateConfig,
        key: bytes,
        weights: Tensor | None = None,
        restore: Snapshot | None = None,
        network: NetworkListen | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start from `weights` [num_parameters] as version 0, or go on from a snapshot.

        Replicas on this machine reach it through shared memory; others over the network, if
        `network` says where to listen. Raises `BadConfiguration` for weights or a key of another
        length, or an address that is not to be had, and `BadSnapshot`.
        """
        if len(key) != KEY_BYTES:
            raise BadConfiguration(f"the run's key has {len(key)} bytes: give {KEY_BYTES}")
        if weights is not None and weights.shape != (partition.num_parameters,):
            raise BadConfiguration(
                f"partition {partition.index} was given weights of shape {list(weights.shape)}: "
                f"give [{partition.num_parameters}]"
            )
        if restore is not None:
            restore.check(partition)
        self.partition = partition
        self._key = key
        self._clock = clock
        kept = config.policy.versions_kept
        check_room(partition.num_parameters, kept)
        self._published = PublishedWeights(
            partition.num_parameters, partition.num_features, kept=kept
        )
        current = self._published.versions[0]
        current.statistics[1:].fill_(1.0)  # as torch's: mean 0, variance 1 before the first push
        if weights is not None:
            current.weights.copy_(weights)
        self._state = PartitionState(partition, config, current)
        if restore is not None:
            try:
                self._state.load(restore.meta, restore.tensors)
            except BaseException:
                self._published.close()
                raise
        self._published.publish(self._state.weights_version)
        self._in_place = updates_in_place(partition.num_parameters)
        self._slots = [
            (as_bytes(v.weights), as_bytes(v.statistics)) for v in self._published.versions
        ]
        self._porter = None
        if network is not None:
            try:
                self._porter = Porter(
                    network, partition=partition, key=key, admit=self._admit, clock=clock
                )
            except BaseException:
                self._published.close()
                raise
        self._listener = Listener()
        self.endpoint = Endpoint(
            partition=partition,
            machine=machine(),
            address=self._listener.address,
            network=self._porter.address if self._porter else None,
        )
        self._sides: dict[int, ServerSide | NetworkSide] = {}
        policy = config.policy
        self._admission: Admission[_Held] | Rounds[_Held] | None = None
        self._take, self._take_network = self._take_at_once, self._take_network_at_once
        if policy.staleness_policy == "bounded":
            self._admission = Admission(policy.staleness_bound)
        elif policy.staleness_policy == "synchronous":
            self._admission = Rounds(policy.round_steps or policy.round_pushes or 1)
        if self._admission is not None:
            self._take, self._take_network = self._hold, self._hold_network
        self._next_sweep_s = -math.inf
        self._admitted: queue.SimpleQueue[Admitted] = queue.SimpleQueue()
        self._scratch = torch.empty(0)
        """Where a gradient that came as 16 bits is float32 again."""
        self._dropped: Counter[str] = Counter()
        self.first_update_at: float | None = None
        """Unix time of the first update since `start`."""
        self.last_update_at: float | None = None
        """Unix time of the latest update since `start`."""
        self._commands: queue.SimpleQueue[_Command[Any]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Of `_commands`, `_admitted` and `_wake`, which end with the thread.
        self._door = threading.Lock()
        self._ended = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"partition-{partition.index}", daemon=True
        )

    def start(self) -> PartitionServer:
        """Start serving."""
        self._thread.start()
        if self._porter is not None:
            self._porter.start()
        return self

    def call(self, function: Callable[[PartitionState], T], deadline_s: float = 60.0) -> T:
        """Run `function` on the state between two pushes, and return what it returns.

        Raises what ended the serving thread, if anything did; `ConnectionLost` after `stop`; and
        `DeadlineExceeded`, in which case `function` may still run.
        """
        command = _Command(function)
        with self._door:
            if self._ended:
                raise self._failure or self._stopped()
            self._commands.put(command)
            os.eventfd_write(self._wake, 1)
        try:
            return command.future.result(deadline_s)
        except FutureTimeoutError:
            if command.future.done():
                raise  # the function's own
            raise DeadlineExceeded(
                f"partition {self.partition.index} has not answered for {deadline_s} s"
            ) from None

    @property
    def failure(self) -> BaseException | None:
        """What ended the serving thread, if anything did."""
        return self._failure

    def dropped(self) -> dict[str, int]:
        """Connections closed by us, by reason; those that were refused at the greeting, too."""
        if self._porter is None:
            return dict(self._dropped)
        return dict(Counter(dict(self._dropped)) + Counter(dict(self._porter.dropped)))

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._sides)

    def stop(self, deadline_s: float = 10.0) -> None:
        """Stop serving, and close every connection. Does nothing the second time."""
        if self._thread.ident is None:  # never started
            self._end()
            return
        with self._door:
            if not self._ended:
                self._stopping = True
                os.eventfd_write(self._wake, 1)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(
                f"partition {self.partition.index} has not stopped for {deadline_s} s"
            )

    def _run(self) -> None:
        try:
            torch.set_num_threads(1)
            self._loop()
        except BaseException as error:
            self._failure = error
            log.exception("partition %d stopped serving", self.partition.index)
        finally:
            self._end()

    def _end(self) -> None:
        with self._door:
            if self._ended:
                return
            self._ended = True
            os.close(self._wake)
        if self._porter is not None:
            self._porter.stop()
        with contextlib.suppress(queue.Empty):
            while True:
                self._admitted.get_nowait().channel.socket.close()
        for side in self._sides.values():
            side.close()
        self._sides.clear()
        self._listener.close()
        self._published.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait().future.set_exception(self._failure or self._stopped())

    def _stopped(self) -> ConnectionLost:
        return ConnectionLost(f"partition {self.partition.index} was stopped")

    def _loop(self) -> None:
        epoll, patience = select.epoll(), Patience()
        listening = self._listener.socket.fileno()
        epoll.register(listening, select.EPOLLIN)
        epoll.register(self._wake, select.EPOLLIN)
        with contextlib.closing(epoll):
            while not self._stopping:
                for fd, _ in patience.wait(epoll, 1.0):
                    if fd == listening:
                        self._accept(epoll)
                    elif fd == self._wake:
                        self._obey(epoll)
                    else:
                        self._serve(epoll, fd)
                self._drop_silent(epoll)
                if self._admission is not None:
                    self._go_on(epoll, self._admission)

    def _accept(self, epoll: select.epoll) -> None:
        while True:
            try:
                peer = self._listener.accept()
            except ServerError as error:
                self._dropped[type(error).__name__] += 1
                return  # whoever waits behind it wakes us again
            if peer is None:
                return
            if len(self._sides) >= MAX_CONNECTIONS:
                self._dropped["too many connections"] += 1
                peer.close()
                continue
            self._sides[peer.fileno()] = ServerSide(peer, self._clock())
            epoll.register(peer.fileno(), select.EPOLLIN)

    def _admit(self, admitted: Admitted) -> None:
        """Called by the porter, on its thread."""
        with self._door:
            if self._ended:
                admitted.channel.socket.close()
                return
            self._admitted.put(admitted)
            os.eventfd_write(self._wake, 1)

    def _seat(self, epoll: select.epoll, admitted: Admitted) -> None:
        peer = admitted.channel.socket
        if len(self._sides) >= MAX_CONNECTIONS:
            self._dropped["too many connections"] += 1
            peer.close()
            return
        self._sides[peer.fileno()] = NetworkSide(admitted, self.partition, self._clock())
        epoll.register(peer.fileno(), select.EPOLLIN)

    def _obey(self, epoll: select.epoll) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while True:
                self._seat(epoll, self._admitted.get_nowait())
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.run(self._state)

    def _serve(self, epoll: select.epoll, fd: int) -> None:
        side = self._sides[fd]
        try:
            if isinstance(side, NetworkSide):
                self._serve_network(epoll, side)
                return
            if not side.greeted:
                side.greet(self.partition, self._published, self._key)
                return
            for _ in range(PUSHES_A_TURN):
                data = side.receive()
                if data is None:
                    return
                self._take(side, data)
        except ConnectionLost:
            self._drop(epoll, fd, None)
        except (ServerError, OSError) as error:
            # As text: a record that is kept would keep the error's frames, and all they map.
            log.warning("partition %d closed a connection: %s", self.partition.index, str(error))
            self._drop(epoll, fd, type(error).__name__)

    def _take_at_once(self, side: ServerSide, data: bytes) -> None:
        arrivals: list[Arrival] = []
        for push in decode_all(data):
            if not isinstance(push, Push):
                raise MalformedMessage(f"{type(push).__name__} in place of a push")
            views, count, box = side.views, len(push.batches), push.mailbox
            if views is None or box >= len(views.gradients) or count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            arrivals.append((push, views.gradients[box], views.moments[box][:count]))
        at_once = 1 if self._in_place else len(arrivals)  # readers wait for what is written over
        answers: list[Answer] = []
        for first in range(0, len(arrivals), at_once):
            answers += self._apply_all(arrivals[first : first + at_once])
        side.answer(answers)

    def _serve_network(self, epoll: select.epoll, side: NetworkSide) -> None:
        side.allow()
        while (push := side.next()) is not None:
            if not side.is_float32 and len(self._scratch) < self.partition.num_parameters:
                self._scratch = torch.empty(self.partition.num_parameters)
            moments = side.moments[: len(push.batches)]
            self._take_network(side, push, side.gradient(self._scratch), moments)
        if side.asks:
            if self._admission is None:
                raise MalformedMessage("a permit is asked for, and none is needed")
            for box in side.asks:
                self._admission.ask((side.socket.fileno(), box))
            side.asks.clear()
        self._send(epoll, side)

    def _take_network_at_once(
        self, side: NetworkSide, push: Push, gradient: Tensor, moments: Tensor
    ) -> None:
        side.answer(self._apply(push, gradient, moments))

    def _send(self, epoll: select.epoll, side: NetworkSide) -> None:
        while True:
            if side.pulls and not side.sending:
                slot = self._published.current_slot
                side.send_weights(slot, self._state.weights_version, *self._slots[slot])
            all_sent = side.flush()  # answers and weights at once: each call wakes the peer
            if not all_sent or not side.pulls:
                break
        if side.watches_writable == all_sent:
            side.watches_writable = not all_sent
            writable = 0 if all_sent else select.EPOLLOUT
            epoll.modify(side.socket.fileno(), select.EPOLLIN | writable)

    def _apply(self, push: Push, gradient: Tensor, moments: Tensor) -> Answer:
        return self._apply_all([(push, gradient, moments)])[0]

    def _apply_all(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        state, answers = self._state, []
        version, before = state.version, state.weights_version
        outcomes = state.apply_all(arrivals, self._room)
        for (push, _, _), outcome in zip(arrivals, outcomes, strict=True):
            version += outcome is Outcome.APPLIED
            answers.append(Answer(mailbox=push.mailbox, outcome=outcome, version=version))
        if state.weights_version > before:
            self._published.commit(state.weights_version)
            self.last_update_at = time.time()
            if self.first_update_at is None:
                self.first_update_at = self.last_update_at
        return answers

    def _room(self) -> Version:
        """Where the next version goes: where the latest one is, unless somebody is reading it."""
        slot = self._published.begin([side.pinned for side in self._sides.values()])
        for side in self._sides.values():
            if isinstance(side, NetworkSide):
                side.detach(slot)  # nothing to do, except where all slots are pinned
        return self._published.versions[slot]

    def _hold(self, side: ServerSide, data: bytes) -> None:
        """Take in a packet where steps begin by permit; `_go_on` applies what it may."""
        assert self._admission is not None
        fd, views = side.socket.fileno(), side.views
        for message in decode_all(data):
            if not isinstance(message, Push | PermitRequest):
                raise MalformedMessage(f"{type(message).__name__} in place of a push")
            box = message.mailbox
            if views is None or box >= len(views.gradients):
                raise MalformedMessage(f"a {type(message).__name__} of mailbox {box}")
            if isinstance(message, PermitRequest):
                self._admission.ask((fd, box))
                continue
            count = len(message.batches)
            if count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            held = _Held(message, views.gradients[box], views.moments[box][:count])
            self._admission.push((fd, box), message.version, held)

    def _hold_network(
        self, side: NetworkSide, push: Push, gradient: Tensor, moments: Tensor
    ) -> None:
        assert self._admission is not None
        # The connection's next push is received where this one lies.
        held = _Held(push, gradient.clone(), moments.clone())
        self._admission.push((side.socket.fileno(), push.mailbox), push.version, held)

    def _go_on(self, epoll: select.epoll, admission: Admission[_Held] | Rounds[_Held]) -> None:
        """Apply every push whose turn it is, and give every permit that there is."""
        answers: dict[int, list[Answer]] = {}
        while True:
            while (due := self._due(admission)) is not None:
                fd, box = due.key
                if isinstance(due, Permit):
                    version = self._state.version
                    answer = Answer(mailbox=box, outcome=Outcome.PERMITTED, version=version)
                else:
                    answer = self._apply(*due.push)
                answers.setdefault(fd, []).append(answer)
            if not answers:
                return
            fd, batch = answers.popitem()
            self._tell(epoll, fd, batch)  # where it is gone, others may go on

    def _due(self, admission: Admission[_Held] | Rounds[_Held]) -> Permit | Turn[_Held] | None:
        return admission.next(self._state.version, self._state.weights_version)

    def _tell(self, epoll: select.epoll, fd: int, answers: list[Answer]) -> None:
        side = self._sides[fd]
        try:
            if isinstance(side, ServerSide):
                side.answer(answers)
                return
            for answer in answers:
                side.answer(answer)
            self._send(epoll, side)
        except (ServerError, OSError) as error:
            gone = isinstance(error, ConnectionLost)
            self._drop(epoll, fd, None if gone else type(error).__name__)

    def _drop_silent(self, epoll: select.epoll) -> None:
        now_s = self._clock()
        if now_s < self._next_sweep_s:
            return
        self._next_sweep_s = now_s + SWEEP_EVERY_S
        late: list[tuple[int, str]] = []
        for fd, side in self._sides.items():
            if isinstance(side, NetworkSide):
                if side.stalled_since(now_s) < now_s - STALL_DEADLINE_S:
                    late.append((fd, "stalled"))
            elif not side.greeted and side.since_s < now_s - GREETING_DEADLINE_S:
                late.append((fd, "no hello"))
        for fd, reason in late:
            self._drop(epoll, fd, reason)

    def _drop(self, epoll: select.epoll, fd: int, reason: str | None) -> None:
        if reason is not None:
            self._dropped[reason] += 1
        epoll.unregister(fd)
        self._sides.pop(fd).close()
        if self._admission is not None:
            self._admission.leave(fd)
