"""On a device: steps captured as graphs, mini-batches together, float16 with a scaled loss.

The device is late on purpose, and its graphs are bound to memory as a GPU's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from downpour.models.flat import FlatModel
from downpour.workers.step import record_book
from downpour.workers.step.captured import alike
from downpour.workers.step.device_context import DeviceStepContext
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.joining import JoinTrial
from downpour.workers.step.loss_scale import FIRST
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext
from tests.helpers.late import LateDevice
from tests.helpers.networks import NAMES, batches, build, mailboxes
from tests.helpers.tape_graph import TapeGraph
from tests.helpers.unrepeatable import Scaled, unrepeatable

torch.set_num_threads(1)


def make(
    module: nn.Module, device: LateDevice | None = None, **options: Any
) -> tuple[DeviceModelCopy, DeviceStepContext, list[Mailbox]]:
    flat = FlatModel(module)
    initial = flat.weights.clone()
    context = DeviceStepContext(flat.layout, device or LateDevice(), **options)
    slot = DeviceModelCopy(flat, context)
    slot.weights[:] = initial.numpy()
    return slot, context, mailboxes(flat.layout, 2)


def plain(module: nn.Module, **options: Any) -> tuple[ModelCopy, list[Mailbox]]:
    flat = FlatModel(module)
    initial = flat.weights.clone()
    slot = ModelCopy(flat, StepContext(flat.layout, recorded=False, **options))
    slot.weights[:] = initial.numpy()
    return slot, mailboxes(flat.layout, 2)


def interleave(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 1).flatten(0, 1)


# Graphs


def test_a_step_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TapeGraph] = []

    def capture(self: LateDevice, work: Callable[[], object]) -> TapeGraph:
        made.append(TapeGraph(work))
        return made[-1]

    monkeypatch.setattr(LateDevice, "capture", capture)
    slot, context, boxes = make(build("images"), recorded=True)
    for x, y in batches("images", (4,) * 6):
        slot.step(x, y, boxes[0], 0).wait()
    assert None not in context.book.recordings.values()
    (graph,) = made
    assert graph.replays == 7, "each step from the second on, and two comparisons"


@pytest.mark.parametrize("module", unrepeatable(), ids=type)
def test_what_cannot_be_captured_goes_on_without(module: nn.Module) -> None:
    slot, context, boxes = make(module, recorded=True)
    for x, y in batches("mnist", (4,) * 5):
        slot.step(x, y, boxes[0], 0).wait()
    assert set(context.book.recordings.values()) == {None}


def test_a_capture_that_fails_is_told_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(self: LateDevice, work: Callable[[], object]) -> TapeGraph:
        work()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(LateDevice, "capture", capture)
    slot, context, boxes = make(build("images"), recorded=True)
    torch.manual_seed(3)
    found = [slot.step(x, y, boxes[0], 0).wait() for x, y in batches("images", (4,) * 4)]
    other, others = plain(build("images"))
    torch.manual_seed(3)
    expected = [other.step(x, y, others[0], 0) for x, y in batches("images", (4,) * 4)]
    assert found == expected
    assert torch.equal(boxes[0].gradient, others[0].gradient)
    assert set(context.book.recordings.values()) == {None}
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.endswith("operation not permitted when stream is capturing")


@pytest.mark.parametrize("changed_at", [2, 3, 7])
def test_a_graph_that_no_longer_does_what_the_step_does_is_given_up(
    changed_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second step is captured, so the third and each fifth from there are compared."""
    monkeypatch.setattr(record_book, "CHECK_EVERY", 5)
    module, twin = Scaled(6, 3), Scaled(6, 3)
    twin.load_state_dict(module.state_dict())
    slot, context, boxes = make(module, recorded=True)
    other, others = plain(twin)
    agree = []
    for i, (x, y) in enumerate(batches("mnist", (4,) * 14)):
        module.scale = twin.scale = 2.0 if i >= changed_at else 1.0
        found, expected = slot.step(x, y, boxes[0], 0).wait(), other.step(x, y, others[0], 0)
        agree.append(found == expected and torch.equal(boxes[0].gradient, others[0].gradient))
    compared = next(i for i in (2, 7, 12) if i >= changed_at)
    assert agree == [not changed_at <= i < compared for i in range(14)]
    assert set(context.book.recordings.values()) == {None}
    assert f"{0 if compared == 2 else 4} were since the last comparison" in caplog.text


def test_a_comparison_for_which_there_is_no_room_gives_the_graph_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slot, context, boxes = make(build("mnist-bn"), recorded=True)
    other, others = plain(build("mnist-bn"))
    first, second, third, fourth = batches("mnist-bn", (4,) * 4)
    for x, y in (first, second):
        slot.step(x, y, boxes[0], 0).wait()
    assert None not in context.book.recordings.values()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    with monkeypatch.context() as patched:
        patched.setattr(DeviceModelCopy, "_outcome", full)
        found = slot.step(*third, boxes[0], 0).wait()
    assert found == other.step(*third, others[0], 0)
    assert slot.step(*fourth, boxes[0], 0).wait() == other.step(*fourth, others[0], 0)
    assert set(context.book.recordings.values()) == {None}
    assert "cannot be compared, and is given up: CUDA out of memory" in caplog.text


