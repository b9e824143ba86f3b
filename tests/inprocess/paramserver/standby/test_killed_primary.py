"""A primary in a process of its own, killed (kill -9) at random times; its follower takes over."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.network.acceptor import NetworkListen
from tests.helpers.networked import RUN
from tests.helpers.partition_pairs import answered, push_batches
from tests.helpers.served_partitions import (
    DEADLINE_S,
    EXACT,
    KEY,
    F,
    P,
    Q,
    gradient_of,
    leave,
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.inprocess.paramserver.standby.test_killed_primary"])
(PART,) = split(num_parameters=P, num_features=F, num_decayed=0, num_partitions=1)
BOXES = 8
STARTED = {"partition": PART, "config": EXACT, "key": KEY}


def serve(pipe: Connection, network: NetworkListen | None) -> None:
    server = PartitionServer(**STARTED, weights=torch.zeros(P), network=network).start()  # type: ignore[arg-type]
    pipe.send(server.endpoint)
    with contextlib.suppress(EOFError):
        pipe.recv()


def train_until_killed(
    client: ParameterClient, process: Any, kill_after: int
) -> tuple[set[int], int, int]:
    """Push until the partition is killed, in the middle of something.

    Gives the mini-batches that were answered, how many were pushed, and the last version seen.
    """
    weights, versions = np.zeros(P, np.float32), [0]
    in_flight, told, pushed = dict[int, int](), set[int](), 0
    try:
        while True:
            for box in range(BOXES):
                if box not in in_flight:
                    leave(client, box, pushed)
                    in_flight[box] = pushed
                    push_batches(client, box, (pushed,))
                    pushed += 1
                    if pushed == kill_after:
                        process.kill()
            for settled in client.wait():
                assert settled.outcomes == (Outcome.APPLIED,)
                told.add(in_flight.pop(settled.mailbox))
            client.pull(weights, versions)
    except ConnectionLost:
        # What was published last can still be read: the memory is mapped.
        published = client._connections[0].reader.version  # type: ignore[attr-defined]
        return told, pushed, max(versions[0], published)


@pytest.mark.parametrize("seed", range(16))
def test_nothing_answered_or_published_is_lost_with_the_process(seed: int) -> None:
    """The follower reads the same memory or, with the last seeds, has come over the network."""
    draws = random.Random(seed)
    network = NetworkListen(credentials=RUN.partitions) if seed >= 12 else None
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(theirs, network), daemon=True)
    process.start()
    endpoint = ours.recv()
    follower = PartitionServer(
        **STARTED,  # type: ignore[arg-type]
        follow=endpoint,
        client_credentials=RUN.clients,
        network=network,
    ).start()
    with contextlib.ExitStack() as closing:
        closing.callback(follower.stop)
        assert follower.await_level(DEADLINE_S)
        client = ParameterClient(
            [endpoint],
            key=KEY,
            num_mailboxes=BOXES,
            bell_every=draws.choice([1, 4]),
            deadline_s=DEADLINE_S,
        )
        closing.callback(client.close)
        kill_after = draws.randrange(1, 400)
        told, pushed, seen = train_until_killed(client, process, kill_after)
        process.join(DEADLINE_S)
        follower.promote()
        version = follower.call(lambda state: state.version)
        flags = follower.call(lambda state: state.ledger.applied.flags(0))
        assert version >= seen
        assert flags[sorted(told)].all()
        assert pushed <= Q
        again = ParameterClient(
            [follower.endpoint], key=KEY, num_mailboxes=1, deadline_s=DEADLINE_S
        )
        closing.callback(again.close)
        for batch in range(pushed):
            leave(again, 0, batch)
            push_batches(again, 0, (batch,))
            wanted = Outcome.DUPLICATE if flags[batch] else Outcome.APPLIED
            assert answered(again) == (wanted,)
        weights = follower.call(lambda state: state.current.weights.clone())
        assert torch.equal(weights, -0.5 * sum(gradient_of(b) for b in range(pushed)))  # type: ignore[arg-type]
