"""One partition, served: a thread that takes pushes off sockets and publishes versions.

The thread owns the partition's state. Everything else that wants to see or change it (`call`) is
run by that thread between two pushes, so there is no lock and no half-applied state to be seen.
Deciding what a push does is `state`'s, publishing what comes of it `versions`'; who is connected,
`connections`'; what other threads want, `door`'s; moving bytes, `transport`'s.
"""

from __future__ import annotations

import contextlib
import logging
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

from downpour.paramserver.admission.bounded import Admission
from downpour.paramserver.admission.permits import Permit, Turn
from downpour.paramserver.admission.rounds import Rounds
from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    Diverged,
    MalformedMessage,
    ServerError,
)
from downpour.paramserver.messages import KEY_BYTES, Answer, Outcome, Push, decode_all, encode
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import PushRecord
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.server.connections import Connections, Sides
from downpour.paramserver.server.inbox import Door
from downpour.paramserver.server.pending_pushes import Held, Holding
from downpour.paramserver.server.versions import Versions
from downpour.paramserver.standby.follower import PACKETS_A_TURN, Following
from downpour.paramserver.standby.primary import FOLLOWER_DEADLINE_S, Lead, Source
from downpour.paramserver.transport.handshake import NetworkListen, Porter
from downpour.paramserver.transport.local import Endpoint, Listener, ServerSide, machine
from downpour.paramserver.transport.network import NetworkSide
from downpour.paramserver.transport.patience import Patience
from downpour.paramserver.transport.replication import Handover

