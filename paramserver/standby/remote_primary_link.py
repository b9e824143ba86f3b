"""The follower's end of the connection to a primary on another machine.

The follower says that it has a push once all of it has come, and then applies it. To take over, it
says no more: what it has not said that it has, the primary cannot answer. It may take over only if
the primary has told it that it waits for it (`Level`), and only if the controller says so. The
controller says it for one of the two, see `cluster.controller.followers`.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from downpour.paramserver.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Diverged,
    Fenced,
    MalformedMessage,
    NotColocated,
    ServerError,
)
from downpour.paramserver.messages import (
    NONCE_BYTES,
    PROOF_BYTES,
    Follow,
    Introduction,
    Push,
    WireDtype,
)
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.snapshot import Snapshot
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.standby.primary_link import JOIN_DEADLINE_S
from downpour.paramserver.standby.trouble import Kind, Trouble
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.network import frames
from downpour.paramserver.transport.network.channel import SLICE_BYTES, Channel, unanswered_s
from downpour.paramserver.transport.network.compress import room_for
from downpour.paramserver.transport.network.connect import connect
from downpour.paramserver.transport.network.frames import FrameReader, Outbox, as_bytes
from downpour.paramserver.transport.network.replication import (
    BEAT_S,
    Beat,
    Level,
    LinkMessage,
    Received,
    State,
    TakenOver,
    decode,
    head,
)
from downpour.paramserver.transport.network.security import Credentials

SILENT_S = 1.0
"""After so long without a word the primary may be gone: the controller is told, and decides."""
UNREACHABLE_S = 0.25
"""So it is told earlier if for so long the primary's machine has not even acknowledged what it was
sent. A kernel does that, however busy its processes are."""


class RemotePrimaryLink:
    """A connection to the primary, from which pushes come with their gradients."""

    packets_a_turn = 1 << 30
    """What has come is always taken in: the channel bounds it."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        key: bytes,
        credentials: Credentials | None,
        room: Mapping[str, Tensor],
        generation: int,
        clock: Callable[[], float],
        deadline_s: float = JOIN_DEADLINE_S,
    ) -> None:
        """Join the partition at `endpoint`; `take_state` gives what to start from.

        Args:
            endpoint: The primary's.
            key: The run's key.
            credentials: The clients'; without them nothing is encrypted.
            room: Where the state's large tensors go, touched already or not.
            generation: Counts the partition's followers.
            clock: Seconds, monotonic.
            deadline_s: How long nothing of the state may come.

        Raises:
            NotColocated: The primary does not listen on a network.
            ConnectionLost: The primary is gone, or takes no follower.
            DeadlineExceeded: It does not hand its state over.
            NotAuthenticated, MalformedMessage, BadSnapshot: It is another run's, or another one.
        """
        self._partition = part = endpoint.partition
        if endpoint.network is None:
            raise NotColocated(f"partition {part.index} does not listen on a network")
        self._clock = clock
        self._room = room
        self._rest = bytearray()
        self._came: dict[WireDtype, Tensor] = {}
        """Where gradients are received, by how they travelled to the primary."""
        self._moments = torch.empty(0, 3, part.num_features)
        self._received = 0
        self._joined = self._taking_over = False
        self._history: deque[tuple[int, int]] = deque()
        """(pushes received, version after them), as far back as the primary may speak of."""
        self.levelled = threading.Event()
        """Whether the primary waits for us, so that we have all that it has answered since."""
        self.troubled = threading.Event()
        """Whether there is `trouble`."""
        self.trouble: Trouble | None = None
        """Whether the primary is gone or silent; written by the serving thread."""
        self._gone: str | None = None
        """Why nothing more comes, if so."""
        self._channel: Channel = connect(
            endpoint.network,
            partition=part,
            key=key,
            credentials=credentials,
            introduction=_introduction(part),
            deadline_s=deadline_s,
        )
        self._outbox = Outbox(self._channel)
        self._reader: FrameReader[LinkMessage] = FrameReader(
            self._channel, self._destinations, decode
        )
        self._heard_s = self._beat_s = clock()
        try:
            self._outbox.put([frames.head(Follow(generation=generation), 0)])
            self._state: Snapshot | None = self._join(deadline_s)
        except BaseException:
            self.close()
            raise

    def _join(self, deadline_s: float) -> Snapshot:
        poll = select.poll()
        poll.register(self._channel.socket, select.POLLIN)
        while True:
            self._beat()
            self._channel.allow(SLICE_BYTES)
            message = self._next()
            if isinstance(message, State):
                break
            if message is not None and not isinstance(message, Beat):
                raise MalformedMessage(f"{type(message).__name__} before the state")
            if self._clock() - self._heard_s > deadline_s:
                raise DeadlineExceeded(
                    f"partition {self._partition.index} has handed nothing over for "
                    f"{deadline_s:.0f} s"
                )
            if message is None:
                poll.poll(1000 * BEAT_S)
        found = snapshot.parse(bytes(self._rest), f"the state of {self._partition.index}")
        found.check(self._partition)
        self._rest = bytearray()
        tensors = {**found.tensors, **self._room}
        return Snapshot(partition=self._partition, meta=found.meta, tensors=tensors)

    def take_state(self) -> Snapshot:
        """Return the state that was handed over; only once, as it is as large as the partition."""
        state, self._state = self._state, None
        assert state is not None
        self._room = {}
        return state

    def fileno(self) -> int:
        """For `epoll`: readable when pushes have come."""
        return self._channel.socket.fileno()

    def packet(self, version: int) -> list[Arrival] | None:
        """Return the next push, and say that it has come; None if none has.

        Args:
            version: Ours, with all that was returned before applied.

        Raises:
            ConnectionLost: The primary is gone, or we have taken over, and all that had come was
                returned.
            MalformedMessage: It says what no primary does.
            Diverged: It had another version when it was where we were.
        """
        if self._gone is not None:
            raise ConnectionLost(self._gone)
        try:
            return self._packet(version)
        except ServerError as error:
            self._gone = str(error)
            self._note_trouble("closed", f"{type(error).__name__}: {error}")
            raise

    def _packet(self, version: int) -> list[Arrival] | None:
        if not self._history or self._history[-1][0] != self._received:
            self._history.append((self._received, version))
        while True:
            message = self._next()
            if message is None:
                if not self._taking_over:
                    return None
                self._channel.allow(SLICE_BYTES)
                moved = self._channel.moved
                message = self._next()
                if message is None and self._channel.moved == moved:
                    raise ConnectionLost("all that had come is taken in")
            if isinstance(message, Push):
                self._received += 1
                self._acknowledge()
                return [(message, self._came[message.wire], self._moments[: len(message.batches)])]
            if isinstance(message, Level):
                self.levelled.set()
            elif isinstance(message, Beat):
                self._compare(message)

    def _compare(self, beat: Beat) -> None:
        while self._history and self._history[0][0] < beat.applied:
            self._history.popleft()
        if not self._history or self._history[0][0] != beat.applied:
            raise MalformedMessage(f"{beat.applied} pushes applied of {self._received} sent")
        ours = self._history[0][1]
        if ours != beat.version:
            raise Diverged(f"the primary was at version {beat.version}, its follower at {ours}")

    def _destinations(self, message: LinkMessage) -> Sequence[memoryview]:
        if isinstance(message, Push):
            count = len(message.batches)
            if count > len(self._moments):
                self._moments = torch.empty(count, 3, self._partition.num_features)
            if message.wire not in self._came:
                self._came[message.wire] = room_for(message.wire, self._partition.num_trained)
            payload = as_bytes(self._came[message.wire]), as_bytes(self._moments[:count])
            return [view for view in payload if len(view)]
        if isinstance(message, State):
            if self._joined or self._rest:
                raise MalformedMessage("a second state")
            self._rest = bytearray(message.rest_bytes)
            large = (as_bytes(self._room[name]) for name in sorted(self._room))
            return [memoryview(self._rest), *large]
        if isinstance(message, Beat | Level):
            return ()
        raise MalformedMessage(f"{type(message).__name__} by a primary")

    def tell(self) -> None:
        """Begin another turn: let more be read. Never waits."""
        self._channel.allow(SLICE_BYTES)

    def check(self) -> None:
        """Say something if it is time for it, and look whether the primary is silent."""
        self._joined = True
        with contextlib.suppress(ConnectionLost):  # `packet` sees it, too
            self._beat()
        quiet_s = self._clock() - self._heard_s
        if quiet_s > UNREACHABLE_S and unanswered_s(self._channel.socket) > UNREACHABLE_S:
            why = f"its primary's machine has acknowledged nothing for {UNREACHABLE_S:g} s"
            self._note_trouble("unreachable", why)
        elif quiet_s > SILENT_S:
            self._note_trouble("silent", f"its primary has been silent for {SILENT_S:g} s")
        elif self.trouble is not None and self.trouble.kind != "closed":
            self.trouble = None
            self.troubled.clear()

    def take_over(self) -> None:
        """Be the one that answers from now on; what had come is still returned by `packet`.

        Raises:
            Fenced: The primary never waited for us, so we may lack what it answered.
        """
        if not self.levelled.is_set():
            raise Fenced("the primary never waited for this follower, which may lack what came")
        self._taking_over = True

    def close(self) -> None:
        """Close the connection; a primary that lives is told, if we have taken over."""
        if self._taking_over:
            with contextlib.suppress(ServerError, OSError):
                self._outbox.put([head(TakenOver())])
                self._outbox.flush()
        self._channel.socket.close()
        self._note_trouble("closed", "the connection is closed")

    def _next(self) -> LinkMessage | None:
        moved = self._channel.moved
        message = self._reader.next()
        if self._channel.moved != moved:
            self._heard_s = self._clock()
        return message

    def _acknowledge(self) -> None:
        """Say what has come. Once we take over, that is for us to answer, and we say no more."""
        if self._taking_over:
            return
        self._beat_s = self._clock()
        self._outbox.put([head(Received(pushes=self._received, joined=self._joined))])
        with contextlib.suppress(ConnectionLost):  # the next read says so, after what had come
            self._outbox.flush()

    def _beat(self) -> None:
        if not self._outbox.empty:
            self._outbox.flush()
        elif self._gone is None and self._clock() - self._beat_s >= BEAT_S:
            self._acknowledge()

    def _note_trouble(self, kind: Kind, why: str) -> None:
        # One that is silent may be found to be gone; the first reason of a kind is the true one.
        if self.trouble is None or (kind == "closed" and self.trouble.kind != "closed"):
            self.trouble = Trouble(kind=kind, why=why)
        self.troubled.set()


def _introduction(partition: Partition) -> Introduction:
    """Return that of a client that pushes nothing; nonce and proof are the handshake's."""
    return Introduction(
        proof=bytes(PROOF_BYTES),
        nonce=bytes(NONCE_BYTES),
        partition=partition.index,
        total_parameters=partition.total_parameters,
        total_features=partition.total_features,
        num_mailboxes=0,
        depth=0,
        wire=WireDtype.FLOAT32,
    )
