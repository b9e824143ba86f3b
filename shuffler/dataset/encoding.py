"""How a row keeps its input: as an image file, as packed bits, or as numbers.

Two encodings are of images, each known by its Parquet schema:

* `EncodedImages`, the Hugging Face convention: `image: struct<bytes: binary, path: string>`,
  holding a PNG, JPEG, ... file.
* `PackedBits`: `bits: fixed_size_binary[n]`, a binary image of height x width in row-major order,
  eight pixels a byte; the shape and the bit order are JSON in the schema's metadata under
  `downpour`.

Rows of a table are `Numbers`, which `columns` packs from the columns that are chosen for inputs.

Beside each stands `label: int64`, or the target that `columns` chooses. Class names are where
Hugging Face keeps them, in the schema's metadata under `huggingface`. Pixels are `decode`'s, files
are `records`'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `take` would import it in the middle of the first mini-batch, for 100 ms
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import INPUT, Columns
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE, check_image_column
from downpour.shuffler.errors import DatasetError

METADATA_KEY = b"downpour"
HUGGING_FACE_KEY = b"huggingface"

BitOrder = Literal["big", "little"]


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """Each row holds an image file."""

    @property
    def column(self) -> str:
        """Name of the column."""
        return "image"

    @property
    def data_type(self) -> pa.DataType:
        """Arrow type of the column."""
        return IMAGE_TYPE

    def describe(self) -> dict[str, Any]:
        """Return the encoding as JSON values."""
        return {"name": "image"}


@dataclass(frozen=True, slots=True)
class PackedBits:
    """Each row holds a binary image, one bit a pixel, rows after one another without padding."""

    height: int
    """Pixels from top to bottom."""

    width: int
    """Pixels from left to right."""

    bit_order: BitOrder = "big"
    """`big`: the first pixel is the most significant bit of the first byte (NumPy's default)."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.bit_order not in ("big", "little"):
            raise DatasetError(
                f"packed bits of {self.height}x{self.width} in bit order {self.bit_order!r} do "
                "not exist; give a positive size and 'big' or 'little'"
            )

    @property
    def column(self) -> str:
        """Name of the column."""
        return "bits"

    @property
    def num_bytes(self) -> int:
        """Bytes of a row; the last one's spare bits are zero."""
        return -(-self.height * self.width // 8)

    @property
    def data_type(self) -> pa.DataType:
        """Arrow type of the column."""
        return pa.binary(self.num_bytes)

    def describe(self) -> dict[str, Any]:
        """Return the encoding as JSON values."""
        return {"name": "bits", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Numbers:
    """Each row holds numbers as so many bytes."""

    num_bytes: int
    """Bytes of a row."""

    @property
    def column(self) -> str:
        """Name of the column."""
        return INPUT

    @property
    def data_type(self) -> pa.DataType:
        """Arrow type of the column."""
        return pa.binary(self.num_bytes)

    def describe(self) -> dict[str, Any]:
        """Return the encoding as JSON values."""
        return {"name": "numbers", "num_bytes": self.num_bytes}


Encoding = EncodedImages | PackedBits | Numbers

PLAIN = Columns()
"""A picture and its label."""


def encoding_from(description: object, where: str) -> Encoding:
    """Return the encoding that `describe()` wrote.

    Raises:
        DatasetError: the description is of no encoding known here; the message names `where`.
    """
    match description:
        case {"name": "image"}:
            return EncodedImages()
        case {"name": "bits", "height": int(h), "width": int(w), "bit_order": str(order)}:
            return PackedBits(h, w, "little" if order == "little" else "big")
    raise DatasetError(
        f"{where} describes the encoding as {description!r}, which this version does not know; "
        "ingest the dataset again"
    )


def indices(numbers: NDArray[np.int64]) -> pa.Array:
    """Return numbers as an Arrow array that shares their memory: what `take` wants.

    `pa.array` and `to_numpy` would import pandas where that is installed, which takes longer than
    a first read.
    """
    numbers = np.ascontiguousarray(numbers, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


def label_values(column: pa.Array) -> NDArray[np.int64]:
    """Return a column of int64 as an array that shares its memory; what is null is -1."""
    column = column.fill_null(-1) if column.null_count else column
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    values = np.frombuffer(column.buffers()[1], dtype=np.int64)
    return values[column.offset : column.offset + len(column)]


def schema_for(
    encoding: Encoding, class_names: Sequence[str], columns: Columns = PLAIN
) -> pa.Schema:
    """Return the Parquet schema of a dataset, or that of rows whose columns are packed."""
    features: dict[str, Any] = {
        "label": {"names": list(class_names), "_type": "ClassLabel"}
        if class_names
        else {"dtype": "int64", "_type": "Value"}
    }
    if isinstance(encoding, EncodedImages):
        features["image"] = {"_type": "Image"}
    metadata = {
        METADATA_KEY: json.dumps(encoding.describe()),
        HUGGING_FACE_KEY: json.dumps({"info": {"features": features}}),
    }
    return pa.schema(
        [pa.field(encoding.column, encoding.data_type), columns.target_field], metadata=metadata
    )


def encoding_of(schema: pa.Schema, where: str, columns: Columns = PLAIN) -> Encoding:
    """Return the encoding of rows of `schema`, checking that every column is as it should be.

    Args:
        schema: of a Parquet file or of a record batch.
        where: names the file in messages.
        columns: of the file, which become input and target.

    Raises:
        DatasetError: a column is missing or of a wrong type, or packed bits lack their shape.
    """
    if columns != PLAIN:
        columns.check(schema, where)
    if columns.kind == "mask" and "bits" not in schema.names:
        check_image_column(schema, EncodedImages().column, where)
        return EncodedImages()
    encoding = Numbers(columns.input_bytes) if columns.inputs else image_encoding(schema, where)
    if columns == PLAIN:
        _check_column(schema, "label", pa.int64(), where)
    return encoding


def image_encoding(schema: pa.Schema, where: str) -> EncodedImages | PackedBits:
    """Return the encoding of the images in rows of `schema`, whatever stands beside them.

    Raises:
        DatasetError: there are none, or their column is of a wrong type.
    """
    encoding: Encoding
    if "bits" in schema.names:
        metadata = _json_metadata(schema, METADATA_KEY, where)
        if not metadata:
            raise DatasetError(
                f"{where} has packed bits but no shape of them (schema metadata "
                f"{METADATA_KEY.decode()!r}); ingest the dataset again"
            )
        encoding = encoding_from(metadata, where)
    elif "image" in schema.names:
        encoding = EncodedImages()
    else:
        raise DatasetError(
            f"{where} has no column 'image' or 'bits' (it has {', '.join(schema.names) or 'none'})"
            "; give Parquet in the Hugging Face image convention, run ingest on the source, or "
            "name a table's --target-column"
        )
    _check_column(schema, encoding.column, encoding.data_type, where)
    assert not isinstance(encoding, Numbers), "the schema has images"
    return encoding


def class_names_of(schema: pa.Schema, where: str, columns: Columns = PLAIN) -> tuple[str, ...]:
    """Return the names of the target's classes in the schema's metadata, () where it has none."""
    match _json_metadata(schema, HUGGING_FACE_KEY, where):
        case {"info": {"features": {**features}}} if columns.kind != "numbers":
            match features.get(columns.targets[0]):
                case {"names": [*names]}:
                    return tuple(str(name) for name in names)
                case {"feature": {"names": [*names]}}:
                    return tuple(str(name) for name in names)
    return ()


def _check_column(schema: pa.Schema, name: str, data_type: pa.DataType, where: str) -> None:
    if name not in schema.names:
        raise DatasetError(
            f"{where} has no column {name!r} (it has {', '.join(schema.names)}); add the column "
            f"as {data_type}, or run ingest on the source"
        )
    found = schema.field(name).type
    if not _is_alike(found, data_type):
        raise DatasetError(
            f"{where} has column {name!r} as {found}, not {data_type}; convert the column, or "
            "run ingest on the source"
        )


def _is_alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equality, where a struct's fields may stand in any order."""
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        return {f.name: f.type for f in found} == {f.name: f.type for f in wanted}
    return bool(found == wanted)


def _json_metadata(schema: pa.Schema, key: bytes, where: str) -> Mapping[str, Any]:
    text = (schema.metadata or {}).get(key)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DatasetError(
            f"{where} has schema metadata {key.decode()!r} that is not a JSON object; write it "
            "again, or run ingest on the source"
        )
    return value
