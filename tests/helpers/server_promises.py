"""What a partition promises whichever way it is reached; for tests of every transport."""

import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from downpour.models.flat import FlatModel
from downpour.models.mlp import MnistNet
from downpour.paramserver.client import ParameterClient, PushResult
from downpour.paramserver.messages import (
    MAX_MAILBOXES,
    Outcome,
)
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Regulariser, Rule
from tests.helpers.close import assert_close
from tests.helpers.served_partitions import (
    DEADLINE_S,
    KEY,
    Bystander,
    Cluster,
    F,
    P,
    Q,
    by_deadline,
    gradient_of,
    has_connections,
    leave,
    num_descriptors,
    push,
    send,
    settle,
)

torch.set_num_threads(1)


Optimizer = Callable[..., torch.optim.Optimizer]


def one_replica_with_one_step_in_flight_is_torch_optim(
    make: Callable[..., Cluster],
    rule: Rule,
    rate: float,
    optimizer: Optimizer,
    options: dict[str, Any],
) -> None:
    steps, batch_size, decay = 150, 20, 1e-3
    generator = torch.Generator().manual_seed(11)
    images = (torch.rand(steps * batch_size // 10, 784, generator=generator) > 0.8).float()
    labels = (images[:, :392].sum(1) - images[:, 392:].sum(1)).add(50).div(10).long().clamp(0, 9)
    draws = torch.randint(len(images), (steps, batch_size), generator=generator)

    flat = FlatModel(MnistNet(batch_norm=True, seed=3))
    layout = flat.layout
    cluster = make(
        3,
        weights=flat.weights,
        num_features=layout.num_features,
        num_decayed=layout.decayed,
        config=UpdateConfig(
            rule=rule,
            regulariser=Regulariser(weight_decay=decay),
            schedule=Schedule(learning_rate=rate),
            batches_per_epoch=steps,
            epoch_examples=steps * batch_size,
        ),
    )
    reference = MnistNet(batch_norm=True, seed=3)
    by_name = dict(reference.named_parameters())
    groups = [
        {"params": [by_name[e.name] for e in layout.entries if e.decays], "weight_decay": decay},
        {"params": [by_name[e.name] for e in layout.entries if not e.decays]},
    ]
    theirs = optimizer(groups, lr=rate, **options)

    with contextlib.closing(cluster):
        client = cluster.client(num_mailboxes=1)
        weights, versions = torch.empty(layout.num_parameters), [0] * 3
        flat.bind(weights, client.mailboxes.gradients[0], client.mailboxes.moments[0][0])
        seen, losses = [], []
        for step, draw in enumerate(draws):
            x, y = images[draw], labels[draw]
            theirs.zero_grad()
            expected = functional.cross_entropy(reference(x), y)
            expected.backward()  # type: ignore[no-untyped-call]
            theirs.step()

            client.pull(weights.numpy(), versions)
            assert versions == [step] * 3
            flat.zero_gradient()
            loss = functional.cross_entropy(flat.module(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            seen.append(flat.moments[1:].clone())
            losses.append(loss.item())
            send(
                client,
                step,
                versions=versions,
                examples=batch_size,
                loss=losses[-1],
                gradient_norm=float(client.mailboxes.gradients[0].norm()),
            )
            assert settle(client) == (Outcome.APPLIED,) * 3

        assert losses[-1] < losses[0] / 2, "nothing was learnt, so nothing was shown"
        statistics = torch.empty(2, layout.num_features)
        client.pull_statistics(weights.numpy(), statistics.numpy(), versions)
        for entry in layout.entries:
            ours = weights[entry.start : entry.stop].view(entry.shape)
            theirs_ = by_name[entry.name].detach()
            assert_close(ours, theirs_, rtol=1e-5, atol=1e-5)
        average = seen[0].clone()  # the moving averages, in the plainest of ways
        for n, moments in enumerate(seen):
            average += (moments - average) * max(0.01, 1 / (n + 1))
        assert_close(statistics, average, rtol=1e-4, atol=1e-5)


def several_clients_at_once_count_each_mini_batch_once(two: Cluster) -> None:
    # Each pushes all the mini-batches, in an order of its own, from several mailboxes.
    num, workers = 60, 3
    outcomes: list[list[Outcome]] = [[] for _ in range(workers)]
    clients = [two.client(num_mailboxes=4) for _ in range(workers)]

    def work(me: int) -> None:
        client = clients[me]
        order = random.Random(me).sample(range(num), num)
        for start in range(0, num, 4):
            unit = list(enumerate(order[start : start + 4]))
            for mailbox, batch in unit:
                leave(client, mailbox, batch)
                send(client, batch, mailbox)
            waiting = len(unit)
            while waiting:
                for settled in client.wait():
                    outcomes[me] += settled.outcomes
                    waiting -= 1

    threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    total = sum((gradient_of(batch) for batch in range(num)), torch.zeros(P))
    assert torch.equal(two.weights(), -0.5 * total)
    assert two.versions() == [num, num]
    every = [outcome for of_one in outcomes for outcome in of_one]
    assert every.count(Outcome.APPLIED) == 2 * num
    assert every.count(Outcome.DUPLICATE) == 2 * num * (workers - 1)


def a_second_push_of_a_mini_batch_is_ignored(two: Cluster) -> None:
    client, other = two.client(num_mailboxes=1), two.client(num_mailboxes=1)
    assert push(client, 7) is Outcome.APPLIED
    before = two.weights()
    assert push(client, 7) is Outcome.DUPLICATE
    assert push(other, 7) is Outcome.DUPLICATE
    assert torch.equal(two.weights(), before)
    assert two.versions() == [1, 1]


def what_is_refused_is_said_so_by_all(two: Cluster) -> None:
    client = two.client(num_mailboxes=1)
    assert push(client, 0, loss=float("nan")) is Outcome.REFUSED_LOSS
    assert push(client, 1, gradient_norm=float("inf")) is Outcome.REFUSED_GRADIENT
    assert push(client, 2, versions=[1, 1]) is Outcome.REFUSED_UNKNOWN
    assert push(client, Q) is Outcome.REFUSED_UNKNOWN
    assert two.versions() == [0, 0]
    assert push(client, 2) is Outcome.APPLIED, "the connection is as good as before"


def a_push_of_several_mini_batches(cluster: Cluster) -> None:
    client = cluster.client(num_mailboxes=1, depth=3)
    assert push(client, 0, batches=(4, 5, 6), examples=96) is Outcome.APPLIED
    assert push(client, 0, batches=(6, 7)) is Outcome.REFUSED_MIXED
    assert cluster.servers[0].call(lambda state: state.ledger.examples) == 96


def pulls_are_of_the_latest_version_with_its_statistics(two: Cluster) -> None:
    client, evaluator = two.client(num_mailboxes=1), two.client()
    weights, statistics = np.empty(P, np.float32), np.empty((2, F), np.float32)
    versions = [-1, -1]
    evaluator.pull_statistics(weights, statistics, versions)
    assert versions == [0, 0]
    assert not weights.any()
    assert statistics.tolist() == [[0.0] * F, [1.0] * F]
    push(client, 3)
    evaluator.pull_statistics(weights, statistics, versions)
    assert versions == [1, 1]
    assert np.array_equal(weights, -0.5 * gradient_of(3).numpy())
    assert statistics.tolist() == [[1.0] * F, [2.0] * F]
    assert evaluator.torn == 0


def as_many_mailboxes_as_there_may_be_without_reading_an_answer(cluster: Cluster) -> None:
    client = cluster.client(num_mailboxes=MAX_MAILBOXES)
    for mailbox in range(MAX_MAILBOXES):
        leave(client, mailbox, mailbox)
        send(client, mailbox, mailbox)
    by_deadline(lambda: cluster.versions() == [MAX_MAILBOXES])
    settled: list[PushResult] = []
    while len(settled) < MAX_MAILBOXES:
        settled += client.wait()
    assert {s.mailbox for s in settled} == set(range(MAX_MAILBOXES))
    assert {s.outcomes for s in settled} == {(Outcome.APPLIED,)}
    assert cluster.dropped() == {}


def a_gradient_that_is_not_finite_under_a_header_that_is(two: Cluster) -> None:
    client = two.client(num_mailboxes=1)
    leave(client, 0, 0)
    client.mailboxes.gradients[0][-1] = torch.nan  # in the second partition only
    send(client, 0)
    assert settle(client) == (Outcome.APPLIED, Outcome.REFUSED_GRADIENT)
    assert two.versions() == [1, 0]
    assert two.servers[1].call(lambda state: dict(state.ledger.refusals)) == {0: 1}


def a_client_that_closes_with_pushes_in_flight(cluster: Cluster, bystander: Bystander) -> None:
    client = cluster.client(num_mailboxes=3)
    by_deadline(lambda: has_connections(cluster.servers[0], 2))
    for mailbox in range(3):
        leave(client, mailbox, mailbox)
        send(client, mailbox, mailbox)
    client.close()
    by_deadline(lambda: has_connections(cluster.servers[0], 1))
    # What was sent may have been applied, each once or not at all, but whole.
    flags = cluster.servers[0].call(lambda state: state.ledger.applied.flags(0))
    total = gradient_of(bystander.batch) + sum(
        (gradient_of(b) for b in range(3) if flags[b]), torch.zeros(P)
    )
    assert torch.equal(cluster.weights(), -0.5 * total)
    assert cluster.dropped() == {}, "to leave is no offence"
    assert push(bystander.client, 50) is Outcome.APPLIED


def a_client_that_comes_and_goes_costs_the_partition_nothing(cluster: Cluster) -> None:
    cluster.client(num_mailboxes=1)
    before = num_descriptors()
    for batch in range(5):
        client = ParameterClient(cluster.endpoints, key=KEY, num_mailboxes=3)
        assert push(client, batch) is Outcome.APPLIED
        client.close()
        del client
    by_deadline(lambda: num_descriptors() == before)
