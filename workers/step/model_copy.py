"""A model copy: weights of its own, and one training step on them.

A model copy reads weights that were pulled into a private buffer. It leaves the gradient and the
moments of its mini-batches in a mailbox, where the parameter server finds them. Mailboxes belong
to the process; a step is given one that is free.

A step takes one mini-batch, or several that begin on the same weights and are computed in one
pass (`together`). Batch normalization sees each of them by itself, as the paper's mini-batch
demands (`models.batchnorm`), so the outcome is that of one after the other, up to rounding: the
gradient is their gradients' sum, and each leaves moments of its own. `workers.step.joining` finds
out whether a model's mini-batches may be joined, and whether that is faster.

After some steps on mini-batches of one shape the step is recorded (`workers.step.recording`). The
recording runs in its place from then on, as long as it gives the same loss, gradient and moments to
the bit: on the mini-batch that was recorded, on the next one, and now and then from there on
(`workers.step.record_book`). Steps that take long are not recorded, which would gain nothing.

Not here: models on a device (`device_model_copy`), and whose turn it is (`workers.replica`).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from downpour.models.conversion.randomness import RandomState
from downpour.models.conversion.state import has_spectral_norm, settle_spectral_norm
from downpour.models.flat import FlatModel
from downpour.models.layout import Layout
from downpour.models.outputs import Loss
from downpour.workers.spec import Precision
from downpour.workers.step.eager import differentiate
from downpour.workers.step.joining import (
    JoinTrial,
    JointRoom,
    can_join,
    in_blocks,
    some_rows,
    wants_blocks,
)
from downpour.workers.step.record_book import RECORD_AFTER, RecordBook, Shape
from downpour.workers.step.recording import CannotRecord, Recording, record

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step found."""

    loss: float
    """Mean loss over the step's examples; of cross-entropy, in nats."""
    gradient_norm: float
    """Euclidean norm of what is in the mailbox now."""


class Mailbox:
    """Where a push's gradient float32 [T] and moments float32 [depth, 3, F] are left.

    T are the parameters that are trained, which lie first.
    """

    def __init__(self, index: int, layout: Layout, gradient: Tensor, moments: Tensor) -> None:
        """The process's mailbox number `index`."""
        self.index = index
        self.gradient = gradient[: layout.trained]
        self.moments = moments
        self.views = tuple(
            gradient[entry.start : entry.stop].view(entry.shape)
            for entry in layout.entries
            if entry.trained
        )
        """The gradient by trained parameter, in the layout's order."""


class StepContext(JointRoom):
    """What the model copies of a process share: room for moments, and recordings by shape."""

    def __init__(
        self,
        layout: Layout,
        *,
        loss: Loss = functional.cross_entropy,
        recorded: bool = True,
        watched: bool = False,
        record_after: int = RECORD_AFTER,
        depth: int = 1,
        precision: Precision = "float32",
    ) -> None:
        """Room for steps of up to `depth` mini-batches together.

        Args:
            layout: of the model.
            loss: `(outputs, targets) -> mean loss` of a mini-batch.
            recorded: whether steps are recorded at all.
            watched: whether the model may decide by what a recording does not see; see `record`.
            record_after: steps of one shape before it is recorded.
            depth: most mini-batches of a step.
            precision: that forward and backward passes compute in.
        """
        super().__init__(layout, loss)
        self.precision = precision
        self.watched = watched
        self.book: RecordBook[Recording] = RecordBook(recorded=recorded, record_after=record_after)
        self.extraordinary = 0
        """Passes so far that took longer than they will: the first of a shape, and those that were
        recorded or compared."""
        self.joinable: bool | None = None
        """Whether mini-batches may be joined; None until it has been tried."""
        self.statistics: Tensor | None = None
        """What frozen BN layers normalize with, float32 [2, F]; None takes the model's own."""
        self._trials: dict[int, JoinTrial] = {}
        self._spare: Mailbox | None = None
        self._layout = layout
        self._depth = depth

    @property
    def recordings(self) -> dict[Shape, Recording | None]:
        """By the shapes of a step; None where there is no recording to be had."""
        return self.book.recordings

    def trial(self, together: int) -> JoinTrial:
        """Which way of computing so many mini-batches is the faster one here."""
        if together not in self._trials:
            self._trials[together] = JoinTrial()
        return self._trials[together]

    def spare(self) -> Mailbox:
        """A mailbox that is never pushed, made when it is first wanted."""
        if self._spare is None:
            self._spare = Mailbox(
                -1,
                self._layout,
                torch.zeros(self._layout.num_parameters),
                torch.zeros(self._depth, 3, self._layout.num_features),
            )
        return self._spare


