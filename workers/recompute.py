"""Gradients computed again from their weights, one at a time: what a replay is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.workers.spec import ModelSpec, Precision
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a step left behind, in memory of its own."""

    gradient: Tensor
    """Float32 [P]."""
    moments: Tensor
    """Float32 [1, 3, F]."""
    loss: float
    gradient_norm: float
    examples: int


class Recomputer:
    """One slot without a server: weights and a mini-batch in, a gradient out."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[int, int], tuple[Tensor, Tensor]],
        statistics: Tensor | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Steps in `precision`; `load(epoch, batch)` gives inputs and targets of a mini-batch.

        Frozen BN layers normalize with `statistics`, float32 [2, F]; None takes the model's own.
        """
        self._load = load
        model = spec.build_flat()
        layout = model.layout
        gradient = torch.zeros(layout.num_parameters)
        moments = torch.zeros(1, 3, layout.num_features)
        self._mailbox = Mailbox(0, layout, gradient, moments)
        # Not recorded: a replay trusts as little as it can.
        context = StepContext(layout, loss=spec.build_loss(), recorded=False, precision=precision)
        context.statistics = statistics
        self._slot = ModelCopy(model, context)

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """Where the weights are to be put, float32 [P]."""
        return self._slot.weights

    def compute(self, epoch: int, batch: int) -> Computed:
        """The gradient of a mini-batch at `weights`."""
        inputs, targets = self._load(epoch, batch)
        result = self._slot.step(inputs, targets, self._mailbox, 0)
        return Computed(
            gradient=self._mailbox.gradient.clone(),
            moments=self._mailbox.moments.clone(),
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            examples=len(inputs),
        )
