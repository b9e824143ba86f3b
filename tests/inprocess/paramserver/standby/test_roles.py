"""A partition and its follower over real sockets and shared memory, and deaths at every point."""

import contextlib
import logging
import os
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from downpour.paramserver.errors import ConnectionLost, Fenced
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.adaptive import AdamW
from downpour.paramserver.rules.policy import Guard, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Adagrad, Momentum, Nesterov, Regulariser
from downpour.paramserver.standby.follower_link import FOLLOWER_DEADLINE_S
from downpour.paramserver.transport.shared import replication
from tests.helpers.partition_pairs import (
    POINTS,
    Clock,
    Pair,
    answered,
    assert_nothing_is_lost,
    assert_same,
    dumped,
    freeze,
    kill_at,
    push_batches,
    work_through,
)
from tests.helpers.served_partitions import (
    EXACT,
    KEY,
    F,
    P,
    Q,
    by_deadline,
    leave,
)

NOISY = UpdateConfig(
    rule=Momentum(),
    schedule=Schedule(learning_rate=0.1),
    guard=Guard(),
    batches_per_epoch=Q,
    epoch_examples=32 * Q,
)


@pytest.mark.parametrize(
    "config",
    [
        NOISY,
        replace(NOISY, rule=Nesterov()),
        replace(NOISY, rule=AdamW(weight_decay=0.01), average_decay=0.9),
        replace(NOISY, rule=Adagrad(), regulariser=Regulariser(clip_norm=1.0)),
        replace(NOISY, regulariser=Regulariser(weight_decay=1e-2)),
        replace(NOISY, policy=StalenessPolicy(staleness_policy="drop", staleness_bound=4)),
    ],
    ids=["momentum", "nesterov", "adamw", "clipped", "decay", "drop"],
)
@pytest.mark.parametrize("large", [False, True])
def test_a_follower_is_the_same_to_the_bit_at_every_version(
    config: UpdateConfig, large: bool
) -> None:
    """Through refusals, duplicates, poison, a quarantine, and a follower that joins midway."""
    num = (1 << 18) + 16 if large else P
    rng = np.random.default_rng(3)
    weights = torch.from_numpy(rng.standard_normal(num).astype(np.float32))
    pair = Pair(config=config, weights=weights, num_decayed=num // 2)
    with contextlib.closing(pair):
        client = pair.client(num_mailboxes=2)
        seen: set[Outcome] = set()
        for step in range(60):
            box = step % 2
            gradient = torch.from_numpy(rng.standard_normal(num).astype(np.float32))
            moments = torch.from_numpy(rng.random((1, 3, F)).astype(np.float32)) + 2
            poisoned = step % 5 == 4
            if poisoned:
                gradient[3] = torch.nan
            client.mailboxes.gradients[box].copy_(gradient)
            client.mailboxes.moments[box].copy_(moments)
            kept = gradient.clone()
            version = 0 if step % 7 == 6 else pair.versions()[0]
            batch = step - 1 if step % 6 == 5 else step
            norm = float(gradient.norm()) if not poisoned else 1.0
            push_batches(
                client,
                box,
                (batch,),
                replica=int(poisoned),
                versions=[version],
                gradient_norm=norm,
            )
            seen.update(answered(client))
            assert_same(pair.primary, pair.follower)
            if config.spoils_gradients:
                assert torch.equal(client.mailboxes.gradients[box].nan_to_num(), kept.nan_to_num())
            if step == 30:
                pair.follower.stop()
                by_deadline(lambda: not pair.primary.has_follower)
                pair.follower = pair.follow()
                assert_same(pair.primary, pair.follower)
        wanted = {
            *(Outcome.APPLIED, Outcome.DUPLICATE, Outcome.REFUSED_GRADIENT),
            Outcome.REFUSED_QUARANTINE,
        }
        if config.policy.staleness_policy == "drop":
            wanted.add(Outcome.REFUSED_STALE)
        assert seen >= wanted
        before = dumped(pair.primary)
        pair.primary.stop()
        pair.fail_over()
        assert dumped(pair.follower)[0] == before[0]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("bell_every", [1, 3])
def test_nothing_that_was_answered_or_seen_is_lost_wherever_the_primary_dies(
    pair: Pair, point: str, count: int, bell_every: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Pushes are named and sent again until answered; the weights are what each once makes."""
    caplog.set_level(logging.CRITICAL)
    kill_at(pair.primary, point, count)
    client = pair.client(num_mailboxes=8, bell_every=bell_every)
    assert_nothing_is_lost(pair, client, lambda: pair.client(num_mailboxes=1))


def test_a_follower_that_dies_holds_nobody_up_and_another_may_come(pair: Pair) -> None:
    client = pair.client(num_mailboxes=1)
    work_through(pair, range(5), client)
    for begin in (5, 10, 15):
        pair.follower.stop()
        work_through(pair, range(begin, begin + 5), client)
        pair.follower = pair.follow()
        assert_same(pair.primary, pair.follower)
    work_through(pair, range(20, 25), client)
    pair.primary.stop()
    pair.fail_over()
    work_through(pair, range(25, 30), pair.client(num_mailboxes=1))
    assert pair.versions() == [30]


def test_a_frozen_follower_is_given_up_at_the_deadline_and_can_never_be_the_partition() -> None:
    clock = Clock()
    with contextlib.closing(Pair(clock=clock)) as pair:
        client = pair.client(num_mailboxes=2)
        work_through(pair, range(3), client)
        thaw = freeze(pair.follower)
        leave(client, 0, 3)
        push_batches(client, 0, (3,))
        by_deadline(lambda: pair.versions() == [4])
        assert client.collect(0.05) == []  # not answered: the follower does not have it
        clock.now_s = FOLLOWER_DEADLINE_S + 0.1
        assert answered(client) == (Outcome.APPLIED,)
        assert not pair.primary.has_follower
        work_through(pair, range(4, 8), client)
        thaw.set()
        with pytest.raises(Fenced):
            pair.follower.promote()
        pair.follower = pair.follow()
        assert_same(pair.primary, pair.follower)


def test_a_primary_whose_follower_became_the_partition_answers_nobody_any_more(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """A primary that is alive after all, however far it had come."""
    caplog.set_level(logging.CRITICAL)
    client = pair.client(num_mailboxes=2)
    work_through(pair, range(3), client)
    before = pair.primary
    pair.fail_over()
    leave(client, 0, 3)

    def push_one_more() -> None:
        push_batches(client, 0, (3,))
        answered(client)

    with pytest.raises(ConnectionLost):  # it is not answered: the connection is closed
        push_one_more()
    by_deadline(lambda: before.failure is not None)
    assert isinstance(before.failure, Fenced)
    new = pair.client(num_mailboxes=1)
    work_through(pair, range(3, 6), new)
    assert pair.versions() == [6]


def test_of_a_primary_that_gives_up_and_a_follower_that_takes_over_one_wins() -> None:
    """The token, from both sides at once."""
    for _ in range(200):
        token = replication.make_token()
        start, won = threading.Barrier(2), list[bool]()

        def run(token: int = token, start: Any = start, won: Any = won) -> None:
            start.wait()
            won.append(replication.take(token))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(token)
        assert sorted(won) == [False, True]


def test_a_second_follower_takes_the_place_of_the_first(pair: Pair) -> None:
    client = pair.client(num_mailboxes=1)
    work_through(pair, range(3), client)
    first, pair.follower = pair.follower, pair.follow()
    by_deadline(lambda: has_follower_with_all(pair))
    work_through(pair, range(3, 6), client)
    assert_same(pair.primary, pair.follower)
    with pytest.raises(Fenced):
        first.promote()


def has_follower_with_all(pair: Pair) -> bool:
    return pair.follower.call(lambda state: state.version) == pair.versions()[0]


def test_strangers_do_not_follow(pair: Pair) -> None:
    for first in (
        replication.follow(b"x" * len(KEY), pair.parts[0]),
        replication.follow(KEY, replace(pair.parts[0], total_parameters=P + 16)),
        replication.MAGIC + b"\x01",
    ):
        peer = pair.peer()
        peer.say(first)
        assert peer.hung_up_on
    assert set(pair.dropped()) == {"NotAuthenticated", "MalformedMessage"}
    assert pair.primary.has_follower


def test_bounded_staleness_goes_on_after_a_promotion() -> None:
    """Permits are with connections: those of the primary end with it."""
    policy = StalenessPolicy(staleness_policy="bounded", staleness_bound=2)
    with contextlib.closing(Pair(config=replace(EXACT, policy=policy))) as pair:
        for begin in (0, 5):
            client = pair.client(num_mailboxes=1)
            weights, versions = np.zeros(P, np.float32), [0]
            for batch in range(begin, begin + 5):
                client.ask(0)
                while not client.permitted(0):
                    client.wait()
                client.pull(weights, versions)
                leave(client, 0, batch)
                push_batches(client, 0, (batch,), versions=versions)
                assert answered(client) == (Outcome.APPLIED,)
            if not begin:
                assert_same(pair.primary, pair.follower)
                client.ask(0)  # a permit that goes down with the primary
                client.flush()
                pair.primary.stop()
                pair.fail_over()
        assert pair.versions() == [10]
