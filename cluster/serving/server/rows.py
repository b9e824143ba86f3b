"""Requests with rows of numbers: what is sent, and what is answered. Pure but for the network.

Not here: several requests together, and their waits (`classifier`), and JSON (`json_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from downpour.cluster.errors import UserError
from downpour.cluster.serving.json_rows import MOST_ROWS, parsed
from downpour.cluster.serving.server.body import Refused, Sent, check_encoding
from downpour.shuffler.dataset.columns import Columns

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.workers.evaluation.predictor import Predictor

ACCEPTED: Final = "application/json"
_TYPES: Final = ("", ACCEPTED, "text/plain", "application/x-www-form-urlencoded")
"""Types of a body that may be JSON; the last is what `curl --data-binary` says of any body."""


class Rows:
    """Answers rows with their numbers or their classes."""

    wanted = "rows as JSON"
    """What a caller posts."""

    def __init__(self, predictor: Predictor, columns: Columns, class_names: Sequence[str]) -> None:
        """`columns` are the inputs and targets, and `class_names` of the labels."""
        self._predictor, self._columns, self._names = predictor, columns, class_names

    def read(self, headers: Mapping[str, str], body: bytes) -> Sent:
        """Return the rows that were sent.

        Raises:
            Refused: 415 for a type or an encoding that is not read, 413 for too many rows, 400 for
                a body that is empty or has a row that the network does not take.
        """
        check_encoding(headers, "the JSON")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _TYPES:
            raise Refused(
                415,
                f"a body of type {kind!r} is not read: send rows of numbers as {ACCEPTED}",
                {"accept-post": ACCEPTED},
            )
        if not body:
            raise Refused(400, "the body is empty: send rows of numbers as JSON")
        try:
            rows = parsed(body, self._columns)
        except UserError as error:
            raise Refused(400, str(error)) from None
        if len(rows) > MOST_ROWS:
            raise Refused(413, f"there are {len(rows):,} rows: send at most {MOST_ROWS:,} at once")
        return Sent(content=rows, fields={})

    def check(self, content: pa.RecordBatch) -> None:
        """Nothing: rows were looked at when they were read."""

    def together(self, several: Sequence[pa.RecordBatch]) -> list[tuple[Tensor, bool]]:
        """Return what the network gives for each request, `[rows, ...]`, and whether it is classes.

        Args:
            several: the rows of each.
        """
        import torch

        answer = self._predictor.answer(pa.concat_batches(list(several)))
        parts = torch.split(answer.probabilities, [len(rows) for rows in several])
        return [(part, answer.of_classes) for part in parts]

    def told(self, found: tuple[Tensor, bool], top: int) -> dict[str, Any]:
        """Return what is said of the rows of a request, as plain data."""
        from downpour.cluster.serving.tables import told

        task = self._predictor.task
        return {"rows": list(told(*found, task, self._columns, self._names, top))}
