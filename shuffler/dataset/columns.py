"""Which columns of a table become inputs and targets, and how their numbers are packed.

The numbers of a row, of all of its input columns, are packed into one value of bytes: float32 in
the order of the columns. So a row of a table travels as a row of pictures does, as two columns,
`input` and `target` (or `label`, where the target is a class). Not here: files (`records`), and the
arrays that a network takes (`images.decode`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.image_columns import (
    IMAGE_TYPE,
    check_image_column,
    pack_masks,
    whole,
)
from downpour.shuffler.errors import BadValueError, DatasetError

LABEL: Final = "label"
INPUT: Final = "input"
TARGET: Final = "target"
MOST_EXACT: Final = 1 << 24
"""Integers up to this are exact in float32."""

TargetKind = Literal["label", "numbers", "indices", "mask"]
NumberType = Literal["float32", "int64"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns are the input and the target of a row, and how wide they are."""

    inputs: tuple[str, ...] = ()
    """Columns of numbers that make up an input; none if the input is a picture."""

    input_widths: tuple[int, ...] = ()
    """Numbers that each of them has in a row: 1, or the length of its lists."""

    targets: tuple[str, ...] = (LABEL,)
    """Columns that make up a target."""

    target_widths: tuple[int, ...] = (1,)
    """Numbers that each of them has in a row; of `indices` and `mask`, the number of classes."""

    kind: TargetKind = "label"
    """`label`: a class. `numbers`: float32, as they are. `indices`: the classes that a row is of,
    as a list of their numbers, which becomes 0 and 1 for each class. `mask`: an image file that has
    a class in each pixel."""

    input_shape: tuple[int, ...] = ()
    """Shape of one input of a dataset of the user's own; of a table it is a vector."""

    input_type: NumberType = "float32"
    """What the numbers of an input are."""

    target_shape: tuple[int, ...] = ()
    """Shape of one target of a dataset of the user's own, or of a mask as the network is given it;
    of a table it is a vector."""

    target_type: NumberType = "float32"
    """What the numbers of a target are."""

    @property
    def input_bytes(self) -> int:
        """Bytes of an input."""
        return self.input_width * np.dtype(self.input_type).itemsize

    @property
    def target_bytes(self) -> int:
        """Bytes of a target."""
        return self.target_width * np.dtype(self.target_type).itemsize

    @property
    def input_width(self) -> int:
        """Numbers of an input."""
        return sum(self.input_widths)

    @property
    def target_width(self) -> int:
        """Numbers of a target."""
        return sum(self.target_widths)

    @property
    def target_field(self) -> pa.Field:
        """The column of the targets in what a reader returns."""
        if self.kind == "label":
            return pa.field(LABEL, pa.int64())
        if self.kind == "mask":
            return pa.field(TARGET, IMAGE_TYPE)
        return pa.field(TARGET, pa.binary(self.target_bytes))

    def check(self, schema: pa.Schema, where: str) -> None:
        """Check that a file has the columns, and that they are of numbers.

        Raises:
            DatasetError: one is missing or of another type; names it and `where`.
        """
        widths = zip(
            (*self.inputs, *self.targets), (*self.input_widths, *self.target_widths), strict=True
        )
        for name, width in widths:
            found = self._width(schema, name, where)
            if found not in (None, width):
                raise DatasetError(
                    f"{where} has {found} numbers a row in column {name!r}, and {width} are "
                    "wanted; write all files alike"
                )

    def _width(self, schema: pa.Schema, name: str, where: str) -> int | None:
        if self.kind == "label" and name in self.targets:
            if name not in schema.names or not pa.types.is_integer(schema.field(name).type):
                width_of(schema, name, where)  # which says what is wrong, if it is no number
                raise DatasetError(
                    f"{where} has column {name!r} as {schema.field(name).type}, and classes are "
                    "whole numbers from 0; number the classes, or give --task regression"
                )
            return 1
        if self.kind == "mask" and name in self.targets:
            check_image_column(schema, name, where)
            return None
        if self.kind == "indices" and name in self.targets:
            width_of(schema, name, where)
            return None
        return width_of(schema, name, where)


