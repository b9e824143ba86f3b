"""A slot whose model lives on a device; `workers.step.model_copy` has the slot for processors.

Weights go up in one copy from the page-locked buffer that a pull writes to; gradient and moments
come down to the mailbox, and with them, in one copy more, loss and gradient norm. A step only gives
the device its work. Whoever reads its result waits, once, for all of it; meanwhile the next step
may have been begun, whose weights and mini-batch go up while this one is computed.

Why no copy meets another's, or a kernel's, is in docs/devices.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from downpour.models.conversion.state import has_spectral_norm, settle_spectral_norm
from downpour.models.flat import FlatModel
from downpour.workers.step.captured import CapturedStep, Found, Outcome, alike
from downpour.workers.step.device import Event
from downpour.workers.step.device_context import DeviceStepContext, PendingResult, StepBuffers
from downpour.workers.step.eager import differentiate
from downpour.workers.step.joining import FEW, can_join
from downpour.workers.step.model_copy import Mailbox, StepResult, norm, root
from downpour.workers.step.random_state import random_state, set_random_state
from downpour.workers.step.record_book import Shape
from downpour.workers.step.recording import CannotRecord, check_repeatable

log = logging.getLogger(__name__)


class DeviceModelCopy:
    """The weights and the model of one concurrent step; see `workers.step.model_copy.ModelCopy`."""

    def __init__(self, model: FlatModel, context: DeviceStepContext) -> None:
        """Bind `model` to weights of this slot's own, on the device."""
        device, num_parameters = context.device, model.layout.num_parameters
        self._context = context
        self._there = torch.zeros(num_parameters, device=device.where)
        self._here = device.page_locked(num_parameters).zero_()
        self._weights: npt.NDArray[np.float32] = self._here.numpy()
        self._model = model
        statistics = context.statistics
        statistics = model.initial.statistics if statistics is None else statistics
        self._statistics = statistics.to(device.where, copy=True)
        self._bound: tuple[Tensor, int] | None = None
        self._bind(self._there, 1)
        self._module = model.module.train()
        _move_buffers(self._module, device.where)
        self._parameters = [p for p in model.parameters if p.requires_grad]
        self._unsettled = has_spectral_norm(self._module)
        self._filled = True
        self._uploaded = device.up.record()
        self._computed = device.compute.record()
        device.finish()  # what filled these buffers belongs to no stream of ours

    def _bind(self, weights: Tensor, together: int) -> None:
        """Have the model read these weights, and its layers take so many mini-batches at a time."""
        if self._bound is None or self._bound[0] is not weights or self._bound[1] != together:
            self._model.bind(
                weights,
                moments=self._context.moments(together),
                statistics=self._statistics,
                together=together,
            )
            self._bound = weights, together

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
        """Begin on the gradient of one mini-batch, or of several of equal size.

        From the second of a push on, the gradient is added to those before it, whose results must
        have been read by then. Inputs and targets may be used again at once, the mailbox when the
        result has been read.

        Args:
            inputs: float32 [m*together, ...]; example i of mini-batch j is row i*together + j.
            targets: [m*together, ...], likewise.
            mailbox: where gradient and moments are left.
            index: place of the first of the mini-batches in the push, from 0.
            together: mini-batches.
        """
        context, device = self._context, self._context.device
        buffers = context.buffers()
        up = device.up
        if self._filled:
            self._filled = False
            up.wait(self._computed)  # steps on the weights of before
            up.copy(self._there, self._here)
            self._uploaded = up.record()
        x, y = buffers.send(up, "inputs", inputs), buffers.send(up, "targets", targets)
        device.compute.wait(up.record())
        self._prepare(x, y, together)
        direct, first = context.direct, index == 0
        gradient = mailbox.gradient if direct and first else buffers.host_gradient
        place = mailbox.moments[index : index + together]
        moments = place if direct else buffers.host_moments[:together]

        def begin() -> tuple[Event, float]:
            """Give the device its work; gives its end, and the factor on the loss."""
            scale = context.tell_scale()
            return self._begin(buffers, x, y, gradient, moments, together), scale

        begun = begin()

        def finish() -> StepResult:
            loss, square = self._wait(buffers, begun, begin)
            if not direct:
                place.copy_(moments)
            if not first:
                mailbox.gradient.add_(gradient)
                return StepResult(loss=loss / together, gradient_norm=norm(mailbox.gradient))
            if not direct:
                mailbox.gradient.copy_(gradient)
            return StepResult(loss=loss / together, gradient_norm=root(square))

        buffers.result = PendingResult(finish)
        return buffers.result

    def _begin(
        self,
        buffers: StepBuffers,
        x: Tensor,
        y: Tensor,
        gradient: Tensor,
        moments: Tensor,
        together: int,
    ) -> Event:
        """Have a step computed and its result copied down to the host; gives the end of that."""
        compute, down = self._context.device.compute, self._context.device.down
        found = buffers.found
        captured = self._context.book.recordings.get(_shape(x, y, together))
        if captured is None:
            compute.run(lambda: self._compute(self._there, x, y, found, together))
        else:
            compute.run(lambda: captured.run(self._there, x, y, found))
        self._computed = compute.record()
        down.wait(self._computed)
        down.copy(gradient, found.box.gradient)
        down.copy(moments, found.box.moments[:together])
        down.copy(buffers.host_tail, found.tail)
        return down.record()

    def _wait(
        self,
        buffers: StepBuffers,
        begun: tuple[Event, float],
        begin: Callable[[], tuple[Event, float]],
    ) -> tuple[float, float]:
        """Loss and square of the gradient's norm, once they have come.

        A step whose scaled gradient overflows begins anew with half the factor. Its weights and its
        mini-batch are still on the device: nobody replaces them before its result is read.
        """
        done, scale = begun
        first = scale
        while True:
            done.wait()
            loss, square = buffers.host_tail.tolist()
            scales = self._context.scale
            if scales is None or not math.isfinite(loss):
                break  # with a loss that is not finite, no factor would help
            if math.isfinite(square):
                scales.succeeded()
                break
            if not scales.overflowed(scale):
                scales.was_not_to_blame(first)
                break
            done, scale = begin()
        return loss, square

    def _compute(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, found: Found, together: int
    ) -> None:
        """Find gradient, moments and loss of the mini-batches; part of what a stream runs."""
        context, box = self._context, found.box
        if self._unsettled:
            self._bind(weights, 1)
            settle_spectral_norm(self._module)
            self._unsettled = False
        if together == 1 or context.joinable:
            loss = self._pass(weights, inputs, targets, box, 0, together)
        else:
            spare = context.spare("one of several").box
            loss = self._pass(weights, inputs[::together], targets[::together], box, 0, 1)
            for j in range(1, together):
                x, y = inputs[j::together], targets[j::together]
                loss = loss + self._pass(weights, x, y, spare, j, 1)
                box.gradient.add_(spare.gradient)
                box.moments[j].copy_(spare.moments[j])
        found.tail[0].copy_(loss)
        found.tail[1].copy_(torch.dot(box.gradient, box.gradient))

    def _pass(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, box: Mailbox, j: int, together: int
    ) -> Tensor:
        """One pass over so many mini-batches, whose moments are put in place `j`; the loss."""
        context = self._context
        self._bind(weights, together)
        loss = differentiate(
            context.loss(together),
            self._module,
            inputs.contiguous(),
            targets.contiguous(),
            self._parameters,
            box.views,
            box.gradient,
            context.precision,
            context.scale_there,
        )
        context.leave_moments(box.moments[j : j + together], together)
        return loss

    def _prepare(self, x: Tensor, y: Tensor, together: int) -> None:
        """Find out whether mini-batches may be joined, and capture or compare, if it is time."""
        context = self._context
        if together > 1 and context.joinable is None:
            context.joinable = self._can_join(x, y, together)
        shape = _shape(x, y, together)
        if context.book.due(shape):
            self._capture(shape, x, y, together)
        elif context.book.check_due(shape):
            self._check(shape, x, y, together)

    def _can_join(self, x: Tensor, y: Tensor, together: int) -> bool:
        """Whether mini-batches may be joined, by a few rows of each: float64 takes room."""
        verdict: list[bool] = []
        few = x[: FEW * together], y[: FEW * together]
        self._run(
            lambda: verdict.append(can_join(self._module, self._context.loss, *few, together))
        )
        return verdict[0]

    def _run(self, work: Callable[[], object]) -> None:
        """Have the compute stream do this, and wait until nothing is under way."""
        failed: list[Exception] = []

        def careful() -> None:
            try:
                work()
            except Exception as error:
                failed.append(error)

        self._context.device.compute.run(careful)
        self._context.device.finish()
        if failed:
            raise failed[0]

    def _capture(self, shape: Shape, x: Tensor, y: Tensor, together: int) -> None:
        """Capture a step of this shape, and keep the graph if it does what the step does."""
        context = self._context
        recordings, where = context.book.recordings, context.device.where
        recordings[shape] = None
        context.device.finish()  # steps under way may draw random numbers
        state = random_state(where)
        try:
            # Which also has libraries made ready whose first use cannot be captured.
            expected = self._outcome(None, x, y, together)
            if context.scale is not None and not expected[1].isfinite().all():
                context.book.postpone(shape)  # until the factor is one that fits
                return
            self._run(lambda: self._check_repeatable(x, y, together))
            set_random_state(where, state)
            captured = self._captured(x, y, together)
            set_random_state(where, state)
            if alike(expected, self._outcome(captured, x, y, together), context.precision):
                recordings[shape] = captured
                log.info("steps on mini-batches of %s are captured as graphs", list(x.shape))
            else:
                log.warning("a captured step gives other results: steps are not captured")
        except CannotRecord as error:
            log.info("steps are not captured as graphs: %s", error)
        except Exception as error:  # whatever it is, the step itself goes on without
            why = str(error).partition("\n")[0]
            log.warning("steps are not captured: %s: %s", type(error).__name__, why)
        finally:
            set_random_state(where, state)

    def _check_repeatable(self, x: Tensor, y: Tensor, together: int) -> None:
        """Raise `CannotRecord` if a graph would not repeat what a step does.

        A few rows of one mini-batch are enough: all that their kernels leave is kept meanwhile.
        """
        context = self._context
        self._bind(self._there, 1)
        rows = slice(0, FEW * together, together)
        few = x[rows].contiguous(), y[rows].contiguous()
        check_repeatable(self._model, context.loss(1), *few, context.precision)

    def _captured(self, x: Tensor, y: Tensor, together: int) -> CapturedStep:
        context = self._context
        captured = CapturedStep(self._model.layout, x, y, context.depth)
        # Now, since nothing may be allocated for the model while kernels are captured.
        self._bind(captured.weights, together if context.joinable else 1)
        context.device.finish()
        try:
            captured.capture(
                context.device,
                lambda: self._compute(
                    captured.weights, captured.inputs, captured.targets, captured.found, together
                ),
            )
        finally:
            self._bind(self._there, 1)
            context.device.finish()
        return captured

    def _check(self, shape: Shape, x: Tensor, y: Tensor, together: int) -> None:
        """Go on without this shape's graph if it no longer does what the step does."""
        context = self._context
        captured, where = context.book.recordings[shape], context.device.where
        assert captured is not None
        context.device.finish()
        state = random_state(where)
        try:
            expected = self._outcome(None, x, y, together)
            set_random_state(where, state)
            found = self._outcome(captured, x, y, together)
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
            log.warning("a captured step cannot be compared, and is given up: %s", why)
        else:
            overflows = context.scale is not None and not expected[1].isfinite().all()
            if overflows or alike(expected, found, context.precision):
                return
            log.warning(
                "a captured step gives other results on another mini-batch, as if the model "
                "decided something anew for each: steps are not captured any more, and %d were "
                "since the last comparison",
                context.book.runs(shape),
            )
        finally:
            set_random_state(where, state)
        context.book.recordings[shape] = None
        captured.release()

    def _outcome(
        self, captured: CapturedStep | None, x: Tensor, y: Tensor, together: int
    ) -> Outcome:
        """What a step finds, by a graph or without; waits for it."""
        spare, outcomes = self._context.spare("compared"), list[Outcome]()

        def work() -> None:
            for place in (spare.box.gradient, spare.box.moments, spare.tail):
                place.fill_(math.nan)  # so that one that is not written to shows
            if captured is None:
                self._compute(self._there, x, y, spare, together)
            else:
                captured.run(self._there, x, y, spare)
            outcomes.append(spare.outcome(together))

        self._run(work)
        return outcomes[0]


def _shape(inputs: Tensor, targets: Tensor, together: int) -> Shape:
    return inputs.shape, inputs.dtype, targets.shape, targets.dtype, together


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
