"""The moments of training mini-batches, of several in one pass where a model allows it.

What Algorithm 2 averages. Small mini-batches leave kernels small, so those of equal shape go
through the network together, each normalised by itself (`models.batchnorm`). Not here: what is made
of the moments (`evaluator`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Generator, Iterable, Iterator

import torch
from torch import Tensor

from downpour.models.flat import FlatModel

log = logging.getLogger(__name__)

MOST_TOGETHER = 16
"""Mini-batches of a pass at most."""
JOINED_BYTES = 2 << 20
"""Most bytes of inputs that are joined: feature maps of more would not stay in a cache."""
TOLERANCE = 1e-3
"""Largest difference of a joined mini-batch's moments from its own, in standard deviations.
Rounding stays far below, a layer that mixes mini-batches above."""


class JointMoments:
    """Training forwards of one model, for the moments that they leave."""

    def __init__(self, model: FlatModel) -> None:
        """`model` is bound to its weights for single mini-batches."""
        self._model = model
        self._joinable: bool | None = None
        """None until it has been tried."""
        self._bound_for = 1
        self._own_moments: Tensor | None = None
        """Where the model left moments before it was bound for several."""

    def of(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Generator[Tensor, None, None]:
        """Moments float32 [k, 3, F] of the next k of `batches`, until there are no more.

        k is 1 if a model's mini-batches cannot be joined: it mixes their rows in some other way
        than batch normalization, or draws random numbers. The model is in training mode. It is
        bound as it was once the iterator is at its end, or closed.

        Args:
            batches: inputs [m, ...] and targets of each mini-batch; targets are not looked at.
        """
        try:
            for group in groups(inputs for inputs, _ in batches):
                if len(group) > 1 and self._joinable is None:
                    yield self._try(group)
                elif len(group) > 1 and self._joinable:
                    yield self._together(group)
                else:
                    for inputs in group:
                        yield self._alone(inputs)
        finally:
            self._bind(1)

    def _bind(self, together: int) -> None:
        """Have the model take so many mini-batches at a time."""
        if together == self._bound_for:
            return
        model, moments = self._model, self._own_moments
        if self._bound_for == 1:
            self._own_moments = model.moments
        if together > 1:
            moments = None  # memory of its own
        model.bind(model.weights, model.gradient, moments, model.statistics, together)
        self._bound_for = together

    def _alone(self, inputs: Tensor) -> Tensor:
        self._bind(1)
        self._model.module(inputs)
        return self._model.moments.clone()[None]

    def _together(self, group: list[Tensor]) -> Tensor:
        model, together = self._model, len(group)
        self._bind(together)
        columns = model.layout.moment_columns(together).flatten().to(model.weights.device)
        model.module(torch.stack(group, 1).flatten(0, 1))
        found = model.moments.index_select(1, columns)
        return found.view(3, together, -1).transpose(0, 1)

    def _try(self, group: list[Tensor]) -> Tensor:
        """The moments of each by itself; notes whether one pass over all finds the same."""
        before = torch.get_rng_state(), random.getstate()
        alone = torch.cat([self._alone(inputs) for inputs in group])
        drawn = random.getstate() != before[1] or not torch.equal(torch.get_rng_state(), before[0])
        self._joinable = not drawn and self._finds_the_same(group, alone)
        return alone

    def _finds_the_same(self, group: list[Tensor], alone: Tensor) -> bool:
        try:
            joined = self._together(group)
        except Exception as error:  # whatever it is, mini-batches go through one by one
            log.info("mini-batches are not joined: %s: %s", type(error).__name__, error)
            return False
        (count, mean, variance), (counts, means, variances) = alone.unbind(1), joined.unbind(1)
        scale = variance + 1e-12
        same = torch.stack([(means - mean) / scale.sqrt(), (variances - variance) / scale])
        finite = torch.isfinite(alone[:, 1:]).flatten(1).all(1)
        close = bool((same[:, finite].abs() <= TOLERANCE).all())
        return bool(finite.any()) and close and torch.equal(count, counts)


def groups(all_inputs: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of equal shape [m, ...], so many that they may be joined; in their order."""
    group: list[Tensor] = []
    for inputs in all_inputs:
        if group and (inputs.shape != group[0].shape or inputs.dtype != group[0].dtype):
            yield group
            group = []
        group.append(inputs)
        size = max(1, inputs.numel() * inputs.element_size())
        if len(group) >= min(MOST_TOGETHER, max(1, JOINED_BYTES // size)):
            yield group
            group = []
    if group:
        yield group
