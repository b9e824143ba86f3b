"""A small table of numbers, a network with batch normalization, and a plain loop over both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.training.inputs import loader
from downpour.models.outputs import LOSSES
from downpour.shuffler.plan.plan import Plan
from tests.helpers import tiny

INPUTS, ROWS = 5, 400


class Net(nn.Sequential):
    """PyTorch's own layers, with batch normalization."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(
            nn.Linear(num_inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_outputs)
        )


def table(num_rows: int, seed: int) -> pa.Table:
    """Float64, float32 and whole numbers, and a list; `y` is a smooth function of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, INPUTS))
    x[:, 2] = rng.integers(-3, 4, num_rows)
    y = x @ np.array([1.0, -2.0, 0.5, 0.0, 1.5]) + np.sin(2 * x[:, 0]) + 5
    pair = pa.FixedSizeListArray.from_arrays(pa.array(x[:, 3:].reshape(-1)), 2)
    return pa.table(
        {
            "a": x[:, 0],
            "b": pa.array(x[:, 1], pa.float32()),
            "k": pa.array(x[:, 2].astype(np.int64)),
            "pair": pair,
            "y": y,
            "z": pa.array((y > 5).astype(np.int64)),
            "tags": pa.array([np.flatnonzero(row[:3] > 0) for row in x], pa.list_(pa.int64())),
        }
    )


def write(folder: Path, split: str, rows: pa.Table, shards: int = 2) -> str:
    """A split of some shards, in row groups of 64."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.linspace(0, len(rows), shards + 1).astype(int)
    for i in range(shards):
        part = rows.slice(cuts[i], cuts[i + 1] - cuts[i])
        pq.write_table(part, folder / f"{split}-{i:05d}-of-{shards:05d}.parquet", row_group_size=64)
    return str(folder)


def dataset(folder: Path) -> str:
    """A training and a test split."""
    write(folder, "train", table(ROWS, 1))
    return write(folder, "test", table(100, 2), shards=1)


def config(data: str, *, epochs: int = 3, **given: object) -> RunConfig:
    """One replica with one step and one window at a time, which is what PyTorch's SGD computes.

    Of two windows at a time, the second may arrive first.
    """
    base = tiny.config(
        data,
        model="tests.helpers.tables:Net",
        replicas=1,
        concurrent_steps=1,
        epochs=epochs,
        partitions=2,
        learning_rate=0.02,
        **given,  # type: ignore[arg-type]
    )
    model = dataclasses.replace(base.model, arguments={}, num_classes=2)
    replicas = dataclasses.replace(base.replicas, queued_windows=1)
    return dataclasses.replace(base, model=model, replicas=replicas)


def plain_loop(config: RunConfig, plan: Plan) -> tuple[dict[str, Tensor], nn.Module]:
    """What PyTorch's SGD makes of the same initial weights and mini-batches, in their order."""
    module = model_spec(config).build()
    schedule = config.server.schedule
    rate, examples = schedule.over(config.policy.epochs).rates(plan.num_rows), 0
    optimizer = torch.optim.SGD(
        module.parameters(), lr=schedule.learning_rate, momentum=config.server.momentum
    )
    load, loss = loader(config, plan), LOSSES[config.model.loss]
    module.train()
    for epoch in range(config.policy.epochs):
        for place in range(plan.num_batches):
            turn, offset = plan.locate(epoch, place)
            window = int(plan.window_at(epoch, turn))
            index = int(plan.window_batches_order(epoch, window)[offset])
            inputs, targets = load(epoch, index)
            optimizer.param_groups[0]["lr"] = rate(examples)
            examples += len(inputs)
            optimizer.zero_grad()
            loss(module(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, module.eval()
