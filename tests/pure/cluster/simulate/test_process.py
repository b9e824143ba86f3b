"""The simulated rotation of slots does what the real one does, in the same order."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.simulate.clock import Clock, Processors
from downpour.cluster.simulate.inputs import Costs, Spread
from downpour.cluster.simulate.partition import Message
from downpour.cluster.simulate.process import Counts, VirtualProcess, VirtualTask, speeds
from downpour.paramserver.client import PushResult
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.transport.link import Pull
from downpour.workers.replica.replicas import Joined, Replicas, Window
from downpour.workers.replica.rotation import PulledWeights, num_mailboxes, turns_together
from downpour.workers.spec import StepConfig

Story = list[tuple[int, tuple[int, ...]]]
"""Windows: whose, and which mini-batches, in the order in which they are assigned."""


class Recorder:
    """Pulls and packets, as they come."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def packet(self, pushes: list[tuple[int, int, tuple[int, ...]]]) -> None:
        self.seen.append(("packet", *pushes))


class FakeClient(Recorder):
    """A `ParameterClient` whose one partition answers a packet at once."""

    num_partitions = 1
    num_asking = 0

    def __init__(self, bell_every: int) -> None:
        super().__init__()
        self._bell_every = bell_every
        self._outbox: list[tuple[int, int, tuple[int, ...]]] = []
        self._answered: list[PushResult] = []

    def start_pull(self, weights: object, versions: list[int]) -> Any:
        self.seen.append("pull")
        return Pull(versions)

    def push(self, *, mailbox: int, replica: int, batches: tuple[int, ...], **_: object) -> None:
        self._outbox.append((mailbox, replica, batches))
        if len(self._outbox) >= self._bell_every:
            self.flush()

    def flush(self) -> None:
        if self._outbox:
            self.packet(self._outbox)
            self._answered += [
                PushResult(mailbox=m, outcomes=(Outcome.APPLIED,)) for m, _, _ in self._outbox
            ]
            self._outbox = []

    def collect(self, wait_s: float = 0.0) -> list[PushResult]:
        answered, self._answered = self._answered, []
        return answered

    def wait(self) -> list[PushResult]:
        self.flush()
        return self.collect()


def really(replicas: tuple[int, ...], config: StepConfig, story: Story) -> list[Any]:
    """What the real thread of steps does."""
    client = FakeClient(turns_together(len(replicas), config))
    boxes = num_mailboxes(len(replicas), config, True)
    step = SimpleNamespace(loss=1.0, gradient_norm=1.0)
    real = Replicas(
        replicas=replicas,
        config=config,
        client=client,  # type: ignore[arg-type]
        mailboxes=[SimpleNamespace(index=i) for i in range(boxes)],  # type: ignore[misc]
        make_copy=lambda: SimpleNamespace(weights=None, step=lambda *_: step),  # type: ignore[arg-type,return-value]
    )
    one = Joined(torch.zeros(1, 1), torch.zeros(1))

    def load(_place: int, count: int) -> list[Joined]:
        return [one] * count

    futures = [
        real.assign(replica, Window(epoch=0, batches=batches, load=load))
        for replica, batches in story
    ]
    left = len(futures)

    def done(_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            real.stop()

    for future in futures:
        future.add_done_callback(done)
    real.run()
    assert all(future.result().unsettled == () for future in futures)
    return client.seen


class FakeWay(Recorder):
    """A connection whose partition answers a packet at once."""

    nearby = True

    def __init__(self, process: VirtualProcess) -> None:
        super().__init__()
        self._process = process

    def version(self) -> int:
        self.seen.append("pull")
        return 0

    def send(self, packet: list[Message]) -> None:
        pushes = [p for p in packet if isinstance(p, Push)]
        self.packet([(p.mailbox, p.replica, p.batches) for p in pushes])
        self._process.answered(0, [(p.mailbox, Outcome.APPLIED) for p in pushes])

    def weights(self) -> None:
        return None

    def ask_weights(self, pulled: PulledWeights, process: VirtualProcess) -> None:
        raise AssertionError("nothing is far away")


def virtually(replicas: tuple[int, ...], config: StepConfig, story: Story) -> list[Any]:
    """What the simulated one does."""
    clock = Clock()
    finished: list[VirtualTask] = []
    process = VirtualProcess(
        replicas=replicas,
        config=config,
        clock=clock,
        processors=Processors(clock, 1.0),
        costs=Costs(step=Spread(mean_s=1.0), apply=Spread(mean_s=0.0)),
        width=1,
        step_times=1.0,
        rng=random.Random(0),
        counts=Counts(),
        finished=finished.append,
        batch_size=1,
    )
    way = FakeWay(process)
    process.start([way])
    # Its first step takes a second: all windows are there before it looks for the next.
    for number, (replica, batches) in enumerate(story):
        process.assign(replica, Lease(number, 0, 0, batches))
    while clock.advance():
        pass
    assert len(finished) == len(story)
    return way.seen


@pytest.mark.parametrize(
    ("replicas", "config"),
    [
        ((0,), StepConfig(concurrent_steps=1)),
        ((0,), StepConfig(concurrent_steps=1, in_flight="all")),
        ((0,), StepConfig(concurrent_steps=5)),
        ((0,), StepConfig(concurrent_steps=5, in_flight="all")),
        ((0, 2), StepConfig(concurrent_steps=5, steps_together=2)),
        ((0, 2), StepConfig(concurrent_steps=5, in_flight="all")),
        ((0, 2, 4, 6, 8), StepConfig(concurrent_steps=5)),
        ((0, 2, 4, 6, 8), StepConfig(concurrent_steps=5, in_flight="all")),
        ((0, 2), StepConfig(concurrent_steps=5, n_fetch=3)),
        ((0, 2), StepConfig(concurrent_steps=5, n_push=2)),
        ((0, 2), StepConfig(concurrent_steps=4, n_push=3, n_fetch=2)),
        ((0, 2), StepConfig(concurrent_steps=4, n_push=3, n_fetch=3, by_push=True)),
    ],
)
def test_the_simulated_rotation_is_the_real_one(
    replicas: tuple[int, ...], config: StepConfig
) -> None:
    rng = random.Random(7)
    story: Story = []
    for number in range(3 * len(replicas)):
        size = rng.randint(1, 40)
        story.append(
            (replicas[number % len(replicas)], tuple(range(100 * number, 100 * number + size)))
        )
    seen = really(replicas, config, story)
    assert any(entry != "pull" and len(entry) > 1 for entry in seen)
    assert virtually(replicas, config, story) == seen


def test_speeds_are_spread_evenly_on_a_logarithmic_scale() -> None:
    found = speeds(5, 16.0, seed=3)
    assert sorted(found) == pytest.approx([1, 2, 4, 8, 16])
    assert found == speeds(5, 16.0, seed=3)
    assert found != sorted(found)
    assert speeds(1, 16.0, seed=3) == [1.0]
    assert speeds(3, 1.0, seed=3) == [1.0] * 3
