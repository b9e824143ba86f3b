"""Columns that hold image files: which types they may have, and how they become one type.

Hugging Face keeps an image as a struct of bytes and a path. Others keep bytes alone, or the fields
in another order. What the bytes show is `images`'.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from downpour.shuffler.errors import BadValueError, DatasetError

IMAGE_TYPE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An image file in a column, as Hugging Face keeps one."""


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece."""
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.array([], combined.type)
    return combined


def holds_images(kind: pa.DataType) -> bool:
    """Whether values of a type may be image files: bytes, or a struct that has them in `bytes`."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def check_image_column(schema: pa.Schema, name: str, where: str) -> None:
    """Check that a file has a column, and that image files may be in it.

    Raises:
        DatasetError: it has not.
    """
    if name not in schema.names:
        raise DatasetError(
            f"{where} has no column {name!r} (it has {', '.join(schema.names) or 'none'}); name "
            "one of those"
        )
    kind = schema.field(name).type
    if not holds_images(kind):
        raise DatasetError(
            f"{where} has column {name!r} as {kind}, and it should hold image files; save each as "
            "a PNG's bytes"
        )


def as_images(column: pa.Array) -> pa.StructArray:
    """Return a column of image files as `IMAGE_TYPE`, whatever `holds_images` allows it to be.

    Args:
        column: n values.

    Returns:
        n values; those that are null stay so.
    """
    if column.type == IMAGE_TYPE:
        return column
    names, parts = ["bytes"], [column]
    if pa.types.is_struct(column.type):
        names, parts = [field.name for field in column.type], column.flatten()
    found = dict(zip(names, parts, strict=True))
    paths = found.get("path")
    if paths is None or pa.types.is_null(paths.type):
        paths = pa.nulls(len(column), pa.string())
    return pa.StructArray.from_arrays(
        [found["bytes"].cast(pa.binary()), paths.cast(pa.string())],
        fields=list(IMAGE_TYPE),
        mask=column.is_null(),
    )


def pack_masks(column: pa.ChunkedArray, name: str) -> pa.StructArray:
    """Return a column of masks as `IMAGE_TYPE`.

    Args:
        column: n values, as `holds_images` allows.
        name: the column's.

    Raises:
        BadValueError: a row has no mask.
    """
    masks = as_images(whole(column))
    data, paths = masks.flatten()
    if data.null_count:
        bad = int(np.flatnonzero(np.asarray(data.is_null()))[0])
        path = paths[bad].as_py()
        found = f"a path ({path}) and no bytes" if path else "no mask"
        raise BadValueError(
            bad, f"column {name!r} has {found}: store the mask's bytes, or remove the row"
        )
    return masks
