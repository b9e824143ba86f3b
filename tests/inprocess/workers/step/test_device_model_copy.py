"""A slot on a device finds what a slot on processors finds, to the bit, however late copies are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from downpour.models.flat import FlatModel
from downpour.workers.step.device import CudaDevice, Device, HostDevice, cuda_problem
from downpour.workers.step.device_model_copy import DeviceModelCopy, DeviceStepContext
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext
from tests.helpers.late import LateDevice, Wait
from tests.helpers.networks import NAMES, batches, build, mailboxes

torch.set_num_threads(1)


NUM_SLOTS, NUM_BOXES = 2, 4
SIZES = (4, 4, 3, 5, 4, 2, 5, 4, 4, 3, 4, 4)
"""Several, so that one is smaller than the room that it is sent to."""

Found = tuple[float, float, Tensor, Tensor]


def story(name: str, slots: list[Any], boxes: list[Mailbox], *, ahead: int) -> list[Found]:
    """Two slots, two steps each in turn, new weights now and then, pushes of up to three steps.

    With `ahead` a step's result is read when so many later ones have been begun, but before its
    mailbox is added to.
    """
    torch.manual_seed(7)
    data, found, begun = batches(name, SIZES), [], []
    weights = FlatModel(build(name)).weights.numpy()
    plan = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (3, 0), (0, 0), (2, 1), (1, 0), (2, 2), (3, 0)]

    def read() -> None:
        result, box, index = begun.pop(0)
        loss, norm = result.loss, result.gradient_norm
        found.append((loss, norm, box.gradient.clone(), box.moments[index].clone()))

    for i, ((x, y), (box, index)) in enumerate(zip(data, plan, strict=False)):
        slot = slots[i // 2 % NUM_SLOTS]
        if i == 2 or i % 3 == 0:  # also where a step on the weights of before is under way
            slot.weights[:] = weights * (1 + i / 10)
        while any(b is boxes[box] for _, b, _ in begun):
            read()
        inputs, targets = x.clone(), y.clone()
        begun.append((slot.step(inputs, targets, boxes[box], index), boxes[box], index))
        inputs.fill_(torch.nan)  # the caller's again
        targets.fill_(0)
        while len(begun) > ahead:
            read()
    while begun:
        read()
    return found


def oracle(name: str) -> list[Found]:
    """The same on processors, one step after the other."""
    models = [FlatModel(build(name)) for _ in range(NUM_SLOTS)]
    context = StepContext(models[0].layout, recorded=False)
    return story(
        name,
        [ModelCopy(m, context) for m in models],
        mailboxes(models[0].layout, NUM_BOXES),
        ahead=0,
    )


def on(device: Device, name: str, *, direct: bool = True, ahead: int = 1) -> list[Found]:
    models = [FlatModel(build(name)) for _ in range(NUM_SLOTS)]
    context = DeviceStepContext(models[0].layout, device, direct=direct)
    slots = [DeviceModelCopy(m, context) for m in models]
    return story(name, slots, mailboxes(models[0].layout, NUM_BOXES), ahead=ahead)


def same(a: list[Found], b: list[Found]) -> bool:
    """To the bit; nothing here is NaN."""
    return len(a) == len(b) and all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) and torch.equal(x[3], y[3])
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_on_the_host_it_is_the_slot_on_processors(name: str, direct: bool) -> None:
    for ahead in (0, 1):
        assert same(on(HostDevice(), name, direct=direct, ahead=ahead), oracle(name))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("seed", [None, *range(6)])
@pytest.mark.parametrize("name", NAMES)
def test_late_copies_change_nothing(name: str, seed: int | None, direct: bool) -> None:
    for ahead in (0, 1, 2):
        device = LateDevice(seed=seed, ahead=ahead)
        assert same(on(device, name, direct=direct, ahead=ahead), oracle(name))


def test_a_result_may_be_left_unread() -> None:
    """Berths are few: the third step waits for the first, whoever reads what it found."""
    model = FlatModel(build("mnist-bn"))
    context = DeviceStepContext(model.layout, LateDevice())
    slot, boxes = DeviceModelCopy(model, context), mailboxes(model.layout, NUM_BOXES)
    slot.weights[:] = FlatModel(build("mnist-bn")).weights.numpy()
    data = batches("mnist-bn", SIZES[:NUM_BOXES])
    results = [slot.step(x, y, boxes[i], 0) for i, (x, y) in enumerate(data)]
    plain = FlatModel(build("mnist-bn"))
    direct = ModelCopy(plain, StepContext(plain.layout, recorded=False))
    direct.weights[:] = FlatModel(build("mnist-bn")).weights.numpy()
    others = mailboxes(plain.layout, NUM_BOXES)
    for i, (x, y) in enumerate(data):
        assert direct.step(x, y, others[i], 0) == results[i].wait()
        assert torch.equal(others[i].gradient, boxes[i].gradient)


# Each wait is needed, and its absence would be seen

WAITS: list[Wait] = [
    ("compute", "up"),  # weights and mini-batch are there
    ("down", "compute"),  # the gradient is there
    ("host", "down"),  # what is read, and pushed, has come
    ("up", "compute"),  # nobody computes on the weights that are replaced
    ("host", "up"),  # the buffer that is pulled into has been copied
]


@pytest.mark.parametrize("wait", WAITS, ids=" for ".join)
def test_without_this_wait_the_results_are_others(wait: Wait) -> None:
    device = LateDevice(ignored=frozenset({wait}))
    try:
        found = on(device, "mnist-bn")
    except IndexError:  # classes were read before they had been written
        return
    assert not same(found, oracle("mnist-bn"))


def test_without_the_wait_for_a_berth_the_results_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert same(on(LateDevice(), "mnist-bn", ahead=3), oracle("mnist-bn")), (
        "step buffers are waited for"
    )

    def buffers(self: DeviceStepContext) -> Any:
        found = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return found

    monkeypatch.setattr(DeviceStepContext, "buffers", buffers)
    assert not same(on(LateDevice(), "mnist-bn", ahead=3), oracle("mnist-bn"))


# On a GPU


@pytest.fixture
def cuda() -> CudaDevice:
    if (problem := cuda_problem()) is not None:
        pytest.skip(f"needs a GPU: {problem}")
    return CudaDevice()


@pytest.mark.gpu
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", NAMES[:3])
def test_a_gpu_finds_the_same_but_for_rounding(cuda: CudaDevice, name: str, direct: bool) -> None:
    found = on(cuda, name, direct=direct)
    for a, b in zip(found, oracle(name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_it_does_not_matter_how_far_ahead_steps_are_begun(
    cuda: CudaDevice, name: str
) -> None:
    torch.backends.cudnn.deterministic = True
    try:
        cuda.seed(3)
        one_by_one = on(cuda, name, ahead=0)
        cuda.seed(3)
        assert same(on(cuda, name, ahead=1), one_by_one)
    finally:
        torch.backends.cudnn.deterministic = False


@pytest.mark.gpu
def test_mailboxes_are_page_locked_in_place_and_let_go(cuda: CudaDevice) -> None:
    from downpour.paramserver.transport.shared.mailboxes import Mailboxes

    for _ in range(2):  # the second mapping may be at the first one's address
        boxes = Mailboxes(100_000, 10, 3, 2)
        lock = cuda.lock(boxes.memory)
        assert lock is not None
        assert all(gradient.is_pinned() for gradient in boxes.gradients)
        source = torch.arange(100_000, dtype=torch.float32, device=cuda.where)
        cuda.finish()
        cuda.down.copy(boxes.gradients[2], source)
        cuda.down.record().wait()
        assert torch.equal(boxes.gradients[2], source.cpu())
        lock.release()
        lock.release()
        assert not boxes.gradients[0].is_pinned()
        boxes.close()
