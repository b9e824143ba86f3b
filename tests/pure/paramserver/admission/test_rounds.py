"""Synchronous rounds: who may begin a step, and that nobody waits for ever."""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable

import pytest
import torch

from downpour.paramserver.admission.permits import DuePush, Key, Permit
from downpour.paramserver.admission.rounds import RoundPermits
from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import WAITING
from downpour.paramserver.partition.ledger import RoundLedger
from downpour.paramserver.partition.state import PartitionState
from tests.helpers.rounds import PARTITION, P, Q, config, moments_of, new_version, push

torch.set_num_threads(1)


def test_permits_are_given_for_one_round_and_taken_back() -> None:
    rounds: RoundPermits[str] = RoundPermits(3)
    for box in range(5):
        rounds.ask((1, box))
    assert [rounds.next(0, 0) for _ in range(3)] == [Permit((1, box)) for box in range(3)]
    assert rounds.next(0, 0) is None
    rounds.push((1, 2), 0, "c")
    assert rounds.next(0, 0) == DuePush((1, 2), "c")
    assert rounds.next(1, 0) is None  # it counts, so there is no room for a fourth
    rounds.push((1, 0), 0, "a")
    assert rounds.next(1, 0) == DuePush((1, 0), "a")
    assert rounds.next(1, 0) == Permit((1, 3))  # that one came to nothing
    # A new round: two of the former are out, and count no more.
    assert rounds.next(2, 2) == Permit((1, 4))
    assert rounds.num_out == 3
    for box in (0, 2):
        rounds.ask((1, box))
    assert [rounds.next(2, 2) for _ in range(3)] == [Permit((1, 0)), Permit((1, 2)), None]
    rounds.ask((2, 0))
    rounds.leave(1)
    assert rounds.num_out == 0
    assert rounds.next(2, 2) == Permit((2, 0))


def test_messages_that_nobody_may_send() -> None:
    rounds: RoundPermits[str] = RoundPermits(2)
    rounds.ask((1, 0))
    with pytest.raises(MalformedMessage, match="a second permit"):
        rounds.ask((1, 0))
    with pytest.raises(MalformedMessage, match="without a permit"):
        rounds.push((1, 0), 0, "a")
    assert rounds.next(4, 4) == Permit((1, 0))
    with pytest.raises(MalformedMessage, match="computed on version 3, permitted at 4"):
        rounds.push((1, 0), 3, "a")
    rounds.push((1, 0), 4, "a")
    with pytest.raises(MalformedMessage, match="without a permit"):
        rounds.push((1, 0), 4, "a")


