"""The client of all partitions: doorbells, bounds, answers."""

import contextlib

import pytest
import torch

from downpour.paramserver.client import ParameterClient, PushResult
from downpour.paramserver.errors import (
    BadConfiguration,
    DeadlineExceeded,
    MalformedMessage,
)
from downpour.paramserver.messages import (
    MAX_MAILBOXES,
    Answer,
    Outcome,
)
from tests.helpers.served_partitions import DEADLINE_S, KEY, Cluster, leave, send

torch.set_num_threads(1)


def test_a_bell_rings_for_several_pushes_or_when_it_is_waited_for(two: Cluster) -> None:
    client = two.client(num_mailboxes=8, depth=1, bell_every=3)
    for batch in range(5):
        leave(client, batch, batch)
        send(client, batch, mailbox=batch)
        # The partitions' threads answer `call` between two packets, in the order of arrival.
        assert max(two.versions()) <= batch // 3 * 3 + (3 if batch % 3 == 2 else 0)
    settled: list[PushResult] = []
    while len(settled) < 3:
        settled += client.collect(DEADLINE_S)
    assert two.versions() == [3, 3], "two are kept back until somebody waits"
    while len(settled) < 5:
        settled += client.wait()
    assert two.versions() == [5, 5]
    assert sorted(s.mailbox for s in settled) == [0, 1, 2, 3, 4]
    assert {o for s in settled for o in s.outcomes} == {Outcome.APPLIED}


def test_a_partition_too_few_or_out_of_order(two: Cluster) -> None:
    first, second = two.endpoints
    for endpoints in ([], [first], [second, first], [first, first]):
        with pytest.raises(BadConfiguration, match="give"):
            ParameterClient(endpoints, key=KEY)


@pytest.mark.parametrize(
    "options",
    [{"num_mailboxes": MAX_MAILBOXES + 1}, {"num_mailboxes": -1}, {"depth": 0}, {"depth": 9999}],
)
def test_mailboxes_beyond_bounds(cluster: Cluster, options: dict[str, int]) -> None:
    with pytest.raises(BadConfiguration, match="give at most"):
        cluster.client(**options)


def test_no_answer_by_the_deadline(cluster: Cluster) -> None:
    client = ParameterClient(cluster.endpoints, key=KEY, num_mailboxes=1, deadline_s=0.01)
    with contextlib.closing(client), pytest.raises(DeadlineExceeded):
        client.wait()


def test_an_answer_that_nobody_awaits_is_malformed(cluster: Cluster) -> None:
    client, server = cluster.client(num_mailboxes=1), cluster.servers[0]

    def lie(_: object) -> None:
        (side,) = server._connections.sides.values()
        side.answer([Answer(mailbox=0, outcome=Outcome.APPLIED, version=1)])

    server.call(lie)
    with pytest.raises(MalformedMessage, match="awaits none"):
        client.wait()
