"""The rotation of concurrent steps in one process, against a parameter server that is a counter."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from downpour.paramserver.client import PushResult
from downpour.paramserver.messages import Outcome
from downpour.paramserver.transport.link import Pull
from downpour.workers.replica.replicas import Joined, Replicas, Window
from downpour.workers.replica.rotation import BELL_EVERY, num_mailboxes
from downpour.workers.spec import StepConfig
from downpour.workers.step.model_copy import StepResult

DEADLINE_S = 20.0


class CountingServer:
    """Stands for `ParameterClient`: every push makes a version, and weights say which they are."""

    num_partitions = 1
    num_asking = 0

    def __init__(self) -> None:
        self.version = 0
        self.pulls: list[int] = []
        self.pushes: list[tuple[int, int]] = []
        """Version that each push was computed on, and that it met."""
        self.told: list[int] = []
        """What the pushes said that they were computed on."""
        self.computed_on: int | None = None
        self._answers: list[PushResult] = []

    def start_pull(self, weights: npt.NDArray[np.float32], versions: list[int]) -> Pull:
        weights[0] = versions[0] = self.version
        self.pulls.append(self.version)
        return Pull(versions)

    def finish(self, pull: Pull) -> None:
        raise AssertionError("nothing is waited for")

    def push(self, *, mailbox: int, versions: Sequence[int], **_: Any) -> None:
        assert self.computed_on is not None
        self.pushes.append((self.computed_on, self.version))
        self.told.append(versions[0])
        self.version += 1
        self._answers.append(PushResult(mailbox=mailbox, outcomes=(Outcome.APPLIED,)))

    def collect(self, wait_s: float = 0.0) -> list[PushResult]:
        answers, self._answers = self._answers, []
        return answers

    wait = collect


class FakeSlot:
    """Stands for `ModelCopy`; tells the server on which weights a step was computed."""

    def __init__(self, server: CountingServer) -> None:
        self.weights = np.full(1, -1, np.float32)
        self._server = server

    def step(self, *_: Any) -> StepResult:
        self._server.computed_on = int(self.weights[0])
        return StepResult(loss=1.0, gradient_norm=1.0)


class FakeMailbox:
    def __init__(self, index: int) -> None:
        self.index = index


def train(replicas: int, config: StepConfig, batches: int) -> tuple[CountingServer, list[FakeSlot]]:
    """Run so many mini-batches on each replica; gives the server and the slots that were made."""
    server, slots = CountingServer(), []

    def make_copy() -> Any:
        slots.append(FakeSlot(server))
        return slots[-1]

    steps = Replicas(
        replicas=range(replicas),
        config=config,
        client=server,  # type: ignore[arg-type]
        mailboxes=[FakeMailbox(i) for i in range(replicas * config.concurrent_steps)],  # type: ignore[misc]
        make_copy=make_copy,
    )
    one = Joined(torch.zeros(1, 1), torch.zeros(1))

    def load(_place: int, count: int) -> list[Joined]:
        return [one] * count

    window = Window(
        epoch=0, batches=tuple(range(batches)), load=lambda _place, count: [one] * count
    )
    reports = [steps.assign(replica, window) for replica in range(replicas)]
    thread = threading.Thread(target=steps.run, daemon=True)
    thread.start()
    for report in reports:
        assert not report.result(DEADLINE_S).unsettled
    steps.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    return server, slots


@pytest.mark.parametrize(
    ("replicas", "concurrent_steps", "together"),
    [(1, 1, 1), (1, 5, 1), (1, 8, BELL_EVERY), (5, 5, BELL_EVERY), (10, 5, BELL_EVERY)],
)
def test_turns_that_follow_on_each_other_share_a_pull(
    replicas: int, concurrent_steps: int, together: int
) -> None:
    steps, batches = replicas * concurrent_steps, 40
    config = StepConfig(concurrent_steps=concurrent_steps, in_flight="all")
    server, slots = train(replicas, config, batches)
    pushes = replicas * batches
    assert len(server.pushes) == pushes
    assert server.told == [computed for computed, _ in server.pushes], "the versions named are true"
    # Every step pulls, and at the end those in flight have pulled for nothing.
    assert pushes / together <= len(server.pulls) <= (pushes + steps) / together + steps
    assert len(slots) <= -(-steps // together) + 1
    staleness = [met - computed for computed, met in server.pushes]
    assert max(staleness) <= steps - 1 + together - 1
    if steps > 1:
        steady = staleness[2 * steps : -2 * steps]
        assert min(steady) >= steps - 1, "a step is in flight while all others have their turns"


@pytest.mark.parametrize("n_fetch", [1, 3])
def test_weights_are_kept_as_long_as_a_turn_needs_them(n_fetch: int) -> None:
    config = StepConfig(concurrent_steps=5, n_fetch=n_fetch, n_push=2)
    server, _ = train(3, config, 60)
    assert server.told == [computed for computed, _ in server.pushes]


class Story:
    """What happened, in order: a step was begun, its result read, and pushed."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.begun = 0

    def tell(self, what: str, step: int) -> None:
        self.lines.append((what, step))


