"""One slot of a replica: its own copy of the weights, and one training step on a mini-batch.

A slot's model reads weights that were pulled into a private buffer, and autograd writes the
gradient straight into the slot's mailbox, where the parameter server finds it; the moments of the
mini-batch go there, too. Slots are what makes concurrent steps: each holds the weights of the
version that it pulled, however long its turn takes to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from models.flat import FlatModel
from models.registry import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step found."""

    loss: float
    """Mean loss over the mini-batch; of cross-entropy, in nats."""
    gradient_norm: float
    """Euclidean norm of what is in the mailbox now."""


class Slot:
    """The weights, model and mailbox of one concurrent step."""

    def __init__(
        self,
        model: FlatModel,
        gradient: Tensor,
        moments: Tensor,
        loss: Loss = functional.cross_entropy,
    ) -> None:
        """Bind `model` to a mailbox: `gradient` [P] and `moments` [depth, 3, F]."""
        layout = model.layout
        self.weights: npt.NDArray[np.float32] = np.zeros(layout.num_parameters, np.float32)
        self._gradient = gradient
        self._moments = moments
        self._loss = loss
        # With one mini-batch a push, the layers write where the server reads. With several, each
        # step's moments are kept apart, since the averages are by mini-batch.
        self._scratch = moments[0] if len(moments) == 1 else torch.zeros(3, layout.num_features)
        model.bind(torch.from_numpy(self.weights), gradient=gradient, moments=self._scratch)
        self._module = model.module.train()

    def step(self, inputs: Tensor, targets: Tensor, index: int) -> StepResult:
        """Add a mini-batch's gradient to the mailbox; `index` is its place in the push, from 0."""
        if index == 0:
            self._gradient.zero_()
        loss = self._loss(self._module(inputs), targets)
        torch.autograd.backward(loss)
        if self._scratch is not self._moments[0] and len(self._moments) > 1:
            self._moments[index].copy_(self._scratch)
        return StepResult(loss=loss.item(), gradient_norm=self._norm())

    def _norm(self) -> float:
        square = torch.dot(self._gradient, self._gradient).item()
        return math.sqrt(square) if square >= 0 else math.nan
