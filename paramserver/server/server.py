"""One partition, served: a thread that takes pushes off sockets and publishes versions.

The thread owns the partition's state. Whoever else wants to see or change it (`call`) has that
thread do so between two pushes, so there is no lock, and nobody sees a half-applied state.

What a push does is `state`'s, when it is applied `intake`'s. `versions` publishes what comes of
it, `replies` sends it back, `connections` knows who is there, `inbox` has what other threads want,
and `standby.roles` deals with a second process. `transport` moves the bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    ServerError,
)
from downpour.paramserver.messages import KEY_BYTES
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import PushRecord
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.server.connections import Connections, Sides
from downpour.paramserver.server.inbox import Inbox
from downpour.paramserver.server.intake import make_intake
from downpour.paramserver.server.replies import Replies
from downpour.paramserver.server.versions import Versions
from downpour.paramserver.standby.follower_link import FOLLOWER_DEADLINE_S, MailboxSource
from downpour.paramserver.standby.primary_link import PrimaryLink
from downpour.paramserver.standby.remote_primary_link import RemotePrimaryLink
from downpour.paramserver.standby.role_changes import Replication
from downpour.paramserver.standby.roles import Follower
from downpour.paramserver.standby.trouble import Trouble
from downpour.paramserver.transport.endpoint import Endpoint, machine
from downpour.paramserver.transport.network.acceptor import (
    NetworkAcceptor,
    NetworkListen,
    NoNetwork,
)
from downpour.paramserver.transport.network.security import Credentials
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.patience import Patience
from downpour.paramserver.transport.poller import Poller
from downpour.paramserver.transport.shared.replication import Handover
from downpour.paramserver.transport.shared.server_side import Listener, SharedSide

T = TypeVar("T")
log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
"""How often a follower that catches up is looked at."""
PUSHES_A_TURN = 16
"""Packets taken from one connection before the next has its turn."""


class PartitionServer:
    """Serves one partition until `stop`."""

    def __init__(
        self,
        *,
        partition: Partition,
        config: UpdateConfig,
        key: bytes,
        weights: Tensor | None = None,
        statistics: npt.NDArray[np.float64] | None = None,
        restore: Snapshot | None = None,
        network: NetworkListen | None = None,
        follow: Endpoint | None = None,
        generation: int = 1,
        client_credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
        follower_deadline_s: float = FOLLOWER_DEADLINE_S,
        waits_for_follower: bool = True,
    ) -> None:
        """Start from `weights`, go on from `restore`, or follow the primary at `follow`.

        Args:
            partition: The partition to serve.
            config: How pushes change it.
            key: The run's key.
            weights: float32 [n] of version 0; zeros by default.
            statistics: The BN statistics of version 0, see `PartitionStart`; fresh by default.
            restore: The state to go on from.
            network: Where to listen for replicas on other machines; nowhere by default. Replicas
                on this machine come through shared memory.
            follow: The primary to follow, from its state on, until `promote`: over the network if
                it listens there, and through shared memory otherwise.
            generation: Counts the partition's followers, for one that comes over the network.
            client_credentials: For its connection to the primary.
            clock: Seconds, monotonic.
            follower_deadline_s: How long a follower may take to apply a push before it is given up.
            waits_for_follower: Whether a push is applied only once a follower that has come over
                the network has it.

        Raises:
            BadConfiguration: Weights or key are of another length, or the address to listen on is
                not to be had.
            BadSnapshot: `restore` is damaged, or of another partition or configuration.
            ServerError: The primary cannot be followed. See `PrimaryLink`.
        """
        _check(partition, key, weights, restore)
        self.partition = partition
        self._key = key
        sides: Sides = {}
        self._versions = Versions(partition, config, sides, weights, statistics)
        self._state = self._versions.state
        primary: PrimaryLink | RemotePrimaryLink | None = None
        try:
            if follow is not None:
                if follow.network is None:
                    primary = PrimaryLink(follow, key=key, room=self._state.room())
                else:
                    primary = RemotePrimaryLink(
                        follow,
                        key=key,
                        credentials=client_credentials,
                        room=self._state.room(),
                        generation=generation,
                        clock=clock,
                    )
                restore = primary.take_state()
                age_s: Any = restore.meta.get("first_update_age_s")
                if age_s is not None:
                    self._versions.first_update_s = time.monotonic() - age_s
            if restore is not None:
                self._state.load(restore.meta, restore.tensors)
        except BaseException:
            self._versions.close()
            if primary is not None:
                primary.close()
            raise
        self._versions.open()
        self._inbox = Inbox(self._why_ended)
        self._network: NetworkAcceptor | NoNetwork = NoNetwork()
        if network is not None:
            try:
                self._network = NetworkAcceptor(
                    network,
                    partition=partition,
                    key=key,
                    accepted=self._inbox.connect,
                    clock=clock,
                )
            except BaseException:
                self._inbox.close()
                self._versions.close()
                raise
        self._listener = Listener()
        self.endpoint = Endpoint(
            partition=partition,
            machine=machine(),
            address=self._listener.address,
            network=self._network.address,
        )
        self._poller = Poller()
        self._connections = Connections(
            partition, sides, epoll=self._poller.epoll, clock=clock, gone=self._on_gone
        )
        self._replies = Replies(self._connections, self._versions)
        self._replication: Replication[SharedSide] = Replication(
            partition.index,
            poller=self._poller,
            answer=self._replies.answer,
            clock=clock,
            deadline_s=follower_deadline_s,
            waits=waits_for_follower,
        )
        self._remote = primary if isinstance(primary, RemotePrimaryLink) else None
        self._intake = make_intake(config.policy, self._versions, self._replication, self._replies)
        if primary is not None:
            self._replication.follow(primary, self._state, self._versions.apply_shared)
        else:
            self._poller.watch(self._listener.socket, self._accept)
        self._poller.watch(self._inbox.wake, self._obey)
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"partition-{partition.index}", daemon=True
        )

    def record(self, folder: Path) -> None:
        """Record every push in `folder`; to be called before `start`.

        Raises:
            OSError: The record cannot be written.
        """
        follows = isinstance(self._replication.role, Follower)
        ledger = self._state.ledger
        ledger.record = PushRecord(folder, self.partition.index, ledger.version, follows=follows)

    def start(self) -> PartitionServer:
        """Start serving."""
        self._thread.start()
        if not isinstance(self._replication.role, Follower):
            self._network.start()
        return self

    def call(self, function: Callable[[PartitionState], T], deadline_s: float = 60.0) -> T:
        """Run `function` on the state between two pushes, and return what it returns.

        Raises:
            BaseException: What ended the serving thread, if anything did.
            ConnectionLost: The server was stopped.
            DeadlineExceeded: There was no answer before the deadline; `function` may still run.
        """
        future = self._inbox.call(function)
        try:
            return future.result(deadline_s)
        except FutureTimeoutError:
            if future.done():
                raise  # the function's own
            raise DeadlineExceeded(
                f"partition {self.partition.index} has not answered for {deadline_s} s"
            ) from None

    def promote(self, deadline_s: float = 60.0) -> None:
        """Be the partition, with everything that the primary has published or answered.

        Does nothing the second time.

        Raises:
            Fenced: The primary went on without this follower, which is then of no use.
            DeadlineExceeded: There was no answer before the deadline.
        """
        self.call(self._become_primary, deadline_s)

    def begin_session(self) -> int:
        """Begin anew to note when updates are, and return the version that is there."""

        def begin(state: PartitionState) -> int:
            self._versions.first_update_s = self._versions.last_update_s = None
            return state.version

        return self.call(begin)

    def let_alone(self, generation: int, deadline_s: float = 60.0) -> None:
        """Answer without a follower on another machine, which will not be the partition any more.

        Args:
            generation: Of that follower. Nothing is done if another one has come.
            deadline_s: How long to wait.

        Raises:
            DeadlineExceeded: There was no answer before the deadline.
        """
        self.call(lambda _: self._replication.let_alone(generation), deadline_s)

    def await_level(self, deadline_s: float) -> bool:
        """Wait until this follower has all that its primary answers; returns whether it has.

        Raises:
            ConnectionLost: The primary is gone, or this follower has failed.
        """
        link = self._remote
        if link is None:
            return True
        give_up_s = time.monotonic() + deadline_s
        while not link.levelled.wait(LOOK_EVERY_S):
            if (trouble := link.trouble) is not None and trouble.kind == "closed":
                raise ConnectionLost(f"it has lost its primary: {trouble}")
            if time.monotonic() > give_up_s:
                return False
        return True

    def await_trouble(self, deadline_s: float | None = None) -> Trouble | None:
        """Wait until the primary, on another machine, is gone or silent; returns what is known.

        None if it is on this machine, or there has been no trouble before the deadline.
        """
        link = self._remote
        if link is None:
            return None
        while (trouble := link.trouble) is None and link.troubled.wait(deadline_s):
            pass  # it may have spoken again before we looked
        return trouble

    @property
    def failure(self) -> BaseException | None:
        """What ended the serving thread, if anything did."""
        return self._failure

    @property
    def has_follower(self) -> bool:
        """Whether every push is applied by a second process, too."""
        return self._replication.role.has_follower

    @property
    def waits_for_word(self) -> int | None:
        """The follower on another machine whose loss keeps this one from answering; `let_alone`."""
        return self._replication.waits_for_word

    def dropped(self) -> dict[str, int]:
        """Return the connections that we closed, by reason; failed handshakes are among them."""
        ours, network = dict(self._connections.dropped), dict(self._network.dropped)
        return dict(Counter(ours) + Counter(network))  # copies: other threads count meanwhile

    @property
    def first_update_age_s(self) -> float | None:
        """Seconds since the first update since `start`, or since the session began; of a follower,
        since its primary's.
        """
        return _age_s(self._versions.first_update_s)

    @property
    def last_update_age_s(self) -> float | None:
        """Seconds since the latest update since `start`, or since the session began."""
        return _age_s(self._versions.last_update_s)

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._connections.sides)

    def stop(self, deadline_s: float = 10.0) -> None:
        """Stop serving, and close every connection. Does nothing the second time.

        Raises:
            DeadlineExceeded: The serving thread has not ended before the deadline.
        """
        if self._thread.ident is None:  # never started
            self._end()
            return
        self._stopping = True
        self._inbox.ring()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(
                f"partition {self.partition.index} has not stopped for {deadline_s} s"
            )

    # On the serving thread

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
        if not self._inbox.close():
            return
        self._network.stop()
        self._connections.close()
        self._replication.close()
        self._poller.close()
        self._listener.close()
        self._versions.close()
        self._inbox.turn_away()

    def _why_ended(self) -> BaseException:
        return self._failure or ConnectionLost(f"partition {self.partition.index} was stopped")

    def _loop(self) -> None:
        patience, poller, sides = Patience(), self._poller, self._connections.sides
        replication, intake = self._replication, self._intake
        while not self._stopping:
            for fd, _ in patience.wait(poller.epoll, replication.role.wait_s):
                if fd in sides:
                    self._serve(fd)
                elif fd in poller.handlers:  # or it was dropped in this very turn
                    poller.handlers[fd]()
            replication.role.check()
            self._connections.drop_silent()
            intake.advance()

    def _accept(self) -> None:
        self._connections.accept(self._listener)

    def _obey(self) -> None:
        for accepted in self._inbox.take_connections():
            self._connections.add_network(accepted)
        for command in self._inbox.take_commands():
            command.run(self._state)
            self._replication.raise_if_fenced()

    def _serve(self, fd: int) -> None:
        side = self._connections.sides[fd]
        try:
            if isinstance(side, NetworkSide):
                self._serve_network(side)
            elif not side.is_ready:
                self._handshake(fd, side)
            else:
                for _ in range(PUSHES_A_TURN):
                    data = side.receive()
                    if data is None:
                        return
                    self._intake.take(side, data)
        except (ServerError, OSError) as error:
            if not isinstance(error, ConnectionLost):
                # As text: a record that is kept would keep the error's frames, and all they map.
                index, why = self.partition.index, str(error)
                log.warning("partition %d closed a connection: %s", index, why)
            self._connections.failed(fd, error)

    def _serve_network(self, side: NetworkSide) -> None:
        side.allow()
        while (push := side.next()) is not None:
            moments = side.moments[: len(push.batches)]
            self._intake.take_network(side, push, side.came, moments)
        if side.follow is not None:
            self._receive_remote_follower(side, side.follow.generation)
            return
        if side.asks:
            self._intake.ask(side.socket.fileno(), side.asks)
            side.asks.clear()
        self._replies.send(side)

    def _handshake(self, fd: int, side: SharedSide) -> None:
        if not side.handshake(self.partition, self._versions.published, self._key):
            return
        if side.follows:
            self._receive_follower(fd)
        else:
            self._replication.role.opened(_source(side))

    def _on_gone(self, fd: int) -> None:
        self._intake.leave(fd)
        self._replication.role.closed(fd)

    def _receive_follower(self, fd: int) -> None:
        """Take a follower's connection out of the others, and let it join."""
        peer = self._connections.hand_over(fd)
        if self._network.address is not None:
            log.warning("partition %d takes no follower over a network", self.partition.index)
            peer.close()
            return

        def join(memory: Handover) -> None:
            self.call(
                lambda state: self._replication.join(
                    state,
                    peer,
                    memory,
                    self._sources(),
                    first_update_age_s=self.first_update_age_s,
                )
            )

        self._replication.receive(peer, self._state.room(), join)

    def _receive_remote_follower(self, side: NetworkSide, generation: int) -> None:
        """As `_receive_follower`, of one that may be on another machine."""
        peer = self._connections.hand_over(side.socket.fileno())
        room = self._state.room()

        def join() -> None:
            self.call(
                lambda state: self._replication.join_remote(
                    state,
                    side.channel,
                    generation,
                    room,
                    first_update_age_s=self.first_update_age_s,
                )
            )

        self._replication.receive_remote(room, join, peer.close)

    def _sources(self) -> list[MailboxSource]:
        sides = self._connections.sides.values()
        return [_source(s) for s in sides if isinstance(s, SharedSide) and s.views]

    def _become_primary(self, state: PartitionState) -> None:
        if not self._replication.promote():
            return
        if state.ledger.record is not None:
            state.ledger.record.promote()
        self._network.start()
        self._poller.watch(self._listener.socket, self._accept)


def _check(
    partition: Partition, key: bytes, weights: Tensor | None, restore: Snapshot | None
) -> None:
    if len(key) != KEY_BYTES:
        raise BadConfiguration(f"the run's key has {len(key)} bytes: give {KEY_BYTES}")
    if weights is not None and weights.shape != (partition.num_parameters,):
        raise BadConfiguration(
            f"partition {partition.index} was given weights of shape {list(weights.shape)}: "
            f"give [{partition.num_parameters}]"
        )
    if restore is not None:
        restore.check(partition)


def _age_s(since_s: float | None) -> float | None:
    return None if since_s is None else time.monotonic() - since_s


def _source(side: SharedSide) -> MailboxSource:
    assert side.views is not None
    return MailboxSource(
        number=side.socket.fileno(),
        num_mailboxes=len(side.views.gradients),
        depth=side.depth,
        fd=side.mailboxes_fd,
    )
