"""What a run needs before Ray starts: its data, opened and checked, and its network, built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.cluster.config.derive import make_decoder, make_plan, model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import DATA, RunFolder
from downpour.paramserver.partition.ranges import Partition, split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.holdings import Inventory
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the data is."""

    plan: Plan
    fingerprint: str
    """Of the training split."""
    class_names: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty if the data names none."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the network is."""

    weights: npt.NDArray[np.float32]
    """Initial weights, float32 [P]."""
    num_features: int
    """Normalised features."""
    num_decayed: int
    """Parameters that weight decay applies to; they come first."""
    num_frozen: int = 0
    """Parameters that never change; they come last."""
    stops: tuple[int, ...] = ()
    """Where each of its tensors ends."""
    by_layer: bool = False
    """Whether the update rule needs whole layers."""

    @property
    def num_parameters(self) -> int:
        """P, its parameters."""
        return self.weights.size

    def cut(self, num_partitions: int) -> tuple[Partition, ...]:
        """Its parameters and features over so many partitions.

        Raises:
            BadConfiguration: the network is too small for as many.
        """
        return split(
            num_parameters=self.num_parameters,
            num_features=self.num_features,
            num_decayed=self.num_decayed,
            num_partitions=num_partitions,
            num_frozen=self.num_frozen,
            stops=self.stops if self.by_layer else (),
        )


def check_data(config: RunConfig) -> Data:
    """Open both splits, decode a row of each, and lay out the plan.

    If training rows are on nodes' own disks, only their manifest is read; each node is asked later.

    Raises:
        DatasetError: a split cannot be read, or is damaged.
        PlanError: the data has too few rows for the run.
    """
    _check_split(config, config.data.eval_split, Decoder(spec=config.model.input))
    train: Dataset | Inventory
    if config.data.node_folder is None:
        train = _check_split(config, config.data.train_split, make_decoder(config))
    else:
        train = Inventory.read(config.data.data, config.data.train_split)
    return Data(
        plan=make_plan(config, train.num_rows, train.shard_rows),
        fingerprint=train.fingerprint,
        class_names=train.class_names,
    )


def _check_split(config: RunConfig, split_name: str, decoder: Decoder) -> Dataset:
    dataset = Dataset.open(config.data.data, split_name)
    num_classes = config.model.num_classes
    with contextlib.closing(RowReader(dataset, num_classes=num_classes)) as reader:
        first = np.zeros(1, np.int64)
        decoder.decode(reader.take(first), rows=first)
    return dataset


def build_model(config: RunConfig) -> Model:
    """Build the network of `config`. This is what imports PyTorch."""
    model = model_spec(config).build_flat("cpu")
    return Model(
        weights=model.weights.numpy(),
        num_features=model.layout.num_features,
        num_decayed=model.layout.decayed,
        stops=tuple(entry.stop for entry in model.layout.entries),
        by_layer=config.server.by_layer,
    )


def check_data_unchanged(folder: RunFolder, found: Data) -> None:
    """Check that the rows are those that the run began with: else mini-batches would differ.

    Raises:
        UserError: they are not.
    """
    if not (folder.path / DATA).exists():
        about = {"train_fingerprint": found.fingerprint, "class_names": list(found.class_names)}
        folder.write_json(DATA, about)
    elif folder.read_json(DATA)["train_fingerprint"] != found.fingerprint:
        data = folder.config().data
        raise UserError(
            f"split {data.train_split!r} of {data.data} has changed since {folder.path} began: "
            "put the dataset back, or train a new run"
        )


def loader(config: RunConfig, plan: Plan) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A function that gives the inputs and targets of mini-batch (epoch, batch), as replicas get
    them.
    """
    import torch

    dataset = Dataset.open(config.data.data, config.data.train_split)
    reader = RowReader(dataset, num_classes=config.model.num_classes)
    decoder = make_decoder(config)

    def load(epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        rows = plan.rows(epoch, batch)
        decoded = decoder.decode(reader.take(rows), epoch=epoch, rows=rows)
        return torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)

    return load
