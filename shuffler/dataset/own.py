"""A dataset of the user's own as a split: rows by number, through its `__getitem__`.

`data` is `dataset:module:function`: a function of a split's name that returns an object with
`__len__` and `__getitem__`, such as a `torch.utils.data.Dataset`, whose items are an input and a
target. The plan says which rows a mini-batch has, and just these are asked for. PyTorch is not
imported here: whatever NumPy makes an array of will do. Not here: files (`records`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from downpour.shuffler.dataset.columns import (
    INPUT,
    LABEL,
    MOST_EXACT,
    TARGET,
    Columns,
    NumberType,
    as_bytes,
)
from downpour.shuffler.dataset.encoding import PLAIN, Numbers
from downpour.shuffler.dataset.names import OWN_DATA
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError

GROUP_ROWS: Final = 256
"""Rows that are drawn together for a sample of the split."""


@dataclass(frozen=True, slots=True)
class OwnDataset(Dataset):
    """A split whose rows are items of a dataset of the user's own."""

    items: Any = field(default=(), repr=False, compare=False)
    """The dataset."""

    lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held while items are asked for: their code may not bear several threads."""

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self.items)

    @property
    def row_bytes(self) -> float:
        """Bytes of a row."""
        return float(self.columns.input_bytes + self.columns.target_bytes)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard: there is one."""
        return (self.num_rows,)

    def describe_row(self, row: int) -> str:
        """Return words for messages: the row, and where it is."""
        return f"row {row} of split {self.split!r} of {self.uri}"

    def row_group_starts(self) -> NDArray[np.int64]:
        """Return the first row of each group of rows, and the end: int64 [groups + 1]."""
        return np.append(np.arange(0, self.num_rows, GROUP_ROWS), self.num_rows).astype(np.int64)

    def share(self, index: int, count: int) -> tuple[int, int]:
        """Return the rows [start, stop) that are reader `index`'s of `count` readers."""
        return self.num_rows * index // count, self.num_rows * (index + 1) // count

    def take(self, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Ask for items, and return them as rows of `schema`.

        Args:
            rows: int64 [n], row numbers in [0, num_rows).

        Raises:
            DatasetError: an item cannot be had, or is unlike the first; it names the row.
        """
        columns = self.columns
        inputs = np.empty((len(rows), *columns.input_shape), columns.input_type)
        targets = np.empty((len(rows), *columns.target_shape), columns.target_type)
        with self.lock:
            for place, row in enumerate(rows.tolist()):
                value, target = item(self, row)
                _put(value, inputs[place : place + 1], "input", self, row)
                _put(target, targets[place : place + 1], "target", self, row)
        of_label = columns.kind == LABEL
        packed = pa.array(targets[:, 0], pa.int64()) if of_label else as_bytes(targets)
        return pa.RecordBatch.from_arrays([as_bytes(inputs), packed], schema=self.schema)


def _put(value: NDArray[Any], into: NDArray[Any], what: str, dataset: OwnDataset, row: int) -> None:
    """Put an input or a target into its place, if it is like the others."""
    if value.shape != into.shape[1:] and (value.ndim, into.shape[1:]) != (0, (1,)):
        raise DatasetError(
            f"{dataset.describe_row(row)} has an {what} of {list(value.shape)}, and the first has "
            f"{list(into.shape[1:])}: make all items alike"
        )
    if value.dtype != into.dtype and into.dtype == np.int64:
        raise DatasetError(
            f"{dataset.describe_row(row)} has an {what} with fractions, and the first has whole "
            "numbers: make all items alike"
        )
    if value.dtype == np.int64 != into.dtype and (np.abs(value) > MOST_EXACT).any():
        raise DatasetError(
            f"{dataset.describe_row(row)} has an {what} that float32 does not hold: scale it"
        )
    into[0] = value


def is_own(uri: object) -> bool:
    """Whether data is a dataset of the user's own."""
    return str(uri).startswith(OWN_DATA)


def open_own(uri: str, split: str, columns: Columns | None = None) -> OwnDataset:
    """Call the user's function for a split.

    Args:
        uri: `dataset:module:function`.
        split: its argument.
        columns: what items are; None looks at the first.

    Raises:
        DatasetError: there is no such function, or it gives no dataset that can be used.
    """
    items = _called(uri, split)
    try:
        count = len(items)
    except Exception as error:
        raise DatasetError(
            f"{uri} gives {type(items).__name__} for split {split!r}, whose length cannot be had "
            f"({_short(error)}): return an object with __len__ and __getitem__"
        ) from error
    if not count:
        raise DatasetError(f"split {split!r} of {uri} has zero rows: return some")
    digest = hashlib.sha256(f"{uri} {split} {count}".encode()).hexdigest()[:32]
    names = getattr(items, "classes", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        names = ()
    found = OwnDataset(
        uri=uri,
        split=split,
        filesystem=fs.LocalFileSystem(),
        shards=(),
        encoding=Numbers(4),
        class_names=tuple(names),
        fingerprint=digest,
        items=items,
    )
    columns = columns or columns_of(found)
    return dataclasses.replace(found, columns=columns, encoding=Numbers(columns.input_bytes))


def open_split(uri: str | os.PathLike[str], split: str, columns: Columns = PLAIN) -> Dataset:
    """Open a split, of Parquet files or of a dataset of the user's own.

    Args:
        uri: a folder or URI, or `dataset:module:function`.
        split: its name.
        columns: which are the input and the target.

    Raises:
        DatasetError: see `Dataset.open` and `open_own`.
    """
    if is_own(uri):
        return open_own(str(uri), split, None if columns == PLAIN else columns)
    return Dataset.open(uri, split, columns)


def columns_of(dataset: OwnDataset) -> Columns:
    """Return what the items of a dataset are, by the first.

    Raises:
        DatasetError: it cannot be had, or is no input and target of numbers.
    """
    value, target = item(dataset, 0)
    of_label = target.dtype == np.int64 and target.ndim == 0
    return Columns(
        inputs=(INPUT,),
        input_widths=(value.size,),
        input_shape=value.shape,
        input_type=_type_of(value),
        targets=(LABEL if of_label else TARGET,),
        target_widths=(target.size,),
        target_shape=target.shape or (1,),
        target_type=_type_of(target),
        kind=LABEL if of_label else "numbers",
    )


def item(dataset: OwnDataset, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an item's input and target.

    Raises:
        DatasetError: it cannot be had, or is no pair of numbers.
    """
    where = dataset.describe_row(row)
    try:
        found = dataset.items[row]
    except Exception as error:
        raise DatasetError(f"{where} cannot be had: {_short(error)}") from error
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise DatasetError(
            f"{where} is {type(found).__name__}: return an input and a target, as a pair"
        )
    return _array(found[0], f"{where}: its input"), _array(found[1], f"{where}: its target")


def _array(value: object, what: str) -> NDArray[Any]:
    """Return a value as float32, or as int64 if it is of whole numbers of more than 8 bits."""
    try:
        found = np.asarray(value)
    except Exception as error:
        raise DatasetError(f"{what} is no array: {_short(error)}") from error
    kind = found.dtype.kind
    if kind in "iu" and (found.dtype.itemsize > 1 or found.ndim == 0):
        return found.astype(np.int64)
    if kind not in "fiub":
        raise DatasetError(
            f"{what} is {type(value).__name__} of {found.dtype}: return numbers, as a tensor, an "
            "array or a number"
        )
    numbers = found.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DatasetError(f"{what} has a value that is not finite: repair it")
    return numbers


def _type_of(value: NDArray[Any]) -> NumberType:
    return "int64" if value.dtype == np.int64 else "float32"


def _called(uri: str, split: str) -> Any:
    """What the user's function gives for a split."""
    name = uri.removeprefix(OWN_DATA)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise DatasetError(
            f"{uri} cannot be imported ({_short(error)}): name a function as "
            f"{OWN_DATA}module:function"
        ) from error
    try:
        return function(split)
    except Exception as error:
        raise DatasetError(f"{name}({split!r}) failed: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
