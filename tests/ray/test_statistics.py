"""The server's BN statistics after real training, against Algorithm 2; and folding them in."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from downpour.cluster.config.derive import make_plan, model_spec
from downpour.cluster.run.folder import RunFolder
from downpour.models.flat import FlatModel
from downpour.models.fold import fold
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.workers.evaluation.evaluator import Evaluator, population_statistics
from downpour.workers.evaluation.split import SplitBatches

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

MEAN_TOLERANCE = 0.1
"""Largest difference of a mean, in standard deviations of its feature."""
VARIANCE_TOLERANCE = 0.15
"""Largest relative difference of a variance."""


@pytest.fixture(scope="module")
def folder(trained: Path) -> RunFolder:
    return RunFolder.open(trained)


@pytest.fixture(scope="module")
def evaluator(folder: RunFolder) -> Evaluator:
    config = folder.config()
    spec = model_spec(config)
    found = Evaluator(spec, SplitBatches(spec, config.data.data, config.data.eval_split))
    found.load(str(folder.path / "model.safetensors"))
    return found


def training_batches(folder: RunFolder) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's mini-batches, by the plan."""
    config = folder.config()
    dataset = Dataset.open(config.data.data, config.data.train_split)
    reader, plan = RowReader(dataset), make_plan(config, dataset.num_rows)
    for window in plan.window_order(0).tolist():
        rows, lengths = plan.rows_of(0, plan.window_batches_order(0, window))
        inputs, labels = decode(reader.take(rows), config.model.input)
        ends = np.cumsum(lengths)
        for start, stop in zip(ends - lengths, ends, strict=True):
            yield torch.from_numpy(inputs[start:stop]), torch.from_numpy(labels[start:stop])


def test_the_server_kept_what_algorithm_2_recomputes(
    folder: RunFolder, evaluator: Evaluator
) -> None:
    model = FlatModel(model_spec(folder.config()).build())
    model.bind(evaluator.weights)
    recomputed = population_statistics(model, training_batches(folder))
    kept = evaluator.statistics
    mean_gap = (kept[0] - recomputed[0]).abs() / recomputed[1].sqrt()
    variance_gap = (kept[1] / recomputed[1] - 1).abs()
    assert mean_gap.max() < MEAN_TOLERANCE
    assert variance_gap.max() < VARIANCE_TOLERANCE
    assert mean_gap.max() > 0  # two ways of computing it, not one

    before = evaluator.score()
    evaluator.statistics.copy_(recomputed)
    after = evaluator.score()
    evaluator.statistics.copy_(kept)
    assert abs(before.accuracy - after.accuracy) < 0.005


def test_folding_the_statistics_in_changes_nothing_but_rounding(
    folder: RunFolder, evaluator: Evaluator
) -> None:
    config = folder.config()
    folded = fold(evaluator._model.module)
    assert not any("Norm" in type(m).__name__ for m in folded.modules())
    batches = SplitBatches(model_spec(config), config.data.data, config.data.eval_split)
    with torch.inference_mode():
        for inputs, _ in batches():
            torch.testing.assert_close(
                folded(inputs), evaluator._model.module(inputs), rtol=1e-4, atol=1e-4
            )
