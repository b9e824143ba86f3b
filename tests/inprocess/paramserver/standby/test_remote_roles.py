"""A partition and its follower over the network: deaths, silence, and who may answer."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from downpour.paramserver.access import Access
from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded, Diverged, Fenced
from downpour.paramserver.messages import Outcome, WireDtype
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.adaptive import AdamW
from downpour.paramserver.rules.policy import Guard, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Momentum, Nesterov, Regulariser
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.standby.remote_primary_link import SILENT_S, UNREACHABLE_S
from downpour.paramserver.standby.remote_roles import RemotePrimary
from downpour.paramserver.standby.trouble import Kind
from downpour.paramserver.transport.names import WireName
from downpour.paramserver.transport.network.compress import room_for, wire_dtype
from tests.helpers.partition_pairs import (
    answered,
    assert_nothing_is_lost,
    assert_same,
    push_batches,
    work_through,
)
from tests.helpers.remote_pairs import REMOTE_POINTS, RemotePair, lose_host_at, while_frozen
from tests.helpers.served_partitions import (
    DEADLINE_S,
    EXACT,
    KEY,
    F,
    P,
    Q,
    by_deadline,
    gradient_of,
    leave,
)

NOISY = UpdateConfig(
    rule=Momentum(),
    schedule=Schedule(learning_rate=0.1),
    guard=Guard(),
    batches_per_epoch=Q,
    epoch_examples=32 * Q,
)
WAYS = {"shared": Access(transport="shared"), "network": None}
FEWER_BITS: tuple[WireName, ...] = ("int8", "int4", "bfloat16")


@pytest.fixture
def pair(caplog: pytest.LogCaptureFixture) -> Iterator[RemotePair]:
    caplog.set_level(logging.CRITICAL)
    with contextlib.closing(RemotePair()) as pair:
        yield pair


def options(pair: RemotePair, way: str) -> dict[str, Access]:
    """A client's, for reaching the primary; a follower that is promoted is reached likewise."""
    if way in FEWER_BITS:
        return {"access": pair.access(wire=way)}
    return {"access": WAYS[way] or pair.access()}


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (NOISY, "network"),
        (replace(NOISY, rule=Nesterov()), "shared"),
        (replace(NOISY, rule=AdamW(weight_decay=0.01), average_decay=0.9), "int8"),
        (replace(NOISY, regulariser=Regulariser(weight_decay=1e-2)), "int4"),
        (
            replace(NOISY, policy=StalenessPolicy(staleness_policy="drop", staleness_bound=4)),
            "bfloat16",
        ),
    ],
    ids=["momentum", "nesterov", "adamw", "decay", "drop"],
)
def test_a_follower_is_the_same_to_the_bit_at_every_version(config: UpdateConfig, way: str) -> None:
    """Through refusals, duplicates, a quarantine, and a second follower that joins midway."""
    rng = np.random.default_rng(3)
    with contextlib.closing(RemotePair(config=config)) as pair:
        client = pair.client(num_mailboxes=2, **options(pair, way))
        seen = set[Outcome]()
        for step in range(60):
            box, poisoned = step % 2, step % 5 == 4
            gradient = torch.from_numpy(rng.standard_normal(P).astype(np.float32))
            moments = torch.from_numpy(rng.random((1, 3, F)).astype(np.float32)) + 2
            if poisoned:
                gradient[3] = torch.nan
            client.mailboxes.gradients[box].copy_(gradient)
            client.mailboxes.moments[box].copy_(moments)
            batch = step - 1 if step % 6 == 5 else step
            push_batches(
                client,
                box,
                (batch,),
                replica=int(poisoned),
                versions=[0 if step % 7 == 6 else pair.versions()[0]],
                gradient_norm=1.0 if poisoned else float(gradient.norm()),
            )
            seen.update(answered(client))
            assert_same(pair.primary, pair.follower)
            if step == 30:
                pair.follower = pair.follow()
                assert_same(pair.primary, pair.follower)
        assert seen >= {Outcome.APPLIED, Outcome.DUPLICATE, Outcome.REFUSED_GRADIENT}
        # What it is sent is as long as what came, and no longer.
        wire = wire_dtype(way) if way in FEWER_BITS else WireDtype.FLOAT32
        primary = pair.primary._replication.role
        assert isinstance(primary, RemotePrimary)
        assert primary.link._push_bytes == room_for(wire, P).nbytes + 12 * F
        before = pair.weights()
        pair.primary.stop()
        pair.fail_over()
        assert torch.equal(pair.weights(), before)


