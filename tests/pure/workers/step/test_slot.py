"""A step leaves what autograd finds, recorded or not, to the bit."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from downpour.models.flat import FlatModel
from downpour.workers.step.interpreter import CannotInterpret
from downpour.workers.step.slot import Mailbox, Slot, Workshop
from tests.helpers.networks import NAMES, batches, build, mailboxes


def make(module: nn.Module, **options: object) -> tuple[Slot, Workshop, list[Mailbox]]:
    flat = FlatModel(module)
    initial = flat.weights.clone()
    workshop = Workshop(flat.layout, **options)  # type: ignore[arg-type]
    slot = Slot(flat, workshop)
    slot.weights[:] = initial.numpy()
    return slot, workshop, mailboxes(flat.layout, 2)


def refuse(graph: fx.Graph) -> Callable[..., Tensor]:
    raise CannotInterpret(f"a graph of {len(graph.nodes)} nodes")


@pytest.mark.parametrize("by_python", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_is_the_eager_step_to_the_bit(
    name: str, by_python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_python:
        monkeypatch.setattr("downpour.workers.step.recording.interpreted", refuse)
    eager, recorded = make(build(name), recorded=False), make(build(name), recorded=True)
    for i, (x, y) in enumerate(batches(name, (4, 4, 3, 4, 3, 3, 4))):
        for slot, _, _ in (eager, recorded):
            slot.weights *= 1.01
        found = []
        for slot, _, boxes in (eager, recorded):
            torch.manual_seed(i)
            found.append((slot.step(x, y, boxes[i % 2], 0), boxes[i % 2]))
        (a, box_a), (b, box_b) = found
        assert a == b
        assert torch.equal(box_a.gradient, box_b.gradient)
        assert torch.equal(box_a.moments[0], box_b.moments[0])
    made = [r for r in recorded[1].recordings.values() if r is not None]
    assert len(made) == 2, "a recording for each size of mini-batch"
    assert [r.by_python for r in made] == [by_python] * 2
    assert not eager[1].recordings


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NAMES[:3])
def test_gradient_moments_and_loss_are_autograds(name: str, recorded: bool) -> None:
    slot, _, boxes = make(build(name), recorded=recorded)
    data = batches(name, (4,) * 6)
    for x, y in data[:3]:
        slot.step(x, y, boxes[1], 0)
    for i, (x, y) in enumerate(data[3:]):
        result = slot.step(x, y, boxes[0], i)
    oracle = FlatModel(build(name))
    total, loss = torch.zeros(oracle.layout.num_parameters), torch.tensor(0.0)
    for i, (x, y) in enumerate(data[3:]):
        oracle.zero_gradient()
        loss = functional.cross_entropy(oracle.module(x), y)
        loss.backward()
        assert oracle.gradient is not None
        total += oracle.gradient
        assert torch.equal(boxes[0].moments[i], oracle.moments)
    assert torch.equal(boxes[0].gradient, total)
    assert result.loss == loss.item()
    assert result.gradient_norm == pytest.approx(total.norm().item())


def test_slots_share_a_recording_and_nothing_else() -> None:
    slot, workshop, boxes = make(build("mnist-bn"), recorded=True)
    other = Slot(FlatModel(build("mnist-bn")), workshop)
    other.weights[:] = slot.weights * 2
    (x, y), *_ = batches("mnist-bn", (4,))
    eager, _, plain = make(build("mnist-bn"), recorded=False)
    first = eager.step(x, y, plain[0], 0)
    eager.weights *= 2
    second = eager.step(x, y, plain[1], 0)
    for _ in range(3):
        assert slot.step(x, y, boxes[0], 0) == first
        assert other.step(x, y, boxes[1], 0) == second
    assert torch.equal(boxes[0].gradient, plain[0].gradient)
    assert torch.equal(boxes[1].gradient, plain[1].gradient)
    assert len(workshop.recordings) == 1


class Looks(nn.Linear):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum().item() > 0 else y


class Remembers(nn.Linear):
    """Changes a buffer that outlives the step."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        assert isinstance(self.seen, Tensor)
        self.seen.add_(y.detach().mean(0))
        return y - self.seen


class Alternates(nn.Linear):
    """Decides anew each time, outside of PyTorch."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + next(self.calls) % 2)


@pytest.mark.parametrize("module", [Looks(6, 3), Remembers(), Alternates()], ids=type)
def test_what_cannot_be_recorded_goes_on_without(module: nn.Module) -> None:
    slot, workshop, boxes = make(module, recorded=True)
    for x, y in batches("mnist", (4,) * 5):
        slot.step(x, y, boxes[0], 0)
    assert set(workshop.recordings.values()) == {None}


def test_a_loss_that_is_not_finite_is_recorded_all_the_same() -> None:
    slot, workshop, boxes = make(build("mnist"), recorded=True)
    slot.weights[:] = float("nan")
    (x, y), *_ = batches("mnist", (4,))
    for _ in range(3):
        slot.step(x, y, boxes[0], 0)
    assert None not in workshop.recordings.values()


def test_recording_draws_no_random_numbers() -> None:
    slot, _, boxes = make(build("images"), recorded=True)
    data = batches("images", (4,) * 4)
    torch.manual_seed(5)
    random.seed(5)
    recorded = [slot.step(x, y, boxes[0], 0) for x, y in data]
    slot, _, boxes = make(build("images"), recorded=False)
    torch.manual_seed(5)
    assert recorded == [slot.step(x, y, boxes[0], 0) for x, y in data]