def is_list(kind: pa.DataType) -> bool:
    """Whether each value is a list of values."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def width_of(schema: pa.Schema, name: str, where: str) -> int | None:
    """Return how many numbers a column has in each row; None if its lists do not say.

    Raises:
        DatasetError: there is no such column, or its values are no numbers.
    """
    if name not in schema.names:
        raise DatasetError(
            f"{where} has no column {name!r} (it has {', '.join(schema.names) or 'none'}); name "
            "one of those"
        )
    kind = schema.field(name).type
    inner = kind.value_type if is_list(kind) else kind
    if not is_number(inner):
        raise DatasetError(
            f"{where} has column {name!r} as {kind}, and inputs and targets are numbers; encode it "
            "as numbers, or name the inputs with --input-columns"
        )
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    return None if is_list(kind) else 1


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type are numbers that float32 can stand for."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def pack(table: pa.Table, names: Sequence[str], widths: Sequence[int]) -> pa.Array:
    """Return columns of numbers as one column of bytes, each row's float32 in their order.

    Args:
        table: n rows.
        names: its columns.
        widths: numbers that each has in a row.

    Returns:
        Fixed-size binary [n] of `4 * sum(widths)` bytes.

    Raises:
        BadValueError: a value is missing, not finite, or not one that float32 has.
    """
    packed = np.empty((len(table), sum(widths)), dtype=np.float32)
    at = 0
    for name, width in zip(names, widths, strict=True):
        packed[:, at : at + width] = _numbers(table.column(name), name, width)
        at += width
    return as_bytes(packed)


def pack_indices(table: pa.Table, name: str, num_classes: int) -> pa.Array:
    """Return lists of classes as one column of bytes: for each class 1 if it is in the list.

    Raises:
        BadValueError: a list is missing, or a class is outside of [0, num_classes).
    """
    column = whole(table.column(name))
    _check_there(column, name, 1)
    lengths = np.asarray(column.value_lengths()).astype(np.int64)
    rows = np.repeat(np.arange(len(column)), lengths)
    flat = column.flatten()
    if flat.null_count:
        bad = int(np.flatnonzero(np.asarray(flat.is_null()))[0])
        raise BadValueError(int(rows[bad]), f"column {name!r} has a list with no value in it")
    classes = _values(flat).astype(np.int64)
    outside = np.flatnonzero((classes < 0) | (classes >= num_classes))
    if len(outside):
        raise BadValueError(
            int(rows[outside[0]]),
            f"column {name!r} has the class {classes[outside[0]]}, and classes are in "
            f"[0, {num_classes})",
        )
    packed = np.zeros((len(column), num_classes), dtype=np.float32)
    packed[rows, classes] = 1
    return as_bytes(packed)


def pack_target(table: pa.Table, columns: Columns) -> pa.Array:
    """Return the targets of a table's rows as one column.

    Raises:
        BadValueError: a value is missing, or is no target of this kind.
    """
    if columns.kind == "label":
        return pack_label(table, columns.targets[0])
    if columns.kind == "mask":
        return pack_masks(table.column(columns.targets[0]), columns.targets[0])
    if columns.kind == "indices":
        return pack_indices(table, columns.targets[0], columns.target_width)
    return pack(table, columns.targets, columns.target_widths)


def pack_label(table: pa.Table, name: str) -> pa.Array:
    """Return a column of whole numbers as int64.

    Raises:
        BadValueError: a value is larger than int64 has.
    """
    column = whole(table.column(name))
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise BadValueError(0, f"column {name!r} has classes beyond 64 bits") from None


def as_bytes(numbers: NDArray[Any]) -> pa.Array:
    """Return numbers [n, ...] as an Arrow column of fixed-size binary that shares their memory."""
    numbers = np.ascontiguousarray(numbers)
    width = math.prod(numbers.shape[1:])
    return pa.Array.from_buffers(
        pa.binary(numbers.itemsize * width), len(numbers), [None, pa.py_buffer(numbers.reshape(-1))]
    )


def from_bytes(
    column: pa.Array, shape: tuple[int, ...], kind: NumberType = "float32"
) -> NDArray[Any]:
    """Return a column of `as_bytes` as numbers [n, *shape], a copy that may be written to."""
    count, width = len(column), math.prod(shape)
    end = (column.offset + count) * width
    numbers = np.frombuffer(column.buffers()[1], dtype=kind, count=end)
    return numbers[column.offset * width :].reshape(count, *shape).copy()


def _numbers(chunks: pa.ChunkedArray, name: str, width: int) -> NDArray[np.float32]:
    """Return a column's numbers, float32 [n, width]."""
    column = whole(chunks)
    _check_there(column, name, 1)
    if is_list(column.type):
        lengths = np.asarray(column.value_lengths()) if len(column) else np.zeros(0)
        bad = np.flatnonzero(lengths != width)
        if len(bad):
            raise BadValueError(
                int(bad[0]),
                f"column {name!r} has a list of {int(lengths[bad[0]])}, and others have {width}",
            )
        column = column.flatten()
        _check_there(column, name, width)
    values = _values(column)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if not len(bad) and values.dtype.kind in "iu":
        exact = (values <= MOST_EXACT) & (
            values >= (0 if values.dtype.kind == "u" else -MOST_EXACT)
        )
        bad = np.flatnonzero(~exact)
    if len(bad):
        raise BadValueError(
            int(bad[0]) // width,
            f"column {name!r} has {values[bad[0]]}, which float32 does not hold: "
            "scale the column, or leave it out",
        )
    return numbers.reshape(-1, width)


def _check_there(column: pa.Array, name: str, width: int) -> None:
    if column.null_count:
        bad = int(np.flatnonzero(np.asarray(column.is_null()))[0])
        raise BadValueError(
            bad // width, f"column {name!r} has no value: fill it in, or remove the row"
        )


def _values(column: pa.Array) -> NDArray[Any]:
    """Return a column of numbers without nulls as an array."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if not len(column):
        return np.zeros(0, dtype=np.float32)
    kind = column.type.to_pandas_dtype()
    values = np.frombuffer(column.buffers()[1], dtype=kind, count=column.offset + len(column))
    return values[column.offset :]
