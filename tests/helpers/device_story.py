"""Some steps of two model copies that overlap: on a device, and one after the other without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from downpour.models.flat import FlatModel
from downpour.workers.step.device import Device
from downpour.workers.step.device_context import DeviceStepContext
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext
from tests.helpers.networks import batches, build, mailboxes

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


def on(
    device: Device, name: str, *, direct: bool = True, ahead: int = 1, recorded: bool = False
) -> list[Found]:
    models = [FlatModel(build(name)) for _ in range(NUM_SLOTS)]
    context = DeviceStepContext(models[0].layout, device, direct=direct, recorded=recorded)
    slots = [DeviceModelCopy(m, context) for m in models]
    return story(name, slots, mailboxes(models[0].layout, NUM_BOXES), ahead=ahead)


def same(a: list[Found], b: list[Found]) -> bool:
    """To the bit; nothing here is NaN."""
    return len(a) == len(b) and all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) and torch.equal(x[3], y[3])
        for x, y in zip(a, b, strict=True)
    )
