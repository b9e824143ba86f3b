"""A partition and its follower, and deaths at every point."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.standby.roles import Primary
from tests.helpers.served_partitions import (
    DEADLINE_S,
    EXACT,
    KEY,
    Cluster,
    P,
    by_deadline,
    gradient_of,
    leave,
)

# MKL's square root comes out with half of its digits, once in some hundred times, where two threads
# call it for the first time at once; primary and follower are processes, but not here.
torch.ones(P).sqrt()


class Killed(BaseException):
    """Ends a server's thread where it stands, as kill -9 ends a process."""


class Pair(Cluster):
    """One partition with its follower."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> None:
        super().__init__(1, clock=clock, **options)
        self.config = options.get("config", EXACT)
        self.follower = self.follow()

    @property
    def primary(self) -> PartitionServer:
        return self.servers[0]

    def follow(self) -> PartitionServer:
        """A new follower of the first server; comes back once it follows."""
        follower = PartitionServer(
            partition=self.parts[0], config=self.config, key=KEY, follow=self.primary.endpoint
        ).start()
        by_deadline(lambda: self.primary.has_follower)
        self._closing.callback(follower.stop)
        return follower

    def fail_over(self) -> None:
        """The follower becomes the partition."""
        self.follower.promote()
        self.servers[0] = self.follower


def dumped(server: PartitionServer) -> tuple[dict[str, object], dict[str, Tensor]]:
    def dump(state: PartitionState) -> tuple[dict[str, object], dict[str, Tensor]]:
        meta, tensors = state.dump()
        return {**meta, "quarantined": sorted(state.ledger.quarantined)}, tensors

    return server.call(dump)


def assert_same(one: PartitionServer, other: PartitionServer) -> None:
    """All of the state, to the bit."""
    (meta, tensors), (meta2, tensors2) = dumped(one), dumped(other)
    assert meta == meta2
    assert tensors.keys() == tensors2.keys()
    for name, tensor in tensors.items():
        assert tensor.numpy().tobytes() == tensors2[name].numpy().tobytes(), name


def push_batches(
    client: ParameterClient, mailbox: int, batches: tuple[int, ...], **about: Any
) -> None:
    versions = about.pop("versions", [0])
    client.push(
        mailbox=mailbox,
        **{"replica": 0, "epoch": 0, "examples": 32, "loss": 1.0, "gradient_norm": 30.0, **about},
        batches=batches,
        versions=versions,
    )


def answered(client: ParameterClient) -> tuple[Outcome, ...]:
    """The next answer, waited for."""
    while not (settled := client.wait()):
        pass
    (one,) = settled
    return one.outcomes


POINTS = ("before forwarding", "after forwarding", "after applying", "before answering")


def kill_at(server: PartitionServer, point: str, count: int) -> None:
    """Have a server die when it comes to `point` for the `count`th time."""
    left = [count]

    def count_down() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def arm(state: PartitionState) -> None:
        primary = server._replication.role
        assert isinstance(primary, Primary)
        link, release = primary.link, primary.release
        forward, apply_all = link.forward, state.apply_all

        def forwarding(*arguments: Any) -> None:
            if point == "before forwarding":
                count_down()
            forward(*arguments)
            if point == "after forwarding":
                count_down()

        def applying(*arguments: Any) -> Any:
            outcomes = apply_all(*arguments)
            if point == "after applying":
                count_down()
            return outcomes

        def releasing(owed: Any) -> None:
            if owed and point == "before answering":
                count_down()
            release(owed)

        link.forward = forwarding  # type: ignore[method-assign]
        state.apply_all = applying  # type: ignore[method-assign]
        primary.release = releasing  # type: ignore[method-assign]

    server.call(arm)


def work_through(pair: Pair, batches: range, client: ParameterClient) -> None:
    for batch in batches:
        leave(client, 0, batch)
        push_batches(client, 0, (batch,))
        assert answered(client) == (Outcome.APPLIED,)


class Clock:
    """A time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def freeze(server: PartitionServer) -> threading.Event:
    """Have a server do nothing until the event is set."""
    thaw, frozen = threading.Event(), threading.Event()

    def wait(_: PartitionState) -> None:
        frozen.set()
        assert thaw.wait(DEADLINE_S)

    threading.Thread(target=lambda: server.call(wait), daemon=True).start()
    assert frozen.wait(DEADLINE_S)
    return thaw


def assert_nothing_is_lost(
    pair: Pair, client: ParameterClient, client_of_follower: Callable[[], ParameterClient]
) -> None:
    """Push until the primary dies, as it is bound to, fail over, and push all of it again.

    `client` has eight mailboxes, and `client_of_follower` makes one with a single mailbox.
    """
    num = 120
    todo, in_flight, told = list(range(num)), dict[int, int](), set[int]()
    weights, versions, seen = np.zeros(P, np.float32), [0], 0
    try:
        while True:
            for box in range(8):
                if box not in in_flight:
                    in_flight[box] = todo.pop(0)
                    leave(client, box, in_flight[box])
                    push_batches(client, box, (in_flight[box],))
            for settled in client.wait():
                assert settled.outcomes == (Outcome.APPLIED,)
                told.add(in_flight.pop(settled.mailbox))
            client.pull(weights, versions)
            assert versions[0] >= seen
            seen = versions[0]
    except ConnectionLost:
        pass
    assert isinstance(pair.primary.failure, Killed)
    pair.fail_over()
    flags = pair.follower.call(lambda state: state.ledger.applied.flags(0))
    assert flags[sorted(told)].all()  # none that was answered is missing
    assert pair.versions()[0] >= seen  # and no version that was seen
    held = int((flags != 0).sum())
    again = client_of_follower()
    outcomes = []
    for batch in range(num):
        leave(again, 0, batch)
        push_batches(again, 0, (batch,))
        outcomes += answered(again)
    assert outcomes.count(Outcome.DUPLICATE) == held
    assert outcomes.count(Outcome.APPLIED) == num - held
    assert pair.versions() == [num]
    assert torch.equal(pair.weights(), -0.5 * sum(gradient_of(b) for b in range(num)))  # type: ignore[arg-type]