@pytest.mark.parametrize("point", REMOTE_POINTS)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_was_answered_or_seen_is_lost_with_the_primarys_machine(
    pair: RemotePair, point: str, count: int, way: str
) -> None:
    """With what lay in the buffers of its sockets; the weights are what each push once makes."""
    lose_host_at(pair, point, count)
    client = pair.client(num_mailboxes=8, **options(pair, way))
    assert_nothing_is_lost(pair, client, lambda: pair.client(num_mailboxes=1, **options(pair, way)))


def be_impatient(pair: RemotePair) -> None:
    """Have the primary give a follower up soon after it falls silent."""
    primary = pair.primary._replication.role
    assert isinstance(primary, RemotePrimary)
    primary.link._deadline_s = 0.2


def test_a_follower_is_reached_over_the_network_only_once_it_is_the_partition(
    pair: RemotePair,
) -> None:
    work_through(pair, range(3), pair.client(num_mailboxes=1))
    primary = pair.servers[0]
    pair.servers[0] = pair.follower
    with pytest.raises(DeadlineExceeded):
        ParameterClient(pair.endpoints, key=KEY, access=pair.access(), deadline_s=0.2)
    pair.servers[0] = primary
    primary.stop()
    pair.fail_over()
    work_through(pair, range(3, 6), pair.client(num_mailboxes=1))
    assert pair.versions() == [6]


def test_a_primary_that_is_cut_off_answers_and_shows_nothing_until_it_is_told_to_go_on_alone(
    pair: RemotePair,
) -> None:
    client = pair.client(num_mailboxes=2)
    work_through(pair, range(3), client)
    pair.relay.cut(power=True)
    be_impatient(pair)
    leave(client, 0, 3)
    push_batches(client, 0, (3,))
    by_deadline(lambda: pair.primary.waits_for_word == 1)
    assert not pair.primary.has_follower
    leave(client, 1, 4)
    push_batches(client, 1, (4,))  # comes while it waits for the word
    assert client.collect(0.05) == []
    assert pair.versions() == [3]
    pair.primary.let_alone(2)  # the word on a follower that there is not
    assert client.collect(0.05) == []
    pair.primary.let_alone(1)
    while client.in_flight(0) or client.in_flight(1):
        assert {s.outcomes for s in client.wait()} <= {(Outcome.APPLIED,)}
    assert pair.versions() == [5]
    assert pair.primary.waits_for_word is None
    pair.follower = pair.follow()
    assert_same(pair.primary, pair.follower)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("silent", f"its primary has been silent for {SILENT_S:g} s"),
        (
            "unreachable",
            f"its primary's machine has acknowledged nothing for {UNREACHABLE_S:g} s",
        ),
    ],
)
def test_a_follower_that_is_cut_off_says_so_and_can_take_over_while_the_primary_lives(
    pair: RemotePair, kind: Kind, why: str
) -> None:
    """Nobody tells the old primary: it holds what its follower has not, for good."""
    old, client = pair.primary, pair.client(num_mailboxes=2)
    work_through(pair, range(3), client)
    pair.relay.cut(power=kind == "silent")
    leave(client, 0, 3)
    push_batches(client, 0, (3,))
    be_impatient(pair)
    trouble = pair.follower.await_trouble(DEADLINE_S)
    assert (trouble and trouble.kind, str(trouble)) == (kind, why)
    pair.fail_over()
    work_through(pair, range(3, 9), pair.client(num_mailboxes=1))
    by_deadline(lambda: old.waits_for_word == 1)
    assert client.collect(0.05) == []
    assert old.call(lambda state: state.version) == 3
    assert pair.versions() == [9]
    old.stop()


def test_a_primary_that_was_paused_finds_that_it_is_the_partition_no_more(
    pair: RemotePair,
) -> None:
    old, client = pair.primary, pair.client(num_mailboxes=2)
    work_through(pair, range(3), client)

    def promote_and_go_on() -> None:
        leave(client, 0, 3)
        push_batches(client, 0, (3,))
        client.flush()
        pair.fail_over()
        work_through(pair, range(3, 9), pair.client(num_mailboxes=1))

    while_frozen(old, promote_and_go_on)
    by_deadline(lambda: old.failure is not None)
    assert isinstance(old.failure, Fenced)
    with pytest.raises(ConnectionLost):
        answered(client)
    assert pair.versions() == [9]


def test_a_follower_that_was_paused_is_given_up_at_the_deadline(pair: RemotePair) -> None:
    client = pair.client(num_mailboxes=1)
    work_through(pair, range(3), client)

    def wait_for_word() -> None:
        be_impatient(pair)
        leave(client, 0, 3)
        push_batches(client, 0, (3,))
        by_deadline(lambda: pair.primary.waits_for_word == 1)

    while_frozen(pair.follower, wait_for_word)
    assert client.collect(0.05) == []
    pair.follower = pair.follow()  # that another one comes is the word
    assert answered(client) == (Outcome.APPLIED,)
    work_through(pair, range(4, 8), client)
    assert_same(pair.primary, pair.follower)