class Net:
    """Slots, partitions and messages between them, in an order that a seed decides."""

    def __init__(
        self, seed: int, *, pushes: int, slots: int, partitions: int, kills: int, bad: bool
    ) -> None:
        self.rng, self.kills, self.bad = random.Random(seed), kills, bad
        of = config(pushes, steps=slots)
        self.states = [PartitionState(PARTITION, of, new_version()) for _ in range(partitions)]
        self.rounds: list[RoundPermits[Push]] = [RoundPermits(slots) for _ in range(partitions)]
        self.partitions = partitions
        self.connections = [[i for i in range(slots) if i % 2 == c] for c in range(2)]
        self.names = itertools.count()
        self.alive = {next(self.names): group for group in self.connections if group}
        self.pool = deque(range(Q))
        self.to: dict[tuple[int, int], deque[tuple[int, Push | None]]] = {}
        """By connection and partition: mailbox, and a push or, for None, an ask."""
        self.back: dict[tuple[int, int], deque[tuple[int, Outcome]]] = {}
        self.slot: dict[Key, dict[str, object]] = {}
        for name in self.alive:
            self._connect(name)

    def _connect(self, name: int) -> None:
        for index in range(self.partitions):
            self.to[name, index], self.back[name, index] = deque(), deque()
        for box in self.alive[name]:
            self.slot[name, box] = {"at": "idle"}

    def settled(self, batch: int) -> bool:
        return all(s.ledger.applied.get(0, batch) != WAITING for s in self.states)

    def actions(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for (name, index), queue in self.to.items():
            if queue:
                found.append(lambda n=name, i=index: self._serve(n, i))  # type: ignore[misc]
        for (name, index), answers in self.back.items():
            if answers:
                found.append(lambda n=name, i=index: self._hear(n, i))  # type: ignore[misc]
        for key, slot in self.slot.items():
            if slot["at"] == "idle" and self.pool:
                found.append(lambda k=key: self._begin(k))  # type: ignore[misc]
            if slot["at"] == "permitted":
                found.append(lambda k=key: self._pull(k))  # type: ignore[misc]
            if slot["at"] == "computing":
                found.append(lambda k=key: self._push(k))  # type: ignore[misc]
        return found

    def _begin(self, key: Key) -> None:
        batch = self.pool.popleft()
        if self.settled(batch):
            return
        self.slot[key] = {"at": "asking", "batch": batch}
        self.to[key[0], 0].append((key[1], None))

    def _pull(self, key: Key) -> None:
        versions = [s.weights_version for s in self.states]
        self.slot[key] |= {"at": "computing", "versions": versions}

    def _push(self, key: Key) -> None:
        slot = self.slot[key]
        versions, batch = slot["versions"], slot["batch"]
        assert isinstance(versions, list)
        assert isinstance(batch, int)
        slot |= {"at": "pushed", "missing": self.partitions}
        loss = math.nan if self.bad and batch % 4 == 1 else 1.0
        for index, version in enumerate(versions):
            self.to[key[0], index].append((key[1], push(batch, version, torch.ones(P), loss=loss)))

    def _serve(self, name: int, index: int) -> None:
        box, message = self.to[name, index].popleft()
        rounds, state = self.rounds[index], self.states[index]
        if message is None:
            rounds.ask((name, box))
        else:
            rounds.push((name, box), message.version, message)
        self._go_on(index)
        assert rounds.num_held == 0
        state.check()

    def _go_on(self, index: int) -> None:
        rounds, state = self.rounds[index], self.states[index]
        while (due := rounds.next(state.version, state.weights_version)) is not None:
            if isinstance(due, Permit):
                outcome = Outcome.PERMITTED
            else:
                outcome = state.apply(due.push, torch.ones(P), moments_of(0), new_version)
            name, box = due.key
            self.back[name, index].append((box, outcome))

    def _hear(self, name: int, index: int) -> None:
        box, outcome = self.back[name, index].popleft()
        slot = self.slot[name, box]
        if outcome is Outcome.PERMITTED:
            if index + 1 < self.partitions:
                self.to[name, index + 1].append((box, None))
            else:
                slot["at"] = "permitted"
            return
        missing, batch = slot["missing"], slot["batch"]
        assert isinstance(missing, int)
        assert isinstance(batch, int)
        slot["missing"] = missing - 1
        if missing == 1:
            self.slot[name, box] = {"at": "idle"}
            if not self.settled(batch):
                self.pool.append(batch)

    def kill(self) -> None:
        """A process dies: what it had sent is still read or not, and another comes."""
        name = self.rng.choice(list(self.alive))
        boxes = self.alive.pop(name)
        lost = [s["batch"] for k, s in self.slot.items() if k[0] == name and "batch" in s]
        for index in range(self.partitions):
            for _ in range(self.rng.randint(0, len(self.to[name, index]))):
                self._serve(name, index)
            del self.to[name, index]
            self.rounds[index].leave(name)
        for index in range(self.partitions):
            self._go_on(index)
            del self.back[name, index]
        for box in boxes:
            del self.slot[name, box]
        new = next(self.names)
        self.alive[new] = boxes
        self._connect(new)
        self.pool.extend(batch for batch in lost if isinstance(batch, int))

    def run(self) -> None:
        while not all(self.settled(batch) for batch in range(Q)):
            actions = self.actions()
            assert actions, "nobody goes on"
            if self.kills and self.rng.random() < 0.05:
                self.kills -= 1
                self.kill()
                continue
            self.rng.choice(actions)()


@pytest.mark.parametrize(
    ("pushes", "slots", "partitions", "kills", "bad"),
    [
        (1, 1, 1, 0, False),
        (4, 4, 1, 0, False),
        (3, 3, 3, 0, True),
        (3, 5, 1, 0, False),
        (3, 6, 3, 0, True),
        (4, 4, 2, 6, False),
        (3, 6, 3, 6, True),
        (1, 5, 2, 3, False),
        (6, 6, 2, 8, True),
    ],
)
def test_in_whatever_order_messages_come_everything_is_settled_once(
    pushes: int, slots: int, partitions: int, kills: int, bad: bool
) -> None:
    """Three partitions, asked one after the other; deaths; mini-batches that are refused."""
    dropped = 0
    for seed in range(5):
        net = Net(seed, pushes=pushes, slots=slots, partitions=partitions, kills=kills, bad=bad)
        net.run()
        for state in net.states:
            assert state.weights_version == state.version  # the last round is closed
            assert state.ledger.applied.num_applied + state.ledger.applied.num_refused == Q
            assert state.version == state.ledger.applied.num_applied
            dropped += state.ledger.counts()["dropped"]
    if not kills:
        assert bool(dropped) == (slots > pushes)  # nothing is late where there is no backup


def test_without_backup_workers_and_deaths_every_partition_has_the_same_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(4):
        net = Net(seed, pushes=3, slots=3, partitions=3, kills=0, bad=False)
        taken: list[list[tuple[int, int]]] = [[], [], []]
        enter = RoundLedger.enter

        def noted(ledger: RoundLedger, push: Push, outcome: Outcome, scale: float) -> float:
            index = next(i for i, s in enumerate(net.states) if s.ledger is ledger)  # noqa: B023
            taken[index].append((ledger.weights_version, push.batches[0]))  # noqa: B023
            return enter(ledger, push, outcome, scale)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(RoundLedger, "enter", noted)
            net.run()
        assert len({frozenset(of) for of in taken}) == 1
