"""What the model copies of a process share on a device: step buffers, graphs, a loss scale.

Step buffers are room for a step that is under way. There is one set more than steps are begun
ahead, so the next step's weights and mini-batch go up, and the last one's gradient comes down,
while one is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.layout import Layout
from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.captured import CapturedStep, Found
from downpour.workers.step.device import Device, Stream
from downpour.workers.step.joining import JointRoom
from downpour.workers.step.loss_scale import LossScale
from downpour.workers.step.model_copy import StepResult
from downpour.workers.step.record_book import RecordBook


class PendingResult:
    """What a step will have found: reading it waits until all of it is in the mailbox."""

    def __init__(self, finish: Callable[[], StepResult]) -> None:
        self._finish: Callable[[], StepResult] | None = finish
        self._found: StepResult | None = None

    def wait(self) -> StepResult:
        """The result, and with it the right to push the mailbox."""
        if self._found is None:
            assert self._finish is not None
            self._found, self._finish = self._finish(), None
        return self._found

    @property
    def loss(self) -> float:
        """As `StepResult.loss`."""
        return self.wait().loss

    @property
    def gradient_norm(self) -> float:
        """As `StepResult.gradient_norm`."""
        return self.wait().gradient_norm


class StepBuffers:
    """Room for one step that is under way, on the device and on the host."""

    def __init__(self, layout: Layout, depth: int, device: Device) -> None:
        self._device = device
        self.found = Found(layout, depth, device.where)
        self.host_tail = device.page_locked(2)
        self._host_gradient: Tensor | None = None
        self._host_moments: Tensor | None = None
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}
        self.result: PendingResult | None = None
        """Of the last step that was here."""

    @property
    def host_gradient(self) -> Tensor:
        """For a gradient that cannot be copied straight to its mailbox."""
        if self._host_gradient is None:
            self._host_gradient = self._device.page_locked(self.found.box.gradient.numel())
        return self._host_gradient

    @property
    def host_moments(self) -> Tensor:
        """For moments, likewise."""
        if self._host_moments is None:
            self._host_moments = self._device.page_locked(*self.found.box.moments.shape)
        return self._host_moments

    def send(self, up: Stream, what: str, values: Tensor) -> Tensor:
        """Have a tensor of the mini-batch copied up; gives where it will be."""
        size = values.numel()
        room = self._rooms.get(what)
        if room is None or room[0].numel() < size or room[0].dtype != values.dtype:
            here = self._device.page_locked(size, dtype=values.dtype)
            there = torch.empty(size, dtype=values.dtype, device=self._device.where)
            room = self._rooms[what] = (here, there)
        here, there = (part[:size].view(values.shape) for part in room)
        here.copy_(values)
        up.copy(there, here)
        return there


class DeviceStepContext(JointRoom):
    """What the slots of a process share: the device, room for moments, step buffers, graphs."""

    def __init__(
        self,
        layout: Layout,
        device: Device,
        *,
        loss: Loss = functional.cross_entropy,
        direct: bool = True,
        recorded: bool = False,
        depth: int = 1,
        precision: Precision = "float32",
    ) -> None:
        """Room for steps of up to `depth` mini-batches together.

        Args:
            layout: of the model.
            device: that computes.
            loss: `(outputs, targets) -> mean loss` of a mini-batch.
            direct: whether mailboxes are page-locked, so that gradients are copied to them.
            recorded: whether steps are captured as graphs.
            depth: most mini-batches of a step.
            precision: that forward and backward passes compute in.
        """
        loss = loss.to(device.where) if isinstance(loss, nn.Module) else loss
        super().__init__(layout, loss, device.where)
        self.device = device
        self.precision = precision
        self.direct = direct
        self.depth = depth
        self.book: RecordBook[CapturedStep] = RecordBook(recorded=recorded)
        self.joinable: bool | None = True if depth == 1 else None
        """Whether mini-batches may be joined; None until it has been tried."""
        self.statistics: Tensor | None = None
        """What frozen BN layers normalize with, float32 [2, F]; None takes the model's own."""
        self.scale = LossScale() if precision == "float16" else None
        self.scale_there: Tensor | None = None
        """The same, on the device."""
        self._scale_told = 1.0
        if self.scale is not None:
            self.scale_there = torch.full((), self.scale.value, device=device.where)
            self._scale_told = self.scale.value
        self._spares: dict[str, Found] = {}
        self._buffers = [StepBuffers(layout, depth, device) for _ in range(device.ahead + 1)]
        self._next = 0
        device.finish()

    def buffers(self) -> StepBuffers:
        """The buffers whose step was begun first; waits until that is over."""
        buffers = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffers.result is not None:
            buffers.result.wait()
        return buffers

    def spare(self, what: str) -> Found:
        """Room on the device for what is never pushed, made when it is first wanted."""
        if what not in self._spares:
            self._spares[what] = Found(self._layout, self.depth, self.device.where)
        return self._spares[what]

    def tell_scale(self) -> float:
        """Have the device multiply losses by what is now right; gives that."""
        if self.scale is None:
            return 1.0
        value, there = self.scale.value, self.scale_there
        assert there is not None
        if value != self._scale_told:
            self.device.compute.run(lambda: there.fill_(value))
            self._scale_told = value
        return value
