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
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from paramserver.bounded import Admission
from paramserver.command import Command
from paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    Diverged,
    MalformedMessage,
    ServerError,
)
from paramserver.follower import PACKETS_A_TURN, Following
from paramserver.holding import Held, Holding
from paramserver.messages import KEY_BYTES, Answer, Outcome, Push, decode_all, encode
from paramserver.partition import Partition
from paramserver.permits import Permit, Turn
from paramserver.primary import FOLLOWER_DEADLINE_S, Lead, Source
from paramserver.record import PushRecord
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
from paramserver.transport.replication import Handover

T = TypeVar("T")
log = logging.getLogger(__name__)

GREETING_DEADLINE_S = 10.0
STALL_DEADLINE_S = 60.0
"""How long a connection over the network may stay in the middle of a frame without a byte."""
SWEEP_EVERY_S = 0.5
MAX_CONNECTIONS = 4096
PUSHES_A_TURN = 16
"""Pushes taken from one connection before the next has its turn."""


def _source(side: ServerSide) -> Source:
    assert side.views is not None
    return Source(
        number=side.socket.fileno(),
        num_mailboxes=len(side.views.gradients),
        depth=side.depth,
        fd=side.mailboxes_fd,
    )


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
        follow: Endpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        follower_deadline_s: float = FOLLOWER_DEADLINE_S,
    ) -> None:
        """Start from `weights` [num_parameters] as version 0, or go on from a snapshot.

        Or `follow` the primary at that endpoint, from its state on, until `promote`.

        Replicas on this machine reach it through shared memory; others over the network, if
        `network` says where to listen. A follower of its own is given up when it has not applied a
        push for `follower_deadline_s`. Raises `BadConfiguration` for weights or a key of another
        length, or an address that is not to be had, and `BadSnapshot`; of a follower, what
        `Following` does.
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
        self._following: Following | None = None
        """The way to our primary, until we are it."""
        self._private: list[Tensor] = []
        """Where gradients are copied to that another process reads, too."""
        try:
            if follow is not None:
                self._following = Following(follow, key=key, room=self._state.room())
                restore = self._following.take_state()
            if restore is not None:
                self._state.load(restore.meta, restore.tensors)
        except BaseException:
            self._published.close()
            if self._following is not None:
                self._following.close()
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
        self._holding: Holding | None = None
        self._take, self._take_network = self._take_at_once, self._take_network_at_once
        if policy.staleness_policy == "bounded":
            self._holding = Holding(Admission(policy.staleness_bound))
        elif policy.staleness_policy == "synchronous":
            self._holding = Holding(Rounds(policy.round_steps or policy.round_pushes or 1))
        if self._holding is not None:
            self._take, self._take_network = self._holding.take, self._holding.take_network
        self._next_sweep_s = -math.inf
        self._admitted: queue.SimpleQueue[Admitted] = queue.SimpleQueue()
        self._scratch = torch.empty(0)
        """Where a gradient that came as 16 bits is float32 again."""
        self._dropped: Counter[str] = Counter()
        first_update_at: Any = restore.meta.get("first_update_at") if follow and restore else None
        self.first_update_at: float | None = first_update_at
        """Unix time of the first update since `start`; of a follower, since its primary's."""
        self.last_update_at: float | None = None
        """Unix time of the latest update since `start`."""
        self._commands: queue.SimpleQueue[Command[Any]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._lead: Lead[ServerSide] = Lead(
            partition.index,
            epoll=self._epoll,
            answer=self._answer,
            clock=clock,
            deadline_s=follower_deadline_s,
        )
        # Of `_commands`, `_admitted` and `_wake`, which end with the thread.
        self._door = threading.Lock()
        self._ended = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"partition-{partition.index}", daemon=True
        )

    def record(self, folder: Path) -> None:
        """Record every push in `folder`; to be called before `start`."""
        state = self._state
        state.record = PushRecord(
            folder, self.partition.index, state.version, follows=self._following is not None
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
        command = Command(function)
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
        self._lead.close()
        if self._following is not None:
            self._following.close()
        self._epoll.close()
        self._listener.close()
        self._published.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait().future.set_exception(self._failure or self._stopped())

    def _stopped(self) -> ConnectionLost:
        return ConnectionLost(f"partition {self.partition.index} was stopped")

    def _loop(self) -> None:
        patience, listening = Patience(), self._listener.socket.fileno()
        self._epoll.register(self._following or listening, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        while not self._stopping:
            for fd, _ in patience.wait(self._epoll, 1.0):
                if fd == listening:
                    self._accept()
                elif fd == self._wake:
                    self._obey()
                elif self._following is not None:
                    self._follow(self._following)
                elif self._lead.is_follower(fd):
                    self._lead.hear()
                elif fd in self._sides:  # it may have been dropped in this very turn
                    self._serve(fd)
            self._lead.check()
            self._drop_silent()
            if self._holding is not None:
                self._go_on(self._holding)

    def _accept(self) -> None:
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
            self._epoll.register(peer.fileno(), select.EPOLLIN)

    def _admit(self, admitted: Admitted) -> None:
        """Called by the porter, on its thread."""
        with self._door:
            if self._ended:
                admitted.channel.socket.close()
                return
            self._admitted.put(admitted)
            os.eventfd_write(self._wake, 1)

    def _seat(self, admitted: Admitted) -> None:
        peer = admitted.channel.socket
        if len(self._sides) >= MAX_CONNECTIONS:
            self._dropped["too many connections"] += 1
            peer.close()
            return
        self._sides[peer.fileno()] = NetworkSide(admitted, self.partition, self._clock())
        self._epoll.register(peer.fileno(), select.EPOLLIN)

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while True:
                self._seat(self._admitted.get_nowait())
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.run(self._state)
            self._lead.raise_if_fenced()

    def _serve(self, fd: int) -> None:
        side = self._sides[fd]
        try:
            if isinstance(side, NetworkSide):
                self._serve_network(side)
                return
            if not side.greeted:
                if side.greet(self.partition, self._published, self._key):
                    if side.follows:
                        self._receive_follower(fd)
                    else:
                        self._lead.opened(_source(side))
                return
            for _ in range(PUSHES_A_TURN):
                data = side.receive()
                if data is None:
                    return
                self._take(side, data)
        except ConnectionLost:
            self._drop(fd, None)
        except (ServerError, OSError) as error:
            # As text: a record that is kept would keep the error's frames, and all they map.
            log.warning("partition %d closed a connection: %s", self.partition.index, str(error))
            self._drop(fd, type(error).__name__)

    def _take_at_once(self, side: ServerSide, data: bytes) -> None:
        arrivals: list[Arrival] = []
        for push in decode_all(data):
            if not isinstance(push, Push):
                raise MalformedMessage(f"{type(push).__name__} in place of a push")
            views, count, box = side.views, len(push.batches), push.mailbox
            if views is None or box >= len(views.gradients) or count > side.depth:
                raise MalformedMessage(f"a push of {count} mini-batches from mailbox {box}")
            arrivals.append((push, views.gradients[box], views.moments[box][:count]))
        self._lead.forward(side.socket.fileno(), self._state.version, data)
        at_once = 1 if self._in_place else len(arrivals)  # readers wait for what is written over
        answers: list[Answer] = []
        for first in range(0, len(arrivals), at_once):
            answers += self._apply_all(arrivals[first : first + at_once])
        self._lead.answer(side, answers)

    def _serve_network(self, side: NetworkSide) -> None:
        side.allow()
        while (push := side.next()) is not None:
            if not side.is_float32 and len(self._scratch) < self.partition.num_parameters:
                self._scratch = torch.empty(self.partition.num_parameters)
            moments = side.moments[: len(push.batches)]
            self._take_network(side, push, side.gradient(self._scratch), moments)
        if side.asks:
            if self._holding is None:
                raise MalformedMessage("a permit is asked for, and none is needed")
            self._holding.ask(side.socket.fileno(), side.asks)
            side.asks.clear()
        self._send(side)

    def _take_network_at_once(
        self, side: NetworkSide, push: Push, gradient: Tensor, moments: Tensor
    ) -> None:
        side.answer(self._apply(push, gradient, moments))

    def _send(self, side: NetworkSide) -> None:
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
            self._epoll.modify(side.socket.fileno(), select.EPOLLIN | writable)

    def _apply(self, push: Push, gradient: Tensor, moments: Tensor) -> Answer:
        return self._apply_all([(push, gradient, moments)])[0]

    def _apply_all(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        state, answers = self._state, []
        if (self._lead.has_follower or self._following) and state.config.spoils_gradients:
            arrivals = self._copied(arrivals)
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

    def _copied(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """These, with gradients that may be written over: the others are read by two."""
        while len(self._private) < len(arrivals):
            self._private.append(torch.empty(self.partition.num_parameters))
        return [
            (push, private.copy_(gradient), moments)
            for (push, gradient, moments), private in zip(arrivals, self._private, strict=False)
        ]

    def _room(self) -> Version:
        """Where the next version goes: where the latest one is, unless somebody is reading it."""
        slot = self._published.begin([side.pinned for side in self._sides.values()])
        for side in self._sides.values():
            if isinstance(side, NetworkSide):
                side.detach(slot)  # nothing to do, except where all slots are pinned
        return self._published.versions[slot]

    def _go_on(self, holding: Holding) -> None:
        """Apply every push whose turn it is, and give every permit that there is."""
        answers: dict[int, list[Answer]] = {}
        while True:
            while (due := self._due(holding)) is not None:
                fd, box = due.key
                if isinstance(due, Permit):
                    version = self._state.version
                    answer = Answer(mailbox=box, outcome=Outcome.PERMITTED, version=version)
                else:
                    held = due.push
                    self._lead.forward(fd, self._state.version, encode(held.push))
                    answer = self._apply(*held)
                answers.setdefault(fd, []).append(answer)
            if not answers:
                return
            fd, batch = answers.popitem()
            self._tell(fd, batch)  # where it is gone, others may go on

    def _due(self, holding: Holding) -> Permit | Turn[Held] | None:
        return holding.next(self._state.version, self._state.weights_version)

    def _tell(self, fd: int, answers: Sequence[Answer]) -> None:
        side = self._sides.get(fd)
        if side is None:
            return
        try:
            if isinstance(side, ServerSide):
                self._lead.answer(side, answers)
                return
            for answer in answers:
                side.answer(answer)
            self._send(side)
        except (ServerError, OSError) as error:
            gone = isinstance(error, ConnectionLost)
            self._drop(fd, None if gone else type(error).__name__)

    def _drop_silent(self) -> None:
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
            self._drop(fd, reason)

    def _drop(self, fd: int, reason: str | None) -> None:
        side = self._sides.pop(fd, None)
        if side is None:
            return
        if reason is not None:
            self._dropped[reason] += 1
        self._epoll.unregister(fd)
        side.close()
        if self._holding is not None:
            self._holding.leave(fd)
        self._lead.closed(fd)

    def _answer(self, side: ServerSide, answers: Sequence[Answer]) -> None:
        """Send answers that waited for the follower, if their connection is there yet."""
        fd = side.socket.fileno()
        if self._sides.get(fd) is side:
            try:
                side.answer(answers)
            except ServerError as error:
                self._drop(fd, None if isinstance(error, ConnectionLost) else type(error).__name__)

    # Followers, and primaries that we follow

    @property
    def has_follower(self) -> bool:
        """Whether every push is applied by a second process, too."""
        return self._lead.has_follower

    def _receive_follower(self, fd: int) -> None:
        """Somebody wants to follow: not a connection like the others."""
        self._epoll.unregister(fd)
        peer = self._sides.pop(fd).socket
        if self._porter is not None:
            log.warning("partition %d takes no follower over a network", self.partition.index)
            peer.close()
            return

        def join(memory: Handover) -> None:
            self.call(
                lambda state: self._lead.join(
                    state, peer, memory, self._sources(), first_update_at=self.first_update_at
                )
            )

        self._lead.receive(peer, self._state.room(), join)

    def _sources(self) -> list[Source]:
        return [_source(s) for s in self._sides.values() if isinstance(s, ServerSide) and s.views]

    def promote(self, deadline_s: float = 60.0) -> None:
        """Be the partition, with all that the primary has published or answered.

        Raises `Fenced` where the primary had gone on without us; this follower is of no more use
        then. Does nothing the second time.
        """
        self.call(self._become_primary, deadline_s)

    def _become_primary(self, state: PartitionState) -> None:
        following = self._following
        if following is None:
            return
        following.take_over()
        while self._follow(following):
            pass
        self._following = None
        with contextlib.suppress(OSError, ValueError):  # where the primary's end was seen
            self._epoll.unregister(following)
        following.close()
        if state.record is not None:
            state.record.promote()
        self._epoll.register(self._listener.socket, select.EPOLLIN)

    def _follow(self, following: Following) -> bool:
        """Apply what has come from the primary; false once it is gone and all is applied."""
        for _ in range(PACKETS_A_TURN):
            try:
                packet = following.packet()
            except ConnectionLost:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(following)
                return False
            if packet is None:
                break
            version, arrivals = packet
            if version != self._state.version:
                raise Diverged(
                    f"the primary is at version {version}, its follower at {self._state.version}"
                )
            self._apply_all(arrivals)
        following.tell()
        return True
