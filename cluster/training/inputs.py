"""What a run needs before Ray starts: its data, opened and checked, and its network, built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.cluster.config.derive import make_decoder, make_plan, model_spec, window_that_fits
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import BEGAN_IN, DATA, RunFolder
from downpour.cluster.training.initial import read
from downpour.paramserver.partition.ranges import Partition, split
from downpour.shuffler.dataset.encoding import EncodedImages
from downpour.shuffler.dataset.labels import check_images, check_labels
from downpour.shuffler.dataset.numbers import check_numbers
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.holdings import Inventory
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.models.flat import FlatModel

CHECKED_BYTES = 4 << 20
"""A split to score of at most so many bytes is decoded whole before Ray starts: in tenths of a
second. In a larger one a bad image is found by the evaluator."""
CHECKED_ROWS = 64
"""Rows that are decoded at a time for that."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the data is."""

    plan: Plan
    fingerprint: str
    """Of the training split."""
    class_names: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty if the data names none."""
    notes: tuple[str, ...] = ()
    """What is to be told of the images that were looked at."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the network is."""

    weights: npt.NDArray[np.float32]
    """Initial weights, float32 [P]."""
    statistics: npt.NDArray[np.float64]
    """BN statistics that it comes with, float64 [4, F]: see `PartitionStart.statistics`."""
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

    def initial_statistics(self) -> Tensor:
        """Mean and variance that the BN statistics begin with, float32 [2, F]."""
        import torch

        return torch.from_numpy(self.statistics[:2]).float()

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
    """Open both splits, check all targets, decode a row of each, and lay out the plan.

    A small split to score is decoded whole, unless bad images are to be skipped. If training rows
    are on nodes' own disks, only their manifest is read; each node is asked later.

    Raises:
        DatasetError: a split cannot be read, or is damaged.
        DecodeError: an image cannot be decoded.
        PlanError: the data has too few rows for the run.
    """
    scorer = Decoder(
        spec=config.model.input,
        columns=config.model.columns,
        on_bad_image=config.data.on_bad_image,
    )
    scored, notes = _check_split(config, config.data.eval_split, scorer, whole_bytes=CHECKED_BYTES)
    train: Dataset | Inventory
    if config.data.node_folder is None:
        train, more = _check_split(config, config.data.train_split, make_decoder(config))
        notes += more
    else:
        train = Inventory.read(config.data.data, config.data.train_split)
    window = window_that_fits(config.data, train.row_bytes)
    if window < config.data.window_batches:
        notes += (
            f"rows take {train.row_bytes / 1e6:.1f} MB on the average, so windows have {window} "
            f"mini-batches, not {config.data.window_batches}",
        )
    return Data(
        plan=make_plan(config, train.num_rows, train.shard_rows, window),
        fingerprint=train.fingerprint,
        class_names=train.class_names or scored.class_names,
        notes=notes,
    )


def _check_split(
    config: RunConfig, split_name: str, decoder: Decoder, *, whole_bytes: int = 0
) -> tuple[Dataset, tuple[str, ...]]:
    """Open a split, and decode its first row, or all of it if it has at most `whole_bytes`."""
    dataset = open_split(config.data.data, split_name, config.model.columns)
    num_classes = config.model.num_classes
    check_labels(dataset, num_classes)
    check_numbers(dataset)
    if dataset.columns.kind == "mask":
        from downpour.shuffler.images.mask_survey import check_masks

        check_masks(
            dataset,
            config.model.pictures.reading,
            skip_bad=decoder.on_bad_image == "skip",
            several=split_name == config.data.train_split,
        )
    if decoder.on_bad_image == "stop":
        check_images(dataset)
    small = sum(shard.num_bytes for shard in dataset.shards) <= whole_bytes
    encoded = isinstance(dataset.encoding, EncodedImages)  # packed bits are never bad
    whole = small and encoded and decoder.on_bad_image == "stop"
    notes: list[str] = []
    with contextlib.closing(RowReader(dataset, num_classes=num_classes)) as reader:
        for start in range(0, dataset.num_rows if whole else 1, CHECKED_ROWS):
            stop = min(start + CHECKED_ROWS, dataset.num_rows) if whole else 1
            rows = np.arange(start, stop, dtype=np.int64)
            notes += decoder.decode(reader.take(rows), rows=rows).notes.values()
    more = f" ({len(notes) - 1} more of its images, too)" if len(notes) > 1 else ""
    return dataset, tuple(f"split {split_name!r}: {note}{more}" for note in notes[:1])


def build_model(config: RunConfig, initial: Path | None = None) -> Model:
    """Build the network of `config`. This is what imports PyTorch.

    Args:
        config: of the run.
        initial: a safetensors file with the initial weights, under PyTorch's names; None takes the
            file that the configuration names, or leaves them to the network itself.

    Raises:
        ModelError: the network cannot be built, or the weights are of another one.
    """
    model = model_spec(config).build_flat("cpu")
    if initial is not None:
        _load(model, initial)
    elif config.model.init is not None:
        _take(model, read(config.model, model).tensors, config.model.init)
    return Model(
        weights=model.weights.numpy(),
        statistics=model.initial.table(model.statistics).numpy(),
        num_features=model.layout.num_features,
        num_decayed=model.layout.decayed,
        num_frozen=model.layout.num_parameters - model.layout.trained,
        stops=tuple(entry.stop for entry in model.layout.entries),
        by_layer=config.server.by_layer,
    )


def _load(model: FlatModel, path: Path) -> None:
    """Give a network the weights in a file, and BN statistics if it has them."""
    import safetensors.torch

    _take(model, safetensors.torch.load_file(str(path)), path)


def _take(model: FlatModel, found: Mapping[str, Tensor], path: Path | str) -> None:
    from downpour.models.errors import LayoutError
    from downpour.models.layout import state_dict

    parameters = {entry.name for entry in model.layout.entries}
    for name, into in state_dict(model.weights, model.statistics, model.layout).items():
        if name in found and found[name].shape == into.shape:
            into.copy_(found[name])
        elif name in found or name in parameters:
            has = f"as {list(found[name].shape)}" if name in found else "not"
            raise LayoutError(f"{path} has '{name}' {has}: the network is another one")


def check_data_unchanged(folder: RunFolder, found: Data) -> None:
    """Check that the rows are those that the run began with: else mini-batches would differ.

    Raises:
        UserError: they are not.
    """
    if not (folder.path / DATA).exists():
        about = {
            "train_fingerprint": found.fingerprint,
            "class_names": list(found.class_names),
            BEGAN_IN: str(Path.cwd()),
        }
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

    dataset = open_split(config.data.data, config.data.train_split, config.model.columns)
    reader = RowReader(dataset, num_classes=config.model.num_classes)
    decoder = make_decoder(config)

    def load(epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        rows = plan.rows(epoch, batch)
        decoded = decoder.decode(reader.take(rows), epoch=epoch, rows=rows)
        return torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)

    return load