class ModelCopy:
    """Weights float32 [P] of its own, and the model that reads them."""

    def __init__(self, model: FlatModel, context: StepContext) -> None:
        """Bind `model` to weights of this copy's own."""
        layout = model.layout
        self.weights: npt.NDArray[np.float32] = np.zeros(layout.num_parameters, np.float32)
        self._context = context
        self._model = model
        self._bound = (0, False)
        self._bind(1)
        self._module = model.module.train()
        self._parameters = [p for p in model.parameters if p.requires_grad]
        self._statics: dict[Shape, tuple[Tensor, ...]] = {}
        self._unsettled = has_spectral_norm(model.module)

    def _bind(self, together: int, blocks: bool = False) -> None:
        """Have the model's layers take so many mini-batches at a time, interleaved or in blocks."""
        if (together, blocks) != self._bound:
            moments = self._context.moments(together)
            self._model.bind(
                torch.from_numpy(self.weights),
                moments=moments,
                statistics=self._context.statistics,
                together=together,
                in_blocks=blocks,
            )
            self._bound = (together, blocks)

    def step(
        self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, index: int, together: int = 1
    ) -> StepResult:
        """Leave the gradient and the moments of one mini-batch, or of several of equal size.

        From the second mini-batch of a push on, the gradient is added to those before it.

        Args:
            inputs: float32 [m*together, ...]; example i of mini-batch j is row i*together + j.
            targets: [m*together, ...], likewise.
            mailbox: where they are left.
            index: place of the first of the mini-batches in the push, from 0.
            together: mini-batches.
        """
        context = self._context
        if together > 1 and context.joinable is None:
            few = some_rows(inputs, together)
            blocks = wants_blocks(inputs, together)
            context.joinable = can_join(
                self._module, context.loss, inputs[:few], targets[:few], together, blocks
            )
        if together == 1:
            return self._pass(inputs, targets, mailbox, index, 1)
        if not context.joinable:
            return self._separately(inputs, targets, mailbox, index, together)
        trial = context.trial(together)
        joined, began_s, ordinary = trial.next(), time.thread_time(), context.extraordinary
        compute = self._pass if joined else self._separately
        result = compute(inputs, targets, mailbox, index, together)
        if trial.joined is None and context.extraordinary == ordinary:
            trial.add(joined, time.thread_time() - began_s)
        return result

    def _separately(
        self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, index: int, together: int
    ) -> StepResult:
        """A pass over each of the mini-batches."""
        losses = 0.0
        for j in range(together):
            x, y = inputs[j::together].contiguous(), targets[j::together].contiguous()
            result = self._pass(x, y, mailbox, index + j, 1)
            losses += result.loss
        return StepResult(loss=losses / together, gradient_norm=result.gradient_norm)

    def _pass(
        self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, index: int, together: int
    ) -> StepResult:
        """One pass over all of them."""
        context = self._context
        if wants_blocks(inputs, together):
            inputs, targets = in_blocks(inputs, together), in_blocks(targets, together)
        shape = (inputs.shape, inputs.dtype, targets.shape, targets.dtype, together)
        if context.book.due(shape):
            context.extraordinary += 1
            self._record(shape, inputs, targets, together)
        elif context.book.check_due(shape):
            context.extraordinary += 1
            self._check(shape, inputs, targets, together)
        target = mailbox if index == 0 else context.spare()
        if context.book.knows(shape):
            loss = self._compute(shape, inputs, targets, target, together)
        else:
            context.extraordinary += 1
            began_s = time.thread_time()
            loss = self._compute(shape, inputs, targets, target, together)
            context.book.took(shape, time.thread_time() - began_s)
        if target is not mailbox:
            mailbox.gradient.add_(target.gradient)
        context.leave_moments(mailbox.moments[index : index + together], together)
        return StepResult(loss=loss.item() / together, gradient_norm=norm(mailbox.gradient))

    def _compute(
        self, shape: Shape, inputs: Tensor, targets: Tensor, mailbox: Mailbox, together: int
    ) -> Tensor:
        """Leave the sum of the gradients in `mailbox`; gives the sum of the losses."""
        recording = self._context.book.recordings.get(shape)
        if recording is None:
            return self._compute_eagerly(inputs, targets, mailbox, together)
        statics = self._statics.get(shape)
        if statics is None:
            moments = self._context.moments(together)
            statics = self._statics[shape] = recording.bind(self._model.weights, moments)
        return recording.run(inputs, targets, statics, mailbox.views)

    def _compute_eagerly(
        self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, together: int
    ) -> Tensor:
        blocks = wants_blocks(inputs, together)
        self._bind(together, blocks)
        if self._unsettled:  # by the first weights; each step settles what it changes
            settle_spectral_norm(self._module)
            self._unsettled = False
        return differentiate(
            self._context.loss(together, blocks),
            self._module,
            inputs,
            targets,
            self._parameters,
            mailbox.views,
            mailbox.gradient,
            self._context.precision,
        )

    def _record(self, shape: Shape, inputs: Tensor, targets: Tensor, together: int) -> None:
        """Record a step of this shape, and keep the recording if it does what the step does."""
        context = self._context
        context.recordings[shape] = None
        random_state = RandomState.now()
        blocks = wants_blocks(inputs, together)
        try:
            self._bind(together, blocks)
            recording = record(
                self._model,
                context.loss(together, blocks),
                inputs,
                targets,
                context.precision,
                watched=context.watched,
            )
            random_state.restore()
            if self._agrees(recording, shape, inputs, targets, together):
                context.recordings[shape] = recording
                log.info("steps on mini-batches of %s are recorded", list(inputs.shape))
            else:
                log.warning("a recorded step gives other results: steps are not recorded")
        except CannotRecord as error:
            log.info("steps are not recorded: %s", error)
        except Exception as error:  # whatever it is, the step itself goes on without
            log.warning("steps are not recorded: %s: %s", type(error).__name__, error)
        finally:
            random_state.restore()

    def _check(self, shape: Shape, inputs: Tensor, targets: Tensor, together: int) -> None:
        """Go on without this shape's recording if it no longer does what the step does."""
        context = self._context
        recording = context.recordings[shape]
        assert recording is not None
        if self._agrees(recording, shape, inputs, targets, together):
            context.recordings[shape] = recording
            return
        log.warning(
            "a recorded step gives other results on another mini-batch, as if the model decided "
            "something anew for each: steps are not recorded any more, and %d were since the last "
            "comparison",
            context.book.runs(shape),
        )

    def _agrees(
        self, recording: Recording, shape: Shape, inputs: Tensor, targets: Tensor, together: int
    ) -> bool:
        """Whether the recording gives here what the step gives, to the bit.

        No random number is drawn, and the shape is left without a recording.
        """
        recordings, random_state = self._context.recordings, RandomState.now()
        try:
            recordings[shape] = None
            expected = self._outcome(shape, inputs, targets, together)
            recordings[shape] = recording
            random_state.restore()
            found = self._outcome(shape, inputs, targets, together)
        finally:
            recordings[shape] = None
            random_state.restore()
        return all(map(_same_bits, expected, found))

    def _outcome(
        self, shape: Shape, inputs: Tensor, targets: Tensor, together: int
    ) -> tuple[Tensor, ...]:
        spare = self._context.spare()
        spare.gradient.zero_()
        for place in spare.views:
            place.fill_(math.nan)  # so that one that is not written to shows
        loss = self._compute(shape, inputs, targets, spare, together)
        return loss, spare.gradient.clone(), self._context.moments(together).clone()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Not `torch.equal`, to which NaN is not NaN.
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def norm(gradient: Tensor) -> float:
    """Euclidean norm of a gradient float32 [P]; NaN if it has no norm."""
    return root(torch.dot(gradient, gradient).item())


def root(square: float) -> float:
    """The norm of which this is the square."""
    return math.sqrt(square) if square >= 0 else math.nan
