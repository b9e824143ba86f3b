"""A device's step as one piece: its kernels captured once, and given to the device in one call.

A step of a conv net is a thousand kernels, and to give them to a GPU one by one takes longer than
many of them run. A graph is bound to the memory that it was captured on. So a captured step has
buffers of its own, and weights and mini-batch are copied into them before, gradient and moments
out after: at the speed of the device's memory that is nothing beside the step. All model copies of
a process share it.

A graph repeats kernels, and nothing that Python decides. `recording` finds out beforehand what
cannot be repeated, and the caller compares the graph with the step as the run goes. Kernels that
add up in no fixed order do not find the same bits twice, so `alike` allows for rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from downpour.models.layout import Layout
from downpour.workers.spec import Precision
from downpour.workers.step.device import Device
from downpour.workers.step.model_copy import Mailbox

TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest difference between two ways of computing a step, relative to what is computed."""

Outcome = tuple[Tensor, Tensor, Tensor]
"""Loss and, if it is there, square of the gradient's norm, [1] or [2]; gradient [T]; moments
[k, 3, F]: all on one device."""


class Found:
    """Where a step leaves what it finds, on the device."""

    def __init__(self, layout: Layout, depth: int, device: torch.device) -> None:
        """Room for up to `depth` mini-batches together."""
        self.box = Mailbox(
            -1,
            layout,
            torch.empty(layout.num_parameters, device=device),
            torch.empty(depth, 3, layout.num_features, device=device),
        )
        self.tail = torch.empty(2, device=device)
        """Loss, and square of the gradient's norm."""

    def take(self, other: Found) -> None:
        """Copy what another has found."""
        self.box.gradient.copy_(other.box.gradient)
        self.box.moments.copy_(other.box.moments)
        self.tail.copy_(other.tail)

    def outcome(self, together: int) -> Outcome:
        """A copy of all that a step of so many mini-batches has left."""
        box = self.box
        return self.tail.clone(), box.gradient.clone(), box.moments[:together].clone()


class CapturedStep:
    """A step on mini-batches of one shape."""

    def __init__(
        self,
        layout: Layout,
        inputs: Tensor,
        targets: Tensor,
        depth: int,
    ) -> None:
        """Make its buffers, with a mini-batch like the given one, which lies on the device."""
        self.weights = torch.zeros(layout.num_parameters, device=inputs.device)
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.found = Found(layout, depth, inputs.device)
        self._replay: Callable[[], object] = _refuse

    def capture(self, device: Device, work: Callable[[], object]) -> None:
        """Capture `work`, which computes on these buffers, and keep whatever it refers to.

        Raises:
            RuntimeError: it cannot be captured.
        """
        graph = device.capture(work)

        def replay(kept: object = work) -> None:
            graph.replay()

        self._replay = replay

    def release(self) -> None:
        """Let the graph and its memory go."""
        self._replay = _refuse

    def run(self, weights: Tensor, inputs: Tensor, targets: Tensor, found: Found) -> None:
        """One step, as part of the work of the compute stream.

        Args:
            weights: float32 [P].
            inputs: of the shape that was captured.
            targets: likewise.
            found: where it leaves what it finds.
        """
        self.weights.copy_(weights)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self._replay()
        found.take(self.found)


def _refuse() -> None:
    raise AssertionError("capture comes before run")


def alike(expected: Outcome, found: Outcome, precision: Precision) -> bool:
    """Whether two ways of computing a step agree but for rounding."""
    tolerance = TOLERANCE[precision]
    counts, means, variances = expected[2].unbind(1)
    spread = (means.square() + variances).sqrt()
    pairs = zip(found[2].unbind(1), (counts, spread, variances), strict=True)
    moments = zip((counts, means, variances), pairs, strict=True)
    return (
        _close(expected[0][0], found[0][0], tolerance)
        and _close(expected[1], found[1], tolerance)
        and all(_close(a, b, tolerance, beside) for a, (b, beside) in moments)
    )


def _close(a: Tensor, b: Tensor, tolerance: float, beside: Tensor | None = None) -> bool:
    """Whether they differ by little, measured by the length of `a` or of `beside`."""
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    measure = a if beside is None else beside
    finite = torch.where(measure.isfinite(), measure, 0.0)
    norms = torch.linalg.vector_norm(difference), torch.linalg.vector_norm(finite)
    return bool(norms[0] <= tolerance * norms[1])
