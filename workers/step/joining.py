"""Several mini-batches in one pass: their loss, whether a model allows it, and whether it pays.

Whether it pays is for steps on processors; on a device, mini-batches are joined where they may be.

Before a model's mini-batches are joined, one pass is compared with separate ones. A model that
mixes the rows of a mini-batch in some other way than batch normalization is not joined.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from downpour.models.batchnorm import BatchNorm
from downpour.models.conversion.copies import detached_copy
from downpour.models.conversion.randomness import RandomState
from downpour.models.layout import Layout
from downpour.models.outputs import Loss, cross_entropy
from downpour.workers.step.eager import gradients
from downpour.workers.step.random_state import (
    random_state,
    same_random_state,
    set_random_state,
)

log = logging.getLogger(__name__)

ROW_MEANS = frozenset({cross_entropy, functional.cross_entropy})
"""Losses that are means over rows: over equal mini-batches they are the mean of their losses."""
TOLERANCE = 1e-7
"""Largest difference, relative to its norm, of a joined gradient from the separate ones' sum, in
float64: rounding stays far below, a layer that mixes mini-batches far above."""

FEW = 4
"""Rows of each mini-batch that are enough to compare, if they are large."""
MOST_VALUES = 1 << 17
"""Numbers of an input in which all rows are compared: float64 takes time and room."""


class JointLoss:
    """The sum of the losses of k mini-batches whose rows are interleaved, or lie in blocks.

    Example i of mini-batch j is row `i*k + j` of outputs and targets, or row `j*m + i`.
    """

    def __init__(self, loss: Loss, together: int, in_blocks: bool = False) -> None:
        """`loss` gives the mean over one mini-batch."""
        self._loss = loss
        self._together = together
        self._in_blocks = in_blocks

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Outputs [m*k, ...], or nested tuples, lists and dicts of such, to a scalar."""
        k = self._together
        if self._loss in ROW_MEANS:
            return k * self._loss(outputs, targets)
        part_of = _block if self._in_blocks else _interleaved
        parts = [
            self._loss(_rows(outputs, j, k, part_of), part_of(targets, j, k)) for j in range(k)
        ]
        return torch.stack(parts).sum()


def _interleaved(rows: Tensor, j: int, k: int) -> Tensor:
    return rows[j::k]


def _block(rows: Tensor, j: int, k: int) -> Tensor:
    size = len(rows) // k
    return rows[j * size : (j + 1) * size]


def _rows(values: Any, j: int, k: int, part_of: Callable[[Tensor, int, int], Tensor]) -> Any:
    """The rows of mini-batch j of k of all tensors in nested values."""
    if isinstance(values, Tensor):
        return part_of(values, j, k)
    if isinstance(values, dict):
        return type(values)((name, _rows(v, j, k, part_of)) for name, v in values.items())
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(_rows(v, j, k, part_of) for v in values))
    if isinstance(values, list | tuple):
        return type(values)(_rows(v, j, k, part_of) for v in values)
    return values


def wants_blocks(inputs: Tensor, together: int) -> bool:
    """Whether mini-batches together are to lie one after the other: those of images are.

    Their feature maps may be in channels-last order, which interleaved ones cannot keep.
    """
    return together > 1 and inputs.ndim >= 4


def in_blocks(rows: Tensor, together: int) -> Tensor:
    """Interleaved rows [m*k, ...] as blocks: row `i*k + j` becomes row `j*m + i`; new memory."""
    parts = rows.reshape(-1, together, *rows.shape[1:])
    return parts.transpose(0, 1).flatten(0, 1)


class JointRoom:
    """Losses, and where passes leave moments, by how many mini-batches a pass takes."""

    def __init__(self, layout: Layout, loss: Loss, device: torch.device | str = "cpu") -> None:
        """Room on `device`, made when it is first wanted."""
        self._layout = layout
        self._device = torch.device(device)
        self._loss = loss
        self._losses: dict[tuple[int, bool], Loss] = {}
        self._moments: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}

    def loss(self, together: int, blocks: bool = False) -> Loss:
        """The loss of so many mini-batches, interleaved or in blocks: the sum of theirs."""
        if together == 1:
            return self._loss
        if (together, blocks) not in self._losses:
            self._losses[together, blocks] = JointLoss(self._loss, together, blocks)
        return self._losses[together, blocks]

    def moments(self, together: int) -> Tensor:
        """Where a forward over so many mini-batches leaves moments, float32 [3, k*F]."""
        if together not in self._moments:
            columns = together * self._layout.num_features
            self._moments[together] = torch.zeros(3, columns, device=self._device)
        return self._moments[together]

    def columns(self, together: int) -> Tensor:
        """Where in `moments` each mini-batch's are, int64 [k*F], mini-batch by mini-batch."""
        if together not in self._columns:
            columns = self._layout.moment_columns(together).flatten()
            self._columns[together] = columns.to(self._device)
        return self._columns[together]

    def leave_moments(self, place: Tensor, together: int) -> None:
        """Copy the moments of the last pass to `place`, float32 [k, 3, F]."""
        moments = self.moments(together)
        if together == 1:
            place[0].copy_(moments)
        elif moments.numel():
            found = torch.index_select(moments, 1, self.columns(together))
            place.copy_(found.view(3, together, -1).transpose(0, 1))