def test_of_two_followers_the_later_one_counts(pair: RemotePair) -> None:
    client = pair.client(num_mailboxes=1)
    first = pair.follower
    work_through(pair, range(3), client)
    pair.follower = pair.follow()
    trouble = first.await_trouble(DEADLINE_S)
    assert trouble is not None
    assert trouble.kind == "closed"
    work_through(pair, range(3, 6), client)
    assert_same(pair.primary, pair.follower)
    with pytest.raises(ConnectionLost):
        pair.follow(generation=1)
    assert pair.primary.has_follower
    work_through(pair, range(6, 9), client)
    assert_same(pair.primary, pair.follower)


def test_a_follower_joins_while_pushes_go_on(pair: RemotePair) -> None:
    """They are applied at once meanwhile, and in copies."""
    client, batch = pair.client(num_mailboxes=8, access=WAYS["shared"]), 0
    for _ in range(4):
        joining: list[PartitionServer] = []
        for _ in range(40):
            for box in range(8):
                if not client.in_flight(box):
                    leave(client, box, batch)
                    push_batches(client, box, (batch,))
                    batch += 1
            client.wait()
            if not joining:
                joining.append(pair.follow())
        pair.follower = joining[0]
    while any(client.in_flight(box) for box in range(8)):
        client.wait()
    assert pair.versions() == [batch]
    assert_same(pair.primary, pair.follower)


def test_a_follower_whose_state_is_another_one_ends(pair: RemotePair) -> None:
    work_through(pair, range(3), pair.client(num_mailboxes=1))

    def lose_an_update(state: object) -> None:
        pair.follower._state.ledger.version -= 1

    pair.follower.call(lose_an_update)
    work_through(pair, range(3, 5), pair.client(num_mailboxes=1))
    by_deadline(lambda: pair.follower.failure is not None)
    assert isinstance(pair.follower.failure, Diverged)


def test_without_waiting_pushes_are_answered_until_the_follower_is_known_to_be_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it lacks when it takes over is pushed again, and applied once."""
    caplog.set_level(logging.CRITICAL)
    with contextlib.closing(RemotePair(waits_for_follower=False)) as pair:
        old, client = pair.primary, pair.client(num_mailboxes=1)
        work_through(pair, range(3), client)
        by_deadline(lambda: pair.follower.call(lambda state: state.version) == 3)
        pair.relay.cut(power=True)
        work_through(pair, range(3, 8), client)
        be_impatient(pair)
        by_deadline(lambda: old.waits_for_word == 1)
        leave(client, 0, 8)
        push_batches(client, 0, (8,))
        assert client.collect(0.05) == []
        pair.fail_over()
        assert pair.versions() == [3]
        again = pair.client(num_mailboxes=1)
        work_through(pair, range(3, 9), again)
        leave(again, 0, 1)
        push_batches(again, 0, (1,))
        assert answered(again) == (Outcome.DUPLICATE,)
        assert pair.versions() == [9]
        assert torch.equal(pair.weights(), -0.5 * sum(gradient_of(b) for b in range(9)))  # type: ignore[arg-type]
        old.stop()


@pytest.mark.parametrize("name", ["bounded", "synchronous"])
@pytest.mark.parametrize("way", ["shared", "network", "int8"])
def test_permits_and_rounds_go_on_after_a_promotion(name: str, way: str) -> None:
    about = {"staleness_bound": 2} if name == "bounded" else {"round_pushes": 2}
    policy = StalenessPolicy(staleness_policy=name, **about)  # type: ignore[arg-type]
    with contextlib.closing(RemotePair(config=replace(EXACT, policy=policy))) as pair:
        for begin in (0, 6):
            client = pair.client(num_mailboxes=2, **options(pair, way))
            weights, versions = np.zeros(P, np.float32), [0]
            for first in range(begin, begin + 6, 2):
                for box in (0, 1):
                    client.ask(box)
                while not (client.permitted(0) and client.permitted(1)):
                    client.wait()
                client.pull(weights, versions)
                for box in (0, 1):
                    leave(client, box, first + box)
                    push_batches(client, box, (first + box,), versions=versions)
                while client.in_flight(0) or client.in_flight(1):
                    client.wait()
            assert_same(pair.primary, pair.follower)
            if not begin:
                pair.primary.stop()
                pair.fail_over()
                pair.follower = pair.follow()
        assert pair.versions() == [12]
