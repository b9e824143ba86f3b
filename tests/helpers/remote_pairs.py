"""A partition and its follower over the network, and what can happen to what is between them."""

import contextlib
import ctypes
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.standby.remote_roles import RemotePrimary
from downpour.paramserver.transport.endpoint import NetworkAddress
from downpour.paramserver.transport.network.acceptor import NetworkListen
from tests.helpers.networked import Networked
from tests.helpers.partition_pairs import Killed, Pair
from tests.helpers.served_partitions import DEADLINE_S, KEY

_ATTACH_FILTER = 26
"""`SO_ATTACH_FILTER` of Linux."""


def be_deaf(peer: socket.socket) -> None:
    """Have the kernel drop each packet that comes for a connection, before it acknowledges it."""
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0 bytes
    program = struct.pack("HP", 1, ctypes.addressof(nothing))
    peer.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


class Relay:
    """A cable: what goes in at one end comes out at the other, until it is cut."""

    def __init__(self, to: NetworkAddress) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = NetworkAddress(host="127.0.0.1", port=self._listening.getsockname()[1])
        self._others: dict[socket.socket, socket.socket] = {}
        self._cut = threading.Event()
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, *, power: bool = False) -> None:
        """Lose everything from now on; neither end is told.

        Without `power` it is as if the machine at the other end had none: nothing that is sent is
        acknowledged any more.
        """
        with self._lock:  # nothing that is sent from now on is passed on
            self._cut.set()
            if not power:
                for peer in self._others:
                    be_deaf(peer)

    def close(self) -> None:
        self._ended = True
        self._thread.join(DEADLINE_S)
        self._listening.close()

    def _run(self) -> None:
        others = self._others
        while not self._ended:
            waiting = [self._listening, *others]
            for ready in select.select(waiting, [], [], 0.02)[0]:
                if ready is self._listening:
                    one, _ = self._listening.accept()
                    other = socket.create_connection((self._to.host, self._to.port))
                    others |= {one: other, other: one}
                elif ready in others:
                    with self._lock:
                        if not self._cut.is_set():
                            self._pass_on(ready, others)
            if self._cut.is_set():
                time.sleep(0.02)  # what waits to be read stays there
        for peer in others:
            peer.close()

    def _pass_on(self, peer: socket.socket, others: dict[socket.socket, socket.socket]) -> None:
        try:
            data = peer.recv(1 << 16)
            if data:
                others[peer].sendall(data)
                return
        except OSError:
            pass
        other = others.pop(peer)
        others.pop(other)
        other.close()
        peer.close()


class RemotePair(Pair, Networked):
    """One partition, and a follower that has come over the network, through a `Relay`."""

    def __init__(self, **options: Any) -> None:
        self.generation = 0
        super().__init__(**options)

    def follow(self, *, generation: int | None = None) -> PartitionServer:
        """A new follower of the first server; comes back once the primary waits for it."""
        self.generation = generation or self.generation + 1
        self.relay = Relay(self.address)
        self._closing.callback(self.relay.close)
        follower = PartitionServer(
            partition=self.parts[0],
            config=self.config,
            key=KEY,
            network=NetworkListen(credentials=self.keys.partitions if self.keys else None),
            follow=replace(self.primary.endpoint, network=self.relay.address),
            generation=self.generation,
            client_credentials=self.keys.clients if self.keys else None,
        ).start()
        self._closing.callback(follower.stop)
        assert follower.await_level(DEADLINE_S)
        return follower


REMOTE_POINTS = ("before sending", "after sending", "before applying", "after applying")


def lose_host_at(pair: RemotePair, point: str, count: int) -> None:
    """Have the primary's machine lose its power when it comes to `point` for the `count`th time."""
    left = [count]

    def count_down() -> None:
        left[0] -= 1
        if left[0] == 0:
            pair.relay.cut(power=True)
            raise Killed

    def arm(state: PartitionState) -> None:
        primary = pair.primary._replication.role
        assert isinstance(primary, RemotePrimary)
        forward, apply_all = primary.link.forward, state.apply_all

        def forwarding(arrivals: Any) -> None:
            if point == "before sending":
                count_down()
            forward(arrivals)
            if point == "after sending":
                count_down()

        def applying(*arguments: Any) -> Any:
            if point == "before applying":
                count_down()
            outcomes = apply_all(*arguments)
            if point == "after applying":
                count_down()
            return outcomes

        primary.link.forward = forwarding  # type: ignore[method-assign]
        state.apply_all = applying  # type: ignore[method-assign]

    pair.primary.call(arm)


def while_frozen(server: PartitionServer, work: Callable[[], None]) -> None:
    """Do something while a server does nothing."""
    frozen, thaw = threading.Event(), threading.Event()

    def wait(_: PartitionState) -> None:
        frozen.set()
        assert thaw.wait(DEADLINE_S)

    thread = threading.Thread(target=lambda: suppressing(server, wait), daemon=True)
    thread.start()
    assert frozen.wait(DEADLINE_S)
    try:
        work()
    finally:
        thaw.set()
        thread.join(DEADLINE_S)


def suppressing(server: PartitionServer, function: Callable[[PartitionState], None]) -> None:
    with contextlib.suppress(BaseException):
        server.call(function)
