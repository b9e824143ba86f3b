"""A slot whose model lives on a device; `workers.step.model_copy` has the slot for processors.

Weights go up in one copy from the page-locked buffer that a pull writes to; gradient and moments
come down to the mailbox, and with them, in one copy more, loss and gradient norm. A step only gives
the device its work. Whoever reads its result waits, once, for all of it; meanwhile the next step
may have been begun, whose weights and mini-batch go up while this one is computed.

Why no copy meets another's, or a kernel's, is in docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.conversion.state import has_spectral_norm, settle_spectral_norm
from downpour.models.flat import FlatModel
from downpour.models.layout import Layout
from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.device import Device, Stream
from downpour.workers.step.eager import differentiate
from downpour.workers.step.model_copy import Mailbox, StepResult, norm, root


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


class _StepBuffers:
    """Room for one step that is under way, on the device and on the host."""

    def __init__(self, layout: Layout, device: Device) -> None:
        self._device = device
        num_parameters, num_features = layout.num_parameters, layout.num_features
        self.box = Mailbox(
            -1,
            layout,
            torch.empty(num_parameters, device=device.where),
            torch.empty(1, 3, num_features, device=device.where),
        )
        """On the device."""
        self.tail = torch.empty(2, device=device.where)
        """On the device: loss, and square of the gradient's norm."""
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
            self._host_gradient = self._device.page_locked(self.box.gradient.numel())
        return self._host_gradient

    @property
    def host_moments(self) -> Tensor:
        """For moments, likewise."""
        if self._host_moments is None:
            self._host_moments = self._device.page_locked(*self.box.moments.shape[1:])
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


class DeviceStepContext:
    """What the slots of a process share: the device, room for moments, and step buffers."""

    def __init__(
        self,
        layout: Layout,
        device: Device,
        *,
        loss: Loss = functional.cross_entropy,
        direct: bool = True,
        precision: Precision = "float32",
    ) -> None:
        """Room for steps in `precision`.

        `direct` says that mailboxes are page-locked, so that gradients are copied to them.
        """
        self.device = device
        self.precision = precision
        self.loss = loss.to(device.where) if isinstance(loss, nn.Module) else loss
        self.direct = direct
        self.moments = torch.zeros(3, layout.num_features, device=device.where)
        self.statistics: Tensor | None = None
        """What frozen BN layers normalize with, float32 [2, F]; None takes the model's own."""
        self._buffers = [_StepBuffers(layout, device) for _ in range(device.ahead + 1)]
        self._next = 0
        device.finish()

    def buffers(self) -> _StepBuffers:
        """The buffers whose step was begun first; waits until that is over."""
        buffers = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffers.result is not None:
            buffers.result.wait()
        return buffers


class DeviceModelCopy:
    """The weights and the model of one concurrent step; see `workers.step.model_copy.ModelCopy`."""

    def __init__(self, model: FlatModel, context: DeviceStepContext) -> None:
        """Bind `model` to weights of this slot's own, on the device."""
        device, num_parameters = context.device, model.layout.num_parameters
        self._context = context
        self._there = torch.zeros(num_parameters, device=device.where)
        self._here = device.page_locked(num_parameters).zero_()
        self._weights: npt.NDArray[np.float32] = self._here.numpy()
        statistics = context.statistics
        if statistics is not None:
            statistics = statistics.to(device.where, copy=True)
        model.bind(self._there, moments=context.moments, statistics=statistics)
        self._module = model.module.train()
        _move_buffers(self._module, device.where)
        self._parameters = [p for p in model.parameters if p.requires_grad]
        self._unsettled = has_spectral_norm(self._module)
        self._filled = True
        self._uploaded = device.up.record()
        self._computed = device.compute.record()
        device.finish()  # what filled these buffers belongs to no stream of ours

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """Where a pull leaves the weights [P]: page-locked memory, for whoever will write to it.

        Waits until a copy from it is over, and the next step makes another.
        """
        self._uploaded.wait()
        self._filled = True
        return self._weights

    def step(
        self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, index: int, together: int = 1
    ) -> PendingResult:
        """Begin on a mini-batch's gradient; `index` is its place in the push, from 0.

        From the second on, the gradient is added to those before it, whose results must have been
        read by then. Inputs and targets may be used again at once, the mailbox when the result
        has been read. Mini-batches are not joined here: `together` is 1.
        """
        assert together == 1
        context, device = self._context, self._context.device
        buffers = context.buffers()
        up, compute, down = device.up, device.compute, device.down
        if self._filled:
            self._filled = False
            up.wait(self._computed)  # steps on the weights of before
            up.copy(self._there, self._here)
            self._uploaded = up.record()
        x, y = buffers.send(up, "inputs", inputs), buffers.send(up, "targets", targets)
        compute.wait(up.record())
        compute.run(lambda: self._compute(buffers, x, y))
        self._computed = compute.record()
        down.wait(self._computed)
        direct, first = context.direct, index == 0
        gradient = mailbox.gradient if direct and first else buffers.host_gradient
        moments = mailbox.moments[index] if direct else buffers.host_moments
        down.copy(gradient, buffers.box.gradient)
        down.copy(moments, buffers.box.moments[0])
        down.copy(buffers.host_tail, buffers.tail)
        done = down.record()

        def finish() -> StepResult:
            done.wait()
            loss, square = buffers.host_tail.tolist()
            if not direct:
                mailbox.moments[index].copy_(moments)
            if not first:
                mailbox.gradient.add_(gradient)
                return StepResult(loss=loss, gradient_norm=norm(mailbox.gradient))
            if not direct:
                mailbox.gradient.copy_(gradient)
            return StepResult(loss=loss, gradient_norm=root(square))

        buffers.result = PendingResult(finish)
        return buffers.result

    def _compute(self, buffers: _StepBuffers, inputs: Tensor, targets: Tensor) -> None:
        box = buffers.box
        if self._unsettled:
            settle_spectral_norm(self._module)
            self._unsettled = False
        loss = differentiate(
            self._context.loss,
            self._module,
            inputs,
            targets,
            self._parameters,
            box.views,
            box.gradient,
            self._context.precision,
        )
        box.moments[0].copy_(self._context.moments)
        buffers.tail[0].copy_(loss)
        buffers.tail[1].copy_(torch.dot(box.gradient, box.gradient))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Tensors of the module's own that are neither parameters nor batch normalization's.

    Plain attributes are among them, which `Module.to` would leave where they are.
    """
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != device:
                part._buffers[name] = buffer.to(device)
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_meta and value.device != device:
                setattr(part, name, value.detach().to(device))