class LateResult:
    gradient_norm = 1.0

    def __init__(self, story: Story, step: int) -> None:
        self._story, self._step = story, step

    @property
    def loss(self) -> float:
        self._story.tell("read", self._step)
        return float(self._step)


class LateSlot:
    def __init__(self, story: Story) -> None:
        self.weights = np.zeros(1, np.float32)
        self._story = story

    def step(self, *_: Any) -> LateResult:
        story = self._story
        story.begun += 1
        story.tell("begun", story.begun - 1)
        return LateResult(story, story.begun - 1)


class TellingServer(CountingServer):
    """Tells of a push, by the loss that it bears, and answers as late as it may."""

    def __init__(self, story: Story) -> None:
        super().__init__()
        self._story = story

    def push(self, *, mailbox: int, versions: Sequence[int], **about: Any) -> None:
        self._story.tell("pushed", int(about["loss"]))
        self._answers.append(PushResult(mailbox=mailbox, outcomes=(Outcome.APPLIED,)))

    def collect(self, wait_s: float = 0.0) -> list[PushResult]:
        return []

    def wait(self) -> list[PushResult]:
        assert self._answers, "waits for an answer to a push that it keeps back"
        return super().collect()


@pytest.mark.parametrize(
    ("slots", "mailboxes", "ahead"), [(1, 1, 1), (2, 2, 1), (5, 5, 1), (5, 2, 1), (5, 3, 2)]
)
def test_a_step_is_begun_before_the_last_ones_are_read(
    slots: int, mailboxes: int, ahead: int
) -> None:
    story, batches = Story(), 23
    server = TellingServer(story)
    steps = Replicas(
        replicas=(0,),
        config=StepConfig(concurrent_steps=slots, in_flight="all"),
        client=server,  # type: ignore[arg-type]
        mailboxes=[FakeMailbox(i) for i in range(mailboxes)],  # type: ignore[misc]
        make_copy=lambda: LateSlot(story),  # type: ignore[arg-type,return-value]
        ahead=ahead,
    )
    one = Joined(torch.zeros(1, 1), torch.zeros(1))

    def load(_place: int, count: int) -> list[Joined]:
        return [one] * count

    window = Window(
        epoch=0, batches=tuple(range(batches)), load=lambda _place, count: [one] * count
    )
    report = steps.assign(0, window)
    thread = threading.Thread(target=steps.run, daemon=True)
    thread.start()
    assert report.result(DEADLINE_S).mean_loss == pytest.approx((batches - 1) / 2)
    steps.stop()
    thread.join(DEADLINE_S)
    for step in range(batches):
        begun, read, pushed = (story.lines.index((w, step)) for w in ("begun", "read", "pushed"))
        assert begun < read < pushed
    for what in ("begun", "read", "pushed"):
        assert [step for w, step in story.lines if w == what] == list(range(batches)), "in order"
    most = now = 0
    for what, _ in story.lines:
        now += (what == "begun") - (what == "pushed")
        most = max(most, now)
    assert most == (1 if slots == 1 else min(ahead + 1, mailboxes))


@pytest.mark.parametrize(
    ("replicas", "config", "boxes"),
    [
        (1, StepConfig(concurrent_steps=1), 1),
        (1, StepConfig(concurrent_steps=5), 1),
        (5, StepConfig(concurrent_steps=5), 2),
        (3, StepConfig(concurrent_steps=5, steps_together=2), 2),
        (2, StepConfig(concurrent_steps=3, steps_together=1), 2),
    ],
)
def test_fresh_weights_are_pulled_when_a_turn_begins(
    replicas: int, config: StepConfig, boxes: int
) -> None:
    """A lone process's steps are never stale, however many replicas it has."""
    batches = 23
    assert num_mailboxes(replicas, config, nearby=True) == boxes
    server, copies = train(replicas, config, batches)
    turns = -(-batches // config.together)
    assert len(server.pushes) == len(server.pulls) == replicas * turns
    assert server.told == [computed for computed, _ in server.pushes], "the versions named are true"
    assert all(computed == met for computed, met in server.pushes)
    assert len(copies) == 1
