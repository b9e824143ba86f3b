"""Rows of numbers in JSON: from what a caller sends to rows for a network. Pure.

    {"rows": [[1.5, 2], [0.5, 3]]}               numbers in the order of the input columns
    {"rows": [{"area": 1.5, "rooms": 2}, ...]}   numbers by the columns' names

Not here: HTTP (`server.rows`), and files (`tables`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from downpour.cluster.errors import UserError
from downpour.cluster.serving.tables import rows_of_array
from downpour.shuffler.dataset.columns import INPUT, MOST_EXACT, Columns, as_bytes

MOST_ROWS: Final = 4096
"""Rows of one request."""
EXAMPLE: Final = '{"rows": [[1, 2], [3, 4]]}'
SHOWN: Final = 5


def parsed(body: bytes, columns: Columns) -> pa.RecordBatch:
    """Return the rows in a body of JSON, without targets, for `Predictor.answer`.

    Args:
        body: JSON in UTF-8.
        columns: that the network takes.

    Raises:
        UserError: it is no JSON, or a row is not one that the network takes; names row and column.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"the body is no JSON ({said}): send {EXAMPLE}") from None
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise UserError(f"the body has no list 'rows': send {EXAMPLE}")
    if unknown := sorted(set(value) - {"rows"}):
        raise UserError(f"{unknown[0]!r} is not known here: only 'rows' can be given")
    rows = value["rows"]
    if not rows:
        raise UserError("'rows' is empty: send at least one row")
    if columns.input_shape:
        return rows_of_array(_nested(rows, columns), columns, "the body")
    packed = np.empty((len(rows), columns.input_width), np.float32)
    for number, row in enumerate(rows):
        packed[number] = _row(row, columns, f"row {number}")
    return pa.record_batch({INPUT: as_bytes(packed)})


def _nested(rows: Sequence[Any], columns: Columns) -> npt.NDArray[Any]:
    """Return rows of lists in lists as `[n, *input_shape]`."""
    found = []
    for number, row in enumerate(rows):
        try:
            array = np.array(row)
        except ValueError:  # lists of several lengths
            array = np.zeros(0)
        if array.shape != columns.input_shape:
            raise UserError(
                f"row {number} is {_kind(row)} of shape {list(array.shape)}, and the network takes "
                f"{list(columns.input_shape)}"
            )
        if array.dtype.kind not in "iufb":
            raise UserError(f"row {number} has a value that is no number")
        found.append(array)
    return np.stack(found)


def _row(row: Any, columns: Columns, what: str) -> list[float]:
    """Return the numbers of a row in the order of the columns."""
    names, widths = columns.inputs, columns.input_widths
    if isinstance(row, Mapping):
        for name in names:
            if name not in row:
                raise UserError(f"{what} has no column {name!r}: give all of {_few(names)}")
        if unknown := sorted(set(row) - set(names)):
            raise UserError(
                f"{what} has a column {unknown[0]!r}, which the network does not take: give "
                f"{_few(names)} alone"
            )
        values = [row[name] for name in names]
    elif isinstance(row, list):
        values = row
    else:
        raise UserError(f"{what} is {_kind(row)}: give a list of numbers, or numbers by column")
    if len(values) != len(names) and len(values) != columns.input_width:
        raise UserError(
            f"{what} has {len(values)} numbers, and the network takes {columns.input_width} "
            f"({_few(names)})"
        )
    if len(values) != len(names):  # columns of lists, one after the other
        return [_number(value, f"{what} at place {at}") for at, value in enumerate(values)]
    found: list[float] = []
    for name, width, value in zip(names, widths, values, strict=True):
        where = f"{what}, column {name!r}"
        parts = value if isinstance(value, list) else [value]
        if len(parts) != width:
            raise UserError(f"{where} has {len(parts)} numbers, and the network takes {width}")
        found += [_number(part, where) for part in parts]
    return found


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float):
        raise UserError(f"{where} has {_kind(value)}, not a number: {json.dumps(value)[:40]}")
    if isinstance(value, int) and abs(value) > MOST_EXACT:
        raise UserError(f"{where} has {value!r:.40}, which float32 does not hold: scale it")
    with np.errstate(over="ignore"):
        found = float(np.float32(value))
    if not np.isfinite(found):
        raise UserError(f"{where} has {value}, which is no finite number of float32")
    return found


def _kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "a truth value"}
    return "nothing (null)" if value is None else kinds.get(type(value), "a number")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