class JoinTrial:
    """One pass over several mini-batches, or a pass over each: whichever is faster here.

    Small layers gain from a joint pass, whose kernels are larger. Large feature maps may lose: one
    mini-batch's stay in the processor's cache, several do not.
    """

    TRIES = 3
    """Of each way that count: those after the first ones, which find memory that was never touched
    and recordings that are not made yet."""
    ENOUGH_S = 1.0
    """Seconds of tries that count after which no more are made: long passes vary little."""

    def __init__(self) -> None:
        self.joined: bool | None = None
        """The faster way, once it is known."""
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def next(self) -> bool:
        """Whether the next mini-batches are to be computed in one pass."""
        if self.joined is not None:
            return self.joined
        return not self._enough(True)

    def _enough(self, joined: bool) -> bool:
        seconds = self._seconds[joined]
        return len(seconds) >= self.TRIES or sum(seconds) >= self.ENOUGH_S

    def add(self, joined: bool, seconds: float) -> None:
        """Take note of how long a try that counts took, in seconds of the thread."""
        if self.joined is not None:
            return
        self._seconds[joined].append(seconds)
        if self._enough(True) and self._enough(False):
            together, separately = (min(self._seconds[way]) for way in (True, False))
            self.joined = together <= separately


def some_rows(inputs: Tensor, together: int) -> int:
    """How many rows of `inputs`, [m*together, ...], to compare on processors: a multiple of k."""
    each = inputs[:1].numel() * together
    return together * max(FEW, MOST_VALUES // max(1, each))


def can_join(
    module: nn.Module,
    losses: Callable[[int, bool], Loss],
    inputs: Tensor,
    targets: Tensor,
    together: int,
    blocks: bool = False,
) -> bool:
    """Whether one pass over these mini-batches finds what a pass over each does.

    They are compared in float64, where rounding cannot be taken for a difference. Dropout is
    left out of it: it draws for each row by itself. What else draws may draw for a mini-batch:
    whether it skips a block, say, and BN with it.

    Args:
        module: is left as it is.
        losses: gives the loss of so many mini-batches together, interleaved or in blocks.
        inputs: float32 [m*together, ...], on the module's device; example i of mini-batch j is row
            i*together + j.
        targets: [m*together, ...], likewise.
        together: mini-batches.
        blocks: whether the pass takes them in blocks.
    """
    before, on_device = RandomState.now(), random_state(inputs.device)
    try:
        twin = detached_copy(module).double()
        for dropout in [m for m in twin.modules() if isinstance(m, _DropoutNd)]:
            dropout.eval()
        x, y = (in_blocks(t, together) if blocks else t for t in (inputs, targets))
        joined = _pass_in_double(twin, losses(together, blocks), x, y, together, blocks)
        separate = [
            _pass_in_double(twin, losses(1, False), inputs[j::together], targets[j::together], 1)
            for j in range(together)
        ]
    except Exception as error:  # whatever it is, the mini-batches are computed one by one
        log.warning("mini-batches are not joined: %s: %s", type(error).__name__, error)
        return False
    finally:
        drawn = not before.is_now()
        drawn = drawn or not same_random_state(on_device, random_state(inputs.device))
        before.restore()
        set_random_state(inputs.device, on_device)
    if drawn:
        log.warning("mini-batches are not joined: this model draws random numbers of its own")
        return False
    gradient = torch.stack([g for g, _ in separate]).sum(0)
    means = torch.stack([m for _, m in separate])
    if _close(joined[0], gradient) and _close(joined[1], means.flatten()):
        return True
    log.warning("mini-batches are not joined: this model mixes the rows of a mini-batch")
    return False


def _pass_in_double(
    module: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    together: int,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient by all trained parameters, and each mini-batch's means."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for layer in norms:
        layer.unbind(together, blocks)
    parameters = [p for p in module.parameters() if p.requires_grad]
    x = inputs.double() if inputs.is_floating_point() else inputs
    y = targets.double() if targets.is_floating_point() else targets
    found = gradients(loss(module(x), y), parameters)
    means = [layer.batch_mean.view(together, -1) for layer in norms]
    return (
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        ),
        torch.cat(means, 1).flatten() if means else torch.zeros(0),
    )


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors differ by rounding alone; not, if they are not finite."""
    return bool(torch.linalg.vector_norm(a - b) <= TOLERANCE * torch.linalg.vector_norm(b))
