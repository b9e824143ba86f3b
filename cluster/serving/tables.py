"""Rows of numbers to predict for: from a Parquet or CSV file, or from JSON, to answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from downpour.cluster.errors import UserError, one_line
from downpour.cluster.serving.prediction import best_of, those_there
from downpour.shuffler.dataset.columns import INPUT, BadValueError, Columns, pack, width_of
from downpour.workers.evaluation.predictor import Answer, Predictor

ROWS = 4096
"""Rows that are answered at a time."""
PARQUET, CSV = ".parquet", ".csv"


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


def rows_of_table(table: pa.Table, columns: Columns, what: str) -> pa.RecordBatch:
    """Return a table's rows without targets, for `Predictor.answer`.

    Args:
        table: with the input columns.
        columns: that the network takes.
        what: the table, for messages.

    Raises:
        UserError: a value is missing, or is none that float32 has; it names the row.
    """
    try:
        packed = pack(table, columns.inputs, columns.input_widths)
    except BadValueError as error:
        raise UserError(f"row {error.position} of {what}: {error.what}") from None
    return pa.record_batch({INPUT: packed})


def predictions(
    predictor: Predictor, columns: Columns, class_names: Sequence[str], table: pa.Table, path: Path
) -> Iterator[dict[str, Any]]:
    """Yield what the network says of each row of a table: see `told`."""
    for start in range(0, len(table), ROWS):
        part = table.slice(start, ROWS)
        answer = predictor.answer(rows_of_table(part, columns, str(path)))
        yield from told(answer, predictor.task, columns, class_names)


def told(
    answer: Answer, task: str, columns: Columns, class_names: Sequence[str], top: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield for each row its numbers by the targets' names, or its classes with probabilities."""
    for row in answer.probabilities:
        if answer.of_classes:
            yield {"predictions": best_of(row, class_names, top)}
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
