"""One slot of a replica: its own copy of the weights, and one training step on a mini-batch.

A slot's model reads weights that were pulled into a private buffer. The gradient and the moments
of a mini-batch are left in a mailbox, where the parameter server finds them; mailboxes belong to
the process, and a step is given one that is free. Slots are what makes concurrent steps: each
holds the weights of the version that it pulled, however long its turn takes to come.

After some steps the step is recorded (`workers.step.recording`), and the recording runs in its
place from then on, if on one mini-batch it gives the same loss, gradient and moments to the bit.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from downpour.models.flat import FlatModel
from downpour.models.layout import Layout
from downpour.models.registry import Loss
from downpour.workers.step.eager import differentiate
from downpour.workers.step.recording import CannotRecord, Recording, record

log = logging.getLogger(__name__)

RECORD_AFTER = 1
"""Steps of a process on mini-batches of one shape after which the step is recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step found."""

    loss: float
    """Mean loss over the mini-batch; of cross-entropy, in nats."""
    gradient_norm: float
    """Euclidean norm of what is in the mailbox now."""


class Mailbox:
    """Where a push's gradient [P] and moments [depth, 3, F] are left."""

    def __init__(self, index: int, layout: Layout, gradient: Tensor, moments: Tensor) -> None:
        """The process's mailbox number `index`."""
        self.index = index
        self.gradient = gradient
        self.moments = moments
        self.views = tuple(
            gradient[entry.start : entry.stop].view(entry.shape) for entry in layout.entries
        )
        """The gradient by parameter, in the layout's order."""


class Workshop:
    """What the slots of a process share: room for moments, and recordings by shape."""

    def __init__(
        self,
        layout: Layout,
        *,
        loss: Loss = functional.cross_entropy,
        recorded: bool = True,
        record_after: int = RECORD_AFTER,
    ) -> None:
        """`recorded` says whether steps are recorded at all."""
        self.loss = loss
        self.moments = torch.zeros(3, layout.num_features)
        self.recordings: dict[tuple[object, ...], Recording | None] = {}
        """By the shapes of a mini-batch; None where there is no recording to be had."""
        self._spare: Mailbox | None = None
        self._layout = layout
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recorded = recorded
        self._record_after = record_after

    def spare(self) -> Mailbox:
        """A mailbox that is never pushed, made when it is first wanted."""
        if self._spare is None:
            self._spare = Mailbox(
                -1,
                self._layout,
                torch.zeros(self._layout.num_parameters),
                torch.zeros(1, 3, self._layout.num_features),
            )
        return self._spare

    def due(self, shape: tuple[object, ...]) -> bool:
        """Count one more step of this shape; whether it is now time to record it."""
        if not self._recorded or shape in self.recordings:
            return False
        self._seen[shape] += 1
        return self._seen[shape] > self._record_after


class Slot:
    """The weights and the model of one concurrent step."""

    def __init__(self, model: FlatModel, workshop: Workshop) -> None:
        """Bind `model` to weights of this slot's own."""
        layout = model.layout
        self.weights: npt.NDArray[np.float32] = np.zeros(layout.num_parameters, np.float32)
        self._workshop = workshop
        self._model = model
        model.bind(torch.from_numpy(self.weights), moments=workshop.moments)
        self._module = model.module.train()
        self._trained = [(i, p) for i, p in enumerate(model.parameters) if p.requires_grad]
        self._parameters = [p for _, p in self._trained]
        self._statics: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def step(self, inputs: Tensor, targets: Tensor, mailbox: Mailbox, index: int) -> StepResult:
        """Leave a mini-batch's gradient; `index` is its place in the push, from 0.

        From the second on, the gradient is added to those before it.
        """
        shape = (inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        if self._workshop.due(shape):
            self._record(shape, inputs, targets)
        target = mailbox if index == 0 else self._workshop.spare()
        loss = self._compute(shape, inputs, targets, target)
        if target is not mailbox:
            mailbox.gradient.add_(target.gradient)
        mailbox.moments[index].copy_(self._workshop.moments)
        return StepResult(loss=loss.item(), gradient_norm=norm(mailbox.gradient))

    def _compute(
        self, shape: tuple[object, ...], inputs: Tensor, targets: Tensor, mailbox: Mailbox
    ) -> Tensor:
        if len(self._trained) < len(mailbox.views):
            mailbox.gradient.zero_()  # the rest is not written to
        recording = self._workshop.recordings.get(shape)
        if recording is None:
            return self._compute_eagerly(inputs, targets, mailbox)
        statics = self._statics.get(shape)
        if statics is None:
            weights = self._model.weights
            statics = self._statics[shape] = recording.bind(weights, self._workshop.moments)
        return recording.run(inputs, targets, statics, self._places(mailbox))

    def _compute_eagerly(self, inputs: Tensor, targets: Tensor, mailbox: Mailbox) -> Tensor:
        return differentiate(
            self._workshop.loss,
            self._module,
            inputs,
            targets,
            self._parameters,
            self._places(mailbox),
            mailbox.gradient,
        )

    def _places(self, mailbox: Mailbox) -> tuple[Tensor, ...]:
        if len(self._trained) == len(mailbox.views):
            return mailbox.views
        return tuple(mailbox.views[i] for i, _ in self._trained)

    def _record(self, shape: tuple[object, ...], inputs: Tensor, targets: Tensor) -> None:
        """Record a step of this shape, and keep the recording if it does what the step does."""
        workshop = self._workshop
        workshop.recordings[shape] = None
        random_state = torch.get_rng_state()
        try:
            recording = record(self._model, workshop.loss, inputs, targets)
            torch.set_rng_state(random_state)
            expected = self._outcome(shape, inputs, targets)
            workshop.recordings[shape] = recording
            torch.set_rng_state(random_state)
            if all(map(_same_bits, expected, self._outcome(shape, inputs, targets))):
                log.info("steps on mini-batches of %s are recorded", list(inputs.shape))
                return
            log.warning("a recorded step gives other results: steps are not recorded")
        except CannotRecord as error:
            log.info("steps are not recorded: %s", error)
        except Exception as error:  # whatever it is, the step itself goes on without
            log.warning("steps are not recorded: %s: %s", type(error).__name__, error)
        finally:
            torch.set_rng_state(random_state)
        workshop.recordings[shape] = None

    def _outcome(
        self, shape: tuple[object, ...], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        spare = self._workshop.spare()
        spare.gradient.zero_()
        for place in self._places(spare):
            place.fill_(math.nan)  # so that one that is not written to shows
        loss = self._compute(shape, inputs, targets, spare)
        return loss, spare.gradient.clone(), self._workshop.moments.clone()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Not `torch.equal`, to which NaN is not NaN.
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def norm(gradient: Tensor) -> float:
    """Euclidean norm of a gradient [P]; NaN where it has no norm."""
    return root(torch.dot(gradient, gradient).item())


def root(square: float) -> float:
    """The norm of which this is the square."""
    return math.sqrt(square) if square >= 0 else math.nan
