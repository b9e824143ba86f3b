"""Rows of numbers to predict for: from a Parquet or CSV file, or from JSON, to answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from torch import Tensor

from downpour.cluster.errors import UserError, one_line
from downpour.cluster.serving.masks import shares_of
from downpour.cluster.serving.prediction import best_of, those_there
from downpour.shuffler.dataset.columns import INPUT, Columns, as_bytes, pack, width_of
from downpour.shuffler.errors import BadValueError
from downpour.workers.evaluation.predictor import Predictor

ROWS = 4096
"""Rows that are answered at a time."""
PARQUET, CSV, NPY = ".parquet", ".csv", ".npy"


def read_table(path: Path, columns: Columns) -> pa.Table:
    """Return the input columns of a file.

    Args:
        path: a Parquet file, or a CSV file with the columns' names in its first line.
        columns: that the network takes.

    Raises:
        UserError: the file cannot be read, lacks a column, or has one that is no number.
    """
    try:
        if path.suffix.lower() == PARQUET:
            found = pq.ParquetFile(path)
            schema = found.schema_arrow
            table = None
        elif path.suffix.lower() == CSV:
            table = pyarrow.csv.read_csv(path)
            schema = table.schema
        else:
            raise UserError(
                f"{path} is neither {PARQUET} nor {CSV}: the network takes rows of numbers, in one "
                "of these"
            )
        for name in columns.inputs:
            width_of(schema, name, str(path))  # which says what is wrong with it
        chosen = list(columns.inputs)
        return found.read(columns=chosen) if table is None else table.select(chosen)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def rows_of_table(
    table: pa.Table, columns: Columns, what: str, first_row: int = 0
) -> pa.RecordBatch:
    """Return a table's rows without targets, for `Predictor.answer`.

    Args:
        table: with the input columns.
        columns: that the network takes.
        what: the table, for messages.
        first_row: the number of its first row there.

    Raises:
        UserError: a value is missing, or is none that float32 has; it names the row.
    """
    try:
        packed = pack(table, columns.inputs, columns.input_widths)
    except BadValueError as error:
        raise UserError(f"row {first_row + error.position} of {what}: {error.what}") from None
    return pa.record_batch({INPUT: packed})


def read_array(path: Path, columns: Columns) -> npt.NDArray[Any]:
    """Return the inputs in a file of NumPy's, `[n, *input_shape]`, for a dataset of one's own.

    Raises:
        UserError: the file cannot be read, or its rows are no inputs of the network.
    """
    if path.suffix.lower() != NPY:
        raise UserError(
            f"{path} is no {NPY}: the network's inputs come from a dataset of your own, so save "
            f"some as an array [n, {', '.join(map(str, columns.input_shape))}]"
        )
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if found.shape[1:] != columns.input_shape or not found.ndim:
        raise UserError(
            f"{path} has an array {list(found.shape)}, and the network takes "
            f"[n, {', '.join(map(str, columns.input_shape))}]"
        )
    return found


def rows_of_array(
    values: npt.NDArray[Any], columns: Columns, what: str, first_row: int = 0
) -> pa.RecordBatch:
    """Return inputs `[n, *input_shape]` as rows without targets, for `Predictor.answer`.

    Raises:
        UserError: a value is no number, or not finite; it names the row.
    """
    whole = columns.input_type == "int64"
    if values.dtype.kind not in ("iub" if whole else "iufb"):
        wanted = "whole numbers" if whole else "numbers"
        raise UserError(f"{what} has {values.dtype}, and the network takes {wanted}")
    packed = values.astype(columns.input_type)
    bad = np.flatnonzero(~np.isfinite(packed).reshape(len(packed), -1).all(1))
    if len(bad):
        raise UserError(
            f"row {first_row + bad[0]} of {what} has a value that is not finite: repair it"
        )
    return pa.record_batch({INPUT: as_bytes(packed)})


def predictions(
    predictor: Predictor, columns: Columns, class_names: Sequence[str], path: Path
) -> Iterator[dict[str, Any]]:
    """Yield what the network says of each row of a file: see `told`.

    Raises:
        UserError: see `read_table`, `read_array` and `rows_of_table`.
    """
    for rows in _read_rows(path, columns):
        answer = predictor.answer(rows)
        yield from told(
            answer.probabilities, answer.of_classes, predictor.task, columns, class_names
        )


def _read_rows(path: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, some at a time."""
    if columns.input_shape:
        array = read_array(path, columns)
        for start in range(0, len(array), ROWS):
            yield rows_of_array(array[start : start + ROWS], columns, str(path), start)
        return
    table = read_table(path, columns)
    for start in range(0, len(table), ROWS):
        yield rows_of_table(table.slice(start, ROWS), columns, str(path), start)


def told(
    rows: Iterable[Tensor],
    of_classes: bool,
    task: str,
    columns: Columns,
    class_names: Sequence[str],
    top: int = 5,
) -> Iterator[dict[str, Any]]:
    """Yield for each row its numbers by the targets' names, or its classes with probabilities.

    Args:
        rows: what the network gives for each.
        of_classes: whether these are probabilities of classes.
        task: of the network.
        columns: its inputs and targets.
        class_names: of its labels.
        top: most classes of a row.
    """
    for row in rows:
        if of_classes:
            yield {"predictions": best_of(row, class_names, top)}
        elif task == "segmentation":
            mask = row.argmax(0)
            shares = shares_of(mask.numpy(), class_names, top)
            yield {"predictions": shares, "mask": mask.tolist()}
        elif task == "regression" and row.numel() == columns.target_width:
            yield {"outputs": _by_name(row.flatten().tolist(), columns)}
        elif task == "multilabel":
            names = columns.targets if columns.kind == "numbers" else class_names
            yield {"predictions": those_there(row, names, len(row))}
        else:
            yield {"outputs": row.tolist()}


def _by_name(values: Sequence[float], columns: Columns) -> dict[str, float | list[float]]:
    named: dict[str, float | list[float]] = {}
    at = 0
    for name, width in zip(columns.targets, columns.target_widths, strict=True):
        named[name] = values[at] if width == 1 else list(values[at : at + width])
        at += width
    return named