def test_rounding_is_no_difference_and_all_else_is() -> None:
    torch.manual_seed(2)
    gradient, moments = torch.randn(50), torch.rand(1, 3, 5)
    moments[0, 0] = 1e5
    tail = torch.tensor([1.0, 50.0])
    expected = (tail, gradient, moments)
    assert alike(expected, (tail * (1 + 1e-5), gradient * (1 + 1e-4), moments), "float32")
    assert not alike(expected, (tail, gradient * 1.01, moments), "float32")
    assert alike(expected, (tail, gradient * 1.005, moments), "bfloat16")
    assert not alike(expected, (tail * 1.1, gradient, moments), "bfloat16")
    for row in range(3):
        others = moments.clone()
        others[0, row] *= 1.1
        assert not alike(expected, (tail, gradient, others), "bfloat16")
    spoilt = gradient.clone()
    spoilt[3] = math.nan
    assert not alike(expected, (tail, spoilt, moments), "bfloat16")
    assert alike((tail, spoilt, moments), (tail, spoilt.clone(), moments), "float32")
    spoilt = gradient.clone()
    spoilt[3] = math.inf
    assert not alike(expected, (tail, spoilt, moments), "bfloat16")


# Mini-batches together


class Mixes(nn.Linear):
    """Subtracts the mean over the rows: joined mini-batches would share it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", [*NAMES[:3], "mixes"])
def test_mini_batches_together_are_those_on_processors(
    name: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JoinTrial, "next", lambda _: True)

    def module() -> nn.Module:
        torch.manual_seed(4)
        return Mixes(6, 3) if name == "mixes" else build(name)

    slot, context, boxes = make(module(), recorded=recorded, depth=3)
    other, others = plain(module(), depth=3)
    data = batches(name, (4,) * 18)
    for i in range(0, 18, 3):
        x, y = (interleave(list(parts)) for parts in zip(*data[i : i + 3], strict=True))
        found, expected = slot.step(x, y, boxes[0], 0, 3), other.step(x, y, others[0], 0, 3)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.gradient_norm == expected.gradient_norm
        assert torch.equal(boxes[0].gradient, others[0].gradient)
        assert torch.equal(boxes[0].moments, others[0].moments)
        x, y = data[i]
        found = slot.step(x, y, boxes[1], 0)
        assert found.wait() == other.step(x, y, others[1], 0)
        assert torch.equal(boxes[1].gradient, others[1].gradient)
    assert context.joinable == (name != "mixes")
    assert len(context.book.recordings) == (2 if recorded else 0)
    assert None not in context.book.recordings.values()


# Float16


class Overflow(torch.autograd.Function):
    """Has gradients as float16 has them: what is above its largest number is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: float) -> Tensor:
        ctx.largest = largest
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(gradient.abs() > ctx.largest, math.inf, gradient), None


class Half(nn.Linear):
    largest = 2000.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Overflow.apply(super().forward(x), self.largest)
        return y


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_that_overflows_is_computed_again_with_half_the_factor(
    ahead: int, recorded: bool
) -> None:
    torch.manual_seed(1)
    module, twin = Half(6, 3), Half(6, 3)
    twin.load_state_dict(module.state_dict())
    device = LateDevice(ahead=ahead)
    slot, context, boxes = make(module, device, recorded=recorded, precision="float16")
    other, others = plain(twin)
    begun: list[Any] = []
    for i, (x, y) in enumerate(batches("mnist", (4,) * 6)):
        begun.append((slot.step(x, y, boxes[i % 2], 0), boxes[i % 2], x, y))
        while len(begun) > (ahead if i < 5 else 0):
            result, box, inputs, targets = begun.pop(0)
            twin.largest = math.inf  # as if there were room for all
            expected, found = other.step(inputs, targets, others[0], 0), result.wait()
            assert found.loss == expected.loss
            assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
            torch.testing.assert_close(box.gradient, others[0].gradient)
    assert context.scale is not None
    assert 1 < context.scale.value < FIRST
    if recorded:
        assert None not in context.book.recordings.values()
        assert context.book.recordings


def test_a_gradient_that_no_factor_saves_is_handed_on_as_it_is() -> None:
    module = Half(6, 3)
    module.largest = 0.0
    slot, context, boxes = make(module, precision="float16")
    (x, y), *_ = batches("mnist", (4,))
    result = slot.step(x, y, boxes[0], 0).wait()
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.gradient_norm)
    assert context.scale is not None
    assert context.scale.value == FIRST, "it was not to blame"
