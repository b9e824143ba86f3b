"""The figures of tasks against torchmetrics, on the same mini-batches.

It is not imported by the product, and here in a soak, since importing it takes longer than all that
is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from downpour.models.lookup import import_named
from downpour.workers.evaluation.metrics import metrics_of

pytestmark = pytest.mark.soak

ROWS, CLASSES = 300, 5
SPLITS = ([300], [1, 299], [32] * 9 + [12])
"""Mini-batches of several sizes."""


@pytest.fixture(scope="module")
def torchmetrics() -> ModuleType:
    try:
        return import_named("torchmetrics")  # which imports torchvision
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}: pip install torchmetrics (the extra dev has it)")


def compare(
    task: str,
    answer: Tensor,
    targets: Tensor,
    oracles: dict[str, Any],
    shown: Callable[[Tensor], Tensor] = lambda answer: answer,
) -> None:
    """Gather the figures and the oracles over all of `SPLITS`."""
    for sizes in SPLITS:
        metrics = metrics_of(task)
        assert metrics is not None
        for oracle in oracles.values():
            oracle.reset()
        for a, t in zip(answer.split(sizes), targets.split(sizes), strict=True):  # type: ignore[no-untyped-call]
            metrics.add(a, t)
            for oracle in oracles.values():
                oracle.update(shown(a), t)
        expected = {name: float(oracle.compute()) for name, oracle in oracles.items()}
        assert metrics.compute() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_regression(torchmetrics: ModuleType, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(ROWS, width, generator=generator) * 3 + 2
    answer = targets + torch.randn(ROWS, width, generator=generator)
    regression = torchmetrics.regression
    oracles = {
        "r2": regression.R2Score(multioutput="uniform_average"),
        "rmse": regression.MeanSquaredError(squared=False),
        "mae": regression.MeanAbsoluteError(),
    }
    one, flat = width == 1, lambda values: values[:, 0]
    targets_seen = targets[:, 0] if one else targets
    compare("regression", flat(answer) if one else answer, targets_seen, oracles)


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_a_row(torchmetrics: ModuleType, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(ROWS, CLASSES, generator=generator) < 0.4).long()
    answer = torch.randn(ROWS, CLASSES, generator=generator) + 2 * targets - 1
    kinds = torchmetrics.classification
    oracles = {
        "f1": kinds.MultilabelF1Score(CLASSES, average="micro"),
        "macro_f1": kinds.MultilabelF1Score(CLASSES, average="macro"),
        "exact": kinds.MultilabelExactMatch(CLASSES),
    }
    compare("multilabel", answer, targets, oracles, torch.sigmoid)


@pytest.mark.parametrize("seed", range(3))
def test_masks(torchmetrics: ModuleType, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, CLASSES, (ROWS, 6, 7), generator=generator)
    answer = torch.randn(ROWS, CLASSES, 6, 7, generator=generator)
    answer += 2 * torch.nn.functional.one_hot(masks, CLASSES).permute(0, 3, 1, 2)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    kinds = torchmetrics.classification
    oracles = {
        "miou": kinds.MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255),
        "pixel_accuracy": kinds.MulticlassAccuracy(CLASSES, average="micro", ignore_index=255),
    }
    compare("segmentation", answer, masks, oracles)
