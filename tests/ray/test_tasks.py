"""Tasks beside classification through a `Trainer` on a real Ray, beside a plain PyTorch loop."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import downpour
from downpour.cluster.config.derive import make_plan
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.training.inputs import make_decoder
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.workers.evaluation.metrics import metrics_of
from tests.helpers import mask_pictures, tables
from tests.helpers.ray_nodes import RayNodes

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]


def rows_of(config: RunConfig, split: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a split, as they are."""
    dataset = open_split(config.data.data, split, config.model.columns)
    numbers = np.arange(dataset.num_rows)
    decoded = make_decoder(config).decode(RowReader(dataset).take(numbers), rows=numbers)
    return torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)


def by_a_plain_loop(config: RunConfig) -> dict[str, float]:
    """What PyTorch reaches after the same mini-batches, and its BN statistics after as many."""
    plan = make_plan(config, rows_of(config, "train")[0].shape[0])
    _, module = tables.plain_loop(config, plan)
    inputs, targets = rows_of(config, config.data.eval_split)
    metrics = metrics_of(config.model.the_task.name)
    assert metrics is not None
    with torch.no_grad():
        metrics.add(module(inputs), targets)
    return metrics.compute()


class Trained(NamedTuple):
    """What there is of a run at its end."""

    config: RunConfig
    metrics: dict[str, Any]


def trained(ray: RayNodes, folder: Path, model: type[nn.Module], **given: Any) -> Trained:
    """A run to its end, with every row applied once an epoch."""
    settings = {
        "model": f"{model.__module__}:{model.__name__}",
        "runs": folder,
        "name": "run",
        "address": ray.address,
        "progress": False,
        "weight_decay": 0.0,
        **given,
    }
    # In a process of its own: Ray keeps a process's first token, which was another Ray's here.
    with get_context("spawn").Pool(1) as process:  # which is ended, whatever it does
        path, metrics, exactly_once = process.apply_async(fitted, (settings,)).get(timeout=400)
    assert exactly_once
    return Trained(RunFolder.open(path).config(), metrics)


def fitted(settings: dict[str, Any]) -> tuple[Path, dict[str, Any], bool]:
    """Where a run is, its figures, and whether every row was applied once."""
    result = downpour.Trainer(**settings).fit()
    return result.path, dict(result.metrics), result.exactly_once


def test_a_table_is_learnt_as_by_a_plain_loop(ray_here: RayNodes, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tables.write(data, "train", tables.table(2000, 1))
    tables.write(data, "test", tables.table(400, 2), shards=1)
    result = trained(
        ray_here,
        tmp_path,
        tables.Net,
        data=str(data),
        target_column="y",
        input_columns=("a", "b", "k", "pair"),
        epochs=12,
        learning_rate=0.02,
        # One step at a time is PyTorch's SGD. With several the same network's R² was once 0.015
        # apart, as it may be between two orders of the mini-batches.
        replicas=1,
        concurrent_steps=1,
        queued_windows=1,
    )
    expected = by_a_plain_loop(result.config)
    assert expected["r2"] > 0.95
    assert result.metrics["best_r2"] == pytest.approx(expected["r2"], abs=0.01)


def test_masks_are_learnt_as_by_a_plain_loop(ray_here: RayNodes, tmp_path: Path) -> None:
    data = mask_pictures.dataset(tmp_path / "data", rows=960, shards=2)
    result = trained(
        ray_here,
        tmp_path,
        mask_pictures.MaskNet,
        data=data,
        epochs=8,
        learning_rate=0.02,
        replicas=2,
        concurrent_steps=2,
    )
    assert result.config.model.task == "segmentation"
    expected = by_a_plain_loop(result.config)
    assert expected["miou"] > 0.9
    assert result.metrics["best_miou"] > expected["miou"] - 0.02, "as far, in another order"