T = TypeVar("T")
log = logging.getLogger(__name__)

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
        sides: Sides = {}
        self._versions = Versions(partition, config, sides, weights)
        self._state = self._versions.state
        self._following: Following | None = None
        """The way to our primary, until we are it."""
        try:
            if follow is not None:
                self._following = Following(follow, key=key, room=self._state.room())
                restore = self._following.take_state()
                first_update_at: Any = restore.meta.get("first_update_at")
                self._versions.first_update_at = first_update_at
            if restore is not None:
                self._state.load(restore.meta, restore.tensors)
        except BaseException:
            self._versions.close()
            if self._following is not None:
                self._following.close()
            raise
        self._versions.open()
        self._door = Door(self._why_ended)
        self._porter = None
        if network is not None:
            try:
                self._porter = Porter(
                    network, partition=partition, key=key, admit=self._door.admit, clock=clock
                )
            except BaseException:
                self._door.close()
                self._versions.close()
                raise
        self._listener = Listener()
        self.endpoint = Endpoint(
            partition=partition,
            machine=machine(),
            address=self._listener.address,
            network=self._porter.address if self._porter else None,
        )
        policy = config.policy
        self._holding: Holding | None = None
        self._take, self._take_network = self._take_at_once, self._take_network_at_once
        if policy.staleness_policy == "bounded":
            self._holding = Holding(Admission(policy.staleness_bound))
        elif policy.staleness_policy == "synchronous":
            self._holding = Holding(Rounds(policy.round_steps or policy.round_pushes or 1))
        if self._holding is not None:
            self._take, self._take_network = self._holding.take, self._holding.take_network
        self._scratch = torch.empty(0)
        """Where a gradient that came as 16 bits is float32 again."""
        self._epoll = select.epoll()
        self._lead: Lead[ServerSide] = Lead(
            partition.index,
            epoll=self._epoll,
            answer=self._answer,
            clock=clock,
            deadline_s=follower_deadline_s,
        )
        self._connections = Connections(
            partition, sides, epoll=self._epoll, clock=clock, gone=self._on_gone
        )
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"partition-{partition.index}", daemon=True
        )

    def record(self, folder: Path) -> None:
        """Record every push in `folder`; to be called before `start`."""
        state = self._state
        state.ledger.record = PushRecord(
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
        future = self._door.call(function)
        try:
            return future.result(deadline_s)
        except FutureTimeoutError:
            if future.done():
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
        dropped = self._connections.dropped
        if self._porter is None:
            return dict(dropped)
        return dict(Counter(dict(dropped)) + Counter(dict(self._porter.dropped)))

    @property
    def first_update_at(self) -> float | None:
        """Unix time of the first update since `start`; of a follower, since its primary's."""
        return self._versions.first_update_at

    @property
    def last_update_at(self) -> float | None:
        """Unix time of the latest update since `start`."""
        return self._versions.last_update_at

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._connections.sides)

    def stop(self, deadline_s: float = 10.0) -> None:
        """Stop serving, and close every connection. Does nothing the second time."""
        if self._thread.ident is None:  # never started
            self._end()
            return
        self._stopping = True
        self._door.ring()
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
        if not self._door.close():
            return
        if self._porter is not None:
            self._porter.stop()
        self._connections.close()
        self._lead.close()
        if self._following is not None:
            self._following.close()
        self._epoll.close()
        self._listener.close()
        self._versions.close()
        self._door.turn_away()

    def _why_ended(self) -> BaseException:
        return self._failure or ConnectionLost(f"partition {self.partition.index} was stopped")

    def _loop(self) -> None:
        patience, listening = Patience(), self._listener.socket.fileno()
        self._epoll.register(self._following or listening, select.EPOLLIN)
        self._epoll.register(self._door.wake, select.EPOLLIN)
        while not self._stopping:
            for fd, _ in patience.wait(self._epoll, 1.0):
                if fd == listening:
                    self._connections.accept(self._listener)
                elif fd == self._door.wake:
                    self._obey()
                elif self._following is not None:
                    self._follow(self._following)
                elif self._lead.is_follower(fd):
                    self._lead.hear()
                elif fd in self._connections.sides:  # it may have been dropped in this very turn
                    self._serve(fd)
            self._lead.check()
            self._connections.drop_silent()
            if self._holding is not None:
                self._go_on(self._holding)

    def _obey(self) -> None:
        for admitted in self._door.take_admitted():
            self._connections.seat(admitted)
        for command in self._door.take_commands():
            command.run(self._state)
            self._lead.raise_if_fenced()

    def _serve(self, fd: int) -> None:
        side = self._connections.sides[fd]
        try:
            if isinstance(side, NetworkSide):
                self._serve_network(side)
                return
            if not side.greeted:
                if side.greet(self.partition, self._versions.published, self._key):
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
        except (ServerError, OSError) as error:
            if not isinstance(error, ConnectionLost):
                # As text: a record that is kept would keep the error's frames, and all they map.
                index, why = self.partition.index, str(error)
                log.warning("partition %d closed a connection: %s", index, why)
            self._connections.failed(fd, error)

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
        # Readers wait for what is written over.
        at_once = 1 if self._versions.in_place else len(arrivals)
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
        side.answer(*self._apply_all([(push, gradient, moments)]))

    def _send(self, side: NetworkSide) -> None:
        while True:
            if side.pulls and not side.sending:
                self._versions.send(side)
            all_sent = side.flush()  # answers and weights at once: each call wakes the peer
            if not all_sent or not side.pulls:
                break
        self._connections.watch_writable(side, not all_sent)

    def _apply_all(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        shared = self._lead.has_follower or self._following is not None
        return self._versions.apply_all(arrivals, shared=shared)

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
                    (answer,) = self._apply_all([held])
                answers.setdefault(fd, []).append(answer)
            if not answers:
                return
            fd, batch = answers.popitem()
            self._tell(fd, batch)  # where it is gone, others may go on

    def _due(self, holding: Holding) -> Permit | Turn[Held] | None:
        return holding.next(self._state.version, self._state.weights_version)

    def _tell(self, fd: int, answers: Sequence[Answer]) -> None:
        side = self._connections.sides.get(fd)
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
            self._connections.failed(fd, error)

    def _on_gone(self, fd: int) -> None:
        if self._holding is not None:
            self._holding.leave(fd)
        self._lead.closed(fd)

    def _answer(self, side: ServerSide, answers: Sequence[Answer]) -> None:
        """Send answers that waited for the follower, if their connection is there yet."""
        fd = side.socket.fileno()
        if self._connections.sides.get(fd) is side:
            try:
                side.answer(answers)
            except ServerError as error:
                self._connections.failed(fd, error)

    # Followers, and primaries that we follow

    @property
    def has_follower(self) -> bool:
        """Whether every push is applied by a second process, too."""
        return self._lead.has_follower

    def _receive_follower(self, fd: int) -> None:
        """Somebody wants to follow: not a connection like the others."""
        peer = self._connections.hand_over(fd)
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
        sides = self._connections.sides.values()
        return [_source(s) for s in sides if isinstance(s, ServerSide) and s.views]

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
        if state.ledger.record is not None:
            state.ledger.record.promote()
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
