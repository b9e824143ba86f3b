"""A step of a user's model is recorded, unless it may decide by what a recording does not see."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from downpour.models.flat import FlatModel
from downpour.workers.step.model_copy import ModelCopy, StepContext
from tests.helpers.networks import batches, mailboxes

RARELY = 1e-300


class Decides(nn.Linear):
    """Would do something else so rarely that no comparison finds it."""

    def __init__(self, draw: Callable[["Decides"], float]) -> None:
        super().__init__(6, 3)
        self.draw = draw
        self.passes, self.seen = 0, [0.0]
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if self.draw(self) < RARELY else y


def count(module: Decides) -> float:
    module.passes += 1
    return float(module.passes)


def remember(module: Decides) -> float:
    module.seen.append(1.0)
    return 1.0


DRAWS: dict[str, tuple[Callable[[Decides], float], str]] = {
    "python": (lambda _: random.random(), "it draws from Python's generator"),
    "numpy": (lambda _: np.random.rand(), "it draws from NumPy's generator"),  # noqa: NPY002
    "own": (lambda module: module.python.random(), "'python' of the network changes"),
    "own numpy": (lambda module: module.numpy.random(), "'numpy' of the network changes"),
    "counter": (count, "'passes' of the network changes"),
    "list": (remember, "'seen' of the network changes"),
}


def steps(module: nn.Module, *, watched: bool) -> StepContext:
    """Four steps of it."""
    flat = FlatModel(module)
    initial = flat.weights.clone()
    context = StepContext(flat.layout, recorded=True, watched=watched)
    copy = ModelCopy(flat, context)
    copy.weights[:] = initial.numpy()
    for x, y in batches("mnist", (4,) * 4):
        copy.step(x, y, mailboxes(flat.layout, 1)[0], 0)
    return context


@pytest.mark.parametrize("name", DRAWS)
def test_what_may_decide_outside_of_pytorch_is_not_recorded_if_it_is_watched(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw, why = DRAWS[name]
    with caplog.at_level("INFO"):
        assert set(steps(Decides(draw), watched=True).recordings.values()) == {None}
    assert why in caplog.text
    assert None not in steps(Decides(draw), watched=False).recordings.values()


def test_looking_draws_no_random_numbers() -> None:
    random.seed(3)
    expected = random.Random(3)
    steps(Decides(DRAWS["python"][0]), watched=True)
    for _ in range(4):
        expected.random()
    assert random.random() == expected.random()


@pytest.mark.parametrize("dropout", [False, True])
def test_what_keeps_to_pytorch_is_recorded(dropout: bool) -> None:
    layers = [nn.Linear(6, 3), *([nn.Dropout(0.5)] if dropout else [])]
    torch.manual_seed(0)
    (recording,) = steps(nn.Sequential(*layers), watched=True).recordings.values()
    assert recording is not None
