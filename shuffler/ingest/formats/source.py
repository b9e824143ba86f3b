"""What every source of an ingest is, once it is opened: a few facts, and a stream of batches.

How each format is opened is in `sources`, `folders` and the formats' own modules.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.encoding import Encoding, schema_for

Format = Literal["idx", "cifar", "folder", "huggingface", "arrow", "webdataset", "list"]
FORMATS: Final = ("idx", "cifar", "folder", "huggingface", "arrow", "webdataset", "list")
Batches = Callable[[], Iterator[pa.RecordBatch]]

MAX_CHUNK_ROWS: Final = 1024
"""Most rows of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSplit:
    """One split of a source."""

    name: str
    """Its name in the dataset: `train`, `validation`, `test`, ..."""

    num_rows: int
    """Its rows."""

    num_bytes: int
    """About what its rows take in memory."""

    batches: Batches
    """Streams its rows, in the schema of the source, in the source's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source of any format, opened."""

    format: Format
    """What it is."""

    encoding: Encoding
    """How its batches keep images."""

    class_names: tuple[str, ...]
    """Names of the labels; empty where the source names none."""

    splits: tuple[SourceSplit, ...]
    """Its splits, by name."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of its batches and of the shards made of them."""
        return schema_for(self.encoding, self.class_names)


def chunk_rows(chunk_bytes: int, row_bytes: int) -> int:
    """Return the rows of a batch of about `chunk_bytes`."""
    return max(1, min(MAX_CHUNK_ROWS, chunk_bytes // max(1, row_bytes)))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image as a PNG file; pixels are [h, w] grey or [h, w, 3] RGB."""
    from PIL import Image  # Parquet and folders need no encoder

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    return target.getvalue()
