"""A split whose shards lie on several nodes' own disks: what it is made of, and who has what.

The manifest, which one place has, says what the split is made of; each node is asked which of its
shards it has (`survey`); and each shard becomes the business of one of the nodes that have it
(`assign`). How nodes are asked and shufflers are started there is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.dataset.manifest import MANIFEST_NAME, ShardEntry, SplitEntry, read_manifest
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset, fingerprint_of
from downpour.shuffler.errors import DatasetError
from downpour.shuffler.images.decode import Decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """A split by its manifest, wherever its shards are."""

    split: str
    """Name of the split."""

    shards: tuple[ShardEntry, ...]
    """Its shards in the order of their rows."""

    class_names: tuple[str, ...] = field(repr=False)
    """Names of the labels 0, 1, ...; empty where the dataset names none."""

    fingerprint: str
    """As of the split opened in one place."""

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def row_bytes(self) -> float:
        """Mean bytes of a row on disk."""
        return sum(shard.num_bytes for shard in self.shards) / max(1, self.num_rows)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.num_rows for shard in self.shards)

    @classmethod
    def read(cls, uri: str | os.PathLike[str], split: str) -> Inventory:
        """Read what a split is made of; its shards need not be there.

        Raises:
            DatasetError: the folder has no manifest, or its manifest does not list the split.
        """
        where = os.fspath(uri)
        filesystem, folder = files.locate(uri)
        try:
            manifest = read_manifest(filesystem, folder)
        except OSError as error:
            raise DatasetError(
                f"{where} cannot be read ({files.one_line(error)}); check access to it"
            ) from error
        if manifest is None:
            raise DatasetError(
                f"{where} has no {MANIFEST_NAME}, which says what shards on several nodes make up; "
                "copy it there from where the dataset was made, or run ingest"
            )
        if split not in manifest.splits:
            known = ", ".join(sorted(manifest.splits)) or "none"
            raise DatasetError(
                f"the manifest of {where} lists no split {split!r} (it lists: {known}); choose one "
                "of those"
            )
        shards = manifest.splits[split].shards
        return cls(
            split=split,
            shards=shards,
            class_names=manifest.class_names,
            fingerprint=fingerprint_of(split, shards),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Those shards of a split that one shuffler reads, from a folder on its node."""

    uri: str
    """The folder."""

    split: str
    """Name of the split."""

    shards: tuple[ShardEntry, ...]
    """The shards, in the order of their rows."""

    firsts: tuple[int, ...]
    """The number, in the whole split, of each one's first row."""

    def open(self, columns: Columns = PLAIN) -> Dataset:
        """Open these shards as a dataset of their own, whose rows count from 0.

        Raises:
            DatasetError: a shard is missing, damaged, or not what the manifest says.
        """
        rows = sum(shard.num_rows for shard in self.shards)
        return Dataset.open_part(
            self.uri, self.split, SplitEntry(num_rows=rows, shards=self.shards), columns
        )


@dataclass(frozen=True, slots=True)
class Ranges:
    """Rows of a split that are in one reader's dataset: half-open ranges, one after the other."""

    starts: NDArray[np.int64]
    """First row of each range in the split, ascending."""

    stops: NDArray[np.int64]
    """Their ends."""

    mine: NDArray[np.int64]
    """The number of each range's first row in the reader's dataset."""

    @classmethod
    def of(cls, holding: Holding) -> Ranges:
        """Return the ranges of a holding: a shard each."""
        sizes = np.array([shard.num_rows for shard in holding.shards], dtype=np.int64)
        starts = np.array(holding.firsts, dtype=np.int64)
        return cls(starts, starts + sizes, np.cumsum(sizes) - sizes)

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which of `rows` lie in the ranges, as positions, and their own numbers."""
        at = np.maximum(np.searchsorted(self.starts, rows, side="right") - 1, 0)
        positions = np.flatnonzero((rows >= self.starts[at]) & (rows < self.stops[at]))
        at = at[positions]
        return positions, rows[positions] - self.starts[at] + self.mine[at]


def survey(uri: str, inventory: Inventory, decoder: Decoder, num_classes: int) -> tuple[str, ...]:
    """Return the names of those shards that a folder of this machine has, checked.

    The footers are compared with the manifest, and a row is decoded. A folder that does not exist
    has none.

    Raises:
        DatasetError: a shard is not what the manifest says.
        DecodeError: the row cannot be decoded.
    """
    filesystem, folder = files.locate(uri)
    infos = filesystem.get_file_info([f"{folder}/{shard.name}" for shard in inventory.shards])
    there = [info.type == fs.FileType.File for info in infos]
    held = tuple(shard for shard, is_there in zip(inventory.shards, there, strict=True) if is_there)
    if held:
        firsts = (0,) * len(held)
        dataset = Holding(uri=uri, split=inventory.split, shards=held, firsts=firsts).open(
            decoder.columns
        )
        reader = RowReader(dataset, num_classes=num_classes)
        try:
            first = np.zeros(1, np.int64)
            decoder.decode(reader.take(first), rows=first)
        finally:
            reader.close()
    return tuple(shard.name for shard in held)


def assign(
    inventory: Inventory, held: Mapping[str, Collection[str]], uris: Mapping[str, str]
) -> dict[str, Holding]:
    """Return what each node's shuffler reads: every shard is just one's.

    A shard that several nodes have is that one's which has the fewest rows so far.

    Args:
        inventory: the split.
        held: names of the shards that each node has, by node.
        uris: each node's folder.

    Raises:
        DatasetError: a shard is on none of the nodes; it names the shard.
    """
    chosen: dict[str, list[int]] = {node: [] for node in held}
    rows = dict.fromkeys(held, 0)
    owners = [[node for node in held if shard.name in held[node]] for shard in inventory.shards]
    _check_all_held(inventory.shards, owners, held, uris)
    # Shards without a choice first, so that the others can even out what those leave uneven.
    for number in sorted(range(len(owners)), key=lambda i: len(owners[i])):
        node = min(owners[number], key=rows.__getitem__)
        chosen[node].append(number)
        rows[node] += inventory.shards[number].num_rows
    firsts = np.cumsum((0, *inventory.shard_rows)).tolist()
    return {
        node: Holding(
            uri=uris[node],
            split=inventory.split,
            shards=tuple(inventory.shards[i] for i in sorted(numbers)),
            firsts=tuple(firsts[i] for i in sorted(numbers)),
        )
        for node, numbers in chosen.items()
        if numbers
    }


def _check_all_held(
    shards: Sequence[ShardEntry],
    owners: Sequence[Sequence[str]],
    held: Mapping[str, Collection[str]],
    uris: Mapping[str, str],
) -> None:
    nowhere = [shard.name for shard, nodes in zip(shards, owners, strict=True) if not nodes]
    if nowhere:
        more = f" and {len(nowhere) - 1} more" if len(nowhere) > 1 else ""
        folders = ", ".join(sorted({uris[node] for node in held})) or "no folder"
        raise DatasetError(
            f"shard {nowhere[0]}{more} of {len(shards)} is on none of {len(held)} nodes (looked in "
            f"{folders}); copy it to one of them, or bring back the node that has it"
        )
