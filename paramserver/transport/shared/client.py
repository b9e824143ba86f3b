"""A process's side of a connection to a partition on the same machine."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

import numpy as np
import numpy.typing as npt

from downpour.paramserver.codec import decode, decode_all, encode, encode_all
from downpour.paramserver.errors import (
    BadConfiguration,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NotAuthenticated,
    NotColocated,
    ServerError,
)
from downpour.paramserver.messages import (
    KEY_BYTES,
    MAX_MESSAGE,
    Answer,
    Hello,
    PermitRequest,
    Push,
    Welcome,
)
from downpour.paramserver.transport.endpoint import Endpoint, machine
from downpour.paramserver.transport.link import FloatArray, Pull
from downpour.paramserver.transport.shared.mailboxes import Mailboxes
from downpour.paramserver.transport.shared.published import PAUSE_S, SPINS, WeightsReader
from downpour.paramserver.transport.shared.server_side import is_ours, receive_with_fds

USUAL_PUSH, LARGEST_PUSH = 64, 4160
"""More than the bytes of a push with one mini-batch, and of one with the most there may be."""


class SharedConnection:
    """The connection of a process of replicas to one partition on its machine. A `Link`."""

    events = select.POLLIN

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        key: bytes,
        mailboxes: Mailboxes,
        deadline_s: float = 30,
        bell_every: int = 1,
    ) -> None:
        """Connect, say hello and map the published weights.

        Args:
            endpoint: The partition's.
            key: The run's key.
            mailboxes: The process's.
            deadline_s: Until when the partition has to have answered.
            bell_every: Pushes after which the doorbell rings; `flush` rings it earlier.

        Raises:
            BadConfiguration: The key is of another length.
            NotColocated: The partition is on another machine.
            NotAuthenticated: It has another key, or is another user's.
            ConnectionLost, DeadlineExceeded, MalformedMessage: It is gone, silent, or another one.
        """
        if len(key) != KEY_BYTES:
            raise BadConfiguration(f"the run's key has {len(key)} bytes: give {KEY_BYTES}")
        if endpoint.machine != machine():
            raise NotColocated(
                f"partition {endpoint.partition.index} is on another machine, out of reach of "
                "shared memory"
            )
        self.partition = partition = endpoint.partition
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(deadline_s)
        hello = Hello(
            key=key,
            total_parameters=partition.total_parameters,
            total_features=partition.total_features,
            num_mailboxes=mailboxes.num,
            depth=mailboxes.depth,
        )
        try:
            self.socket.connect(b"\0" + endpoint.address.encode())
            if not is_ours(self.socket):  # the name is free to all once the partition is gone
                raise NotAuthenticated(f"partition {partition.index} is another user's now")
            socket.send_fds(self.socket, [encode(hello)], [mailboxes.fd])
            self.reader = self._welcome(mailboxes.pins[partition.index])
        except TimeoutError:
            self.socket.close()
            raise DeadlineExceeded(
                f"partition {partition.index} has not welcomed us for {deadline_s} s"
            ) from None
        except OSError as error:
            self.socket.close()
            raise ConnectionLost(f"partition {partition.index}: {error}") from None
        except ServerError:
            self.socket.close()
            raise
        self._deadline_s = deadline_s
        self._bell_every = bell_every
        self._outbox: list[Push | PermitRequest] = []
        self._outbox_bytes = 0
        self.socket.setblocking(False)
        self._hung_up = select.poll()
        self._hung_up.register(self.socket, 0)  # for a hang-up one need not ask
        self.inbox: list[Answer] = []
        self.moved = 0

    def _welcome(self, pin: npt.NDArray[np.int64]) -> WeightsReader:
        data, fds = receive_with_fds(self.socket)
        try:
            if not data:
                raise NotAuthenticated(
                    f"partition {self.partition.index} closed the connection at hello: another "
                    "run's key, or another model"
                )
            welcome = decode(data)
            expected = (self.partition.num_parameters, self.partition.num_features)
            if not isinstance(welcome, Welcome) or not fds:
                raise MalformedMessage("hello was not answered with a welcome")
            if (welcome.num_parameters, welcome.num_features) != expected:
                raise MalformedMessage("the partition that answered is not the one asked for")
            return WeightsReader(fds.pop(), *expected, welcome.num_buffers, pin)
        finally:
            for fd in fds:
                os.close(fd)

    def fileno(self) -> int:
        """For `select`: readable when answers wait."""
        return self.socket.fileno()

    def push(self, push: Push) -> None:
        """Note a push, and ring the doorbell if it is time to. See `flush`."""
        self._put(push, LARGEST_PUSH if len(push.batches) > 1 else USUAL_PUSH)

    def ask(self, mailbox: int) -> None:
        """Note that a permit is wanted, and ring the doorbell if it is time to. See `flush`."""
        self._put(PermitRequest(mailbox=mailbox), USUAL_PUSH)

    def _put(self, message: Push | PermitRequest, num_bytes: int) -> None:
        if self._outbox_bytes + num_bytes > MAX_MESSAGE:
            self.flush()
        self._outbox.append(message)
        self._outbox_bytes += num_bytes
        if len(self._outbox) >= self._bell_every:
            self.flush()

    def flush(self) -> None:
        """Ring the doorbell. Waits, until the deadline, only while the socket's buffer is full.

        Raises:
            ConnectionLost: The partition is gone.
            DeadlineExceeded: It has not read for too long.
        """
        if not self._outbox:
            return
        data = encode_all(self._outbox)
        self._outbox.clear()
        self._outbox_bytes = 0
        give_up_s = time.monotonic() + self._deadline_s
        while True:
            try:
                self.socket.send(data)
                return
            except BlockingIOError:
                left_s = give_up_s - time.monotonic()
                if left_s <= 0 or not select.select([], [self.socket], [], left_s)[1]:
                    raise DeadlineExceeded(
                        f"partition {self.partition.index} has not read for {self._deadline_s} s"
                    ) from None
            except OSError as error:
                raise ConnectionLost(f"partition {self.partition.index}: {error}") from None

    @property
    def torn(self) -> int:
        """Copies of weights that were thrown away because the writer overtook them."""
        return self.reader.torn

    def start_pull(self, pull: Pull, weights: FloatArray, statistics: FloatArray | None) -> None:
        """Copy weights, float32 [n], and statistics, float32 [2, f], at once."""
        pull.versions[self.partition.index] = self.reader.read(weights, statistics, self._pause)

    def _pause(self, tries: int) -> None:
        """The weights are being written: let the partition finish, if it is still there."""
        if tries < SPINS:
            os.sched_yield()
        elif self._hung_up.poll(1000 * PAUSE_S):
            raise ConnectionLost(f"partition {self.partition.index} died over an update")

    def service(self) -> None:
        """Take in every answer that has come.

        Raises:
            ConnectionLost: The partition is gone.
            MalformedMessage: It says something else.
        """
        while True:
            try:
                data = self.socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError as error:
                raise ConnectionLost.of(self.partition.index, error) from None
            if not data:
                raise ConnectionLost.of(self.partition.index, "it closed the connection")
            for message in decode_all(data):
                if not isinstance(message, Answer):
                    raise MalformedMessage(f"{type(message).__name__} in place of an answer")
                self.inbox.append(message)

    def interrupt(self) -> None:
        """Cut the connection while another thread uses it."""
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
