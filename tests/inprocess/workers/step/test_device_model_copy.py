"""A slot on a device finds what a slot on processors finds, to the bit, however late copies are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from downpour.models.flat import FlatModel
from downpour.workers.step.device import HostDevice
from downpour.workers.step.device_context import DeviceStepContext
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.model_copy import ModelCopy, StepContext
from tests.helpers.device_story import NUM_BOXES, SIZES, on, oracle, same
from tests.helpers.late import LateDevice, Wait
from tests.helpers.networks import NAMES, batches, build, mailboxes

torch.set_num_threads(1)


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


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_nor_do_steps_that_are_captured(name: str, seed: int | None) -> None:
    for ahead in (0, 1, 2):
        device = LateDevice(seed=seed, ahead=ahead)
        assert same(on(device, name, direct=bool(seed), ahead=ahead, recorded=True), oracle(name))


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
