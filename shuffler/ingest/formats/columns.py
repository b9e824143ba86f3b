"""Dialects of tables with images: which column is what, and how it becomes ours.

Images come as a struct of bytes and path (Hugging Face's convention), or as plain binary, in any
of Arrow's kinds of binary. Labels come as numbers of any kind, as truth values, as words, or as
lists of one. They are cast without loss, or refused. Files and splits are `tables`'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from downpour.shuffler.dataset.encoding import HUGGING_FACE_KEY
from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import IngestError

IMAGE_COLUMNS: Final = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS: Final = (
    *("label", "labels", "fine_label", "class", "cls", "target", "category", "class_label"),
    *("label_id", "class_id", "category_id", "coarse_label", "y"),
)
"""Names by which columns are found where the table does not say what they are, the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What is taken from a table."""

    image: str
    """Name of the column of images."""

    label: str | None
    """Name of the column of labels; None if the table has none."""

    names: tuple[str, ...]
    """Names of the labels that the table's metadata give; () if it gives none."""

    passed_over: tuple[str, ...] = ()
    """Other columns that could have been the label."""


def choose(
    schema: pa.Schema, where: str, image_column: str | None, label_column: str | None
) -> Columns:
    """Return which columns of a table hold images and labels.

    Args:
        schema: of the table.
        where: names the file in messages.
        image_column: the one that the user names; None finds it.
        label_column: likewise.

    Raises:
        IngestError: a column that was named is not there, or none is found.
    """
    features = _features(schema)
    image = _named(schema, image_column, where, "--image-column") or _image(schema, features, where)
    label = _named(schema, label_column, where, "--label-column")
    candidates: tuple[str, ...] = ()
    if label is None:
        classes = [n for n, f in features.items() if f.get("_type") == "ClassLabel"]
        known = _known(schema, LABEL_COLUMNS)
        candidates = tuple(dict.fromkeys((*known, *(c for c in classes if c in schema.names))))
        label = candidates[0] if candidates else None
    names = features.get(label, {}).get("names") if label else None
    return Columns(
        image=image,
        label=label,
        names=tuple(map(str, names)) if isinstance(names, list) else (),
        passed_over=candidates[1:],
    )


def _named(schema: pa.Schema, name: str | None, where: str, option: str) -> str | None:
    if name is not None and name not in schema.names:
        raise IngestError(
            f"{where} has no column {name!r} (it has {', '.join(schema.names) or 'none'}); give "
            f"one of those to {option}"
        )
    return name


def _image(schema: pa.Schema, features: dict[str, dict[str, Any]], where: str) -> str:
    said = [n for n, f in features.items() if f.get("_type") == "Image" and n in schema.names]
    named = _known(schema, IMAGE_COLUMNS)
    structs = [field.name for field in schema if _bytes_type(field.type) is not None]
    for candidates in (said, named, structs):
        preferred = [name for name in named if name in candidates] or candidates
        if len(candidates) == 1 or (preferred is not candidates and preferred):
            return preferred[0]
        if candidates:
            raise IngestError(
                f"{where} has several columns that could be the image ({', '.join(candidates)}); "
                "choose one with --image-column"
            )
    raise IngestError(
        f"{where} has no column of images that is known (it has "
        f"{', '.join(schema.names) or 'none'}); name it with --image-column"
    )


def _known(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Return the columns whose names are among `names`, in their order; case does not count."""
    by_name = {name.lower(): name for name in reversed(schema.names)}
    return [by_name[name] for name in names if name in by_name]


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata say of the columns; what cannot be read says nothing."""
    text = (schema.metadata or {}).get(HUGGING_FACE_KEY)
    try:
        found = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _bytes_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the bytes in a column of images; None if it holds no bytes."""
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return None if index < 0 else _bytes_type(kind.field(index).type)
    if types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    is_view = kind == pa.binary_view()
    return kind if is_view or any(test(kind) for test in binary) else None


def check_image_type(schema: pa.Schema, columns: Columns, where: str) -> None:
    """Check that the column of images holds files' bytes.

    Raises:
        IngestError: it holds paths, pixels, or something else.
    """
    kind = schema.field(columns.image).type
    if _bytes_type(kind) is not None:
        return
    if types.is_string(kind) or types.is_large_string(kind) or kind == pa.string_view():
        raise IngestError(
            f"{where} has texts in column {columns.image!r}, not images; if they are paths, write "
            "paths and labels as CSV beside the images, and ingest that; if they are base64, "
            "decode them to bytes"
        )
    raise IngestError(
        f"{where} has column {columns.image!r} as {kind}, which holds no image files; save each "
        "image as a file's bytes (PNG or JPEG), or name another column with --image-column"
    )


def images(column: pa.Array, start: int, where: str) -> pa.Array:
    """Return a column of images as struct<bytes: binary, path: string>.

    Args:
        column: of the table, of a type that `check_image_type` lets pass.
        start: number of its first row, for messages.
        where: names the file in messages.

    Raises:
        IngestError: a row has no bytes.
    """
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    path: pa.Array = pa.nulls(len(column), pa.string())
    data = column
    if types.is_struct(column.type):
        parts = dict(zip((f.name for f in column.type), column.flatten(), strict=True))
        data = parts["bytes"]
        if "path" in parts and not types.is_null(parts["path"].type):
            path = _decoded(parts["path"]).cast(pa.string())
    data = _decoded(data).cast(pa.binary())
    if data.null_count:
        bad = int(pc.index(data.is_null(), True).as_py())
        named = path[bad].as_py()
        has = f"a path ({named}) and no bytes" if named else "no image"
        raise IngestError(
            f"row {start + bad} of {where} has {has}; store the images' bytes in the table, or "
            "write paths and labels as CSV beside the images"
        )
    return pa.StructArray.from_arrays([data, path], fields=list(IMAGE_TYPE))


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def is_words(kind: pa.DataType) -> bool:
    """Whether labels of a type are words, which have to be numbered."""
    if types.is_dictionary(kind) or _is_list(kind):
        return is_words(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return kind == pa.string_view() or any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def plain_labels(column: pa.Array, start: int, where: str) -> pa.Array:
    """Return labels as int64, or as strings if they are words; what is no label is null.

    Not a number, a list without a value and a number below 0 are no labels.

    Raises:
        IngestError: a label is no whole number, or a list of several.
    """
    column = _decoded(column)
    kind = column.type
    if _is_list(kind):
        column = _only_values(column, start, where)
        return plain_labels(column, start, where)
    if types.is_null(kind):
        return pa.nulls(len(column), pa.int64())
    if is_words(kind):
        return _words(column, start, where)
    try:
        if types.is_boolean(kind):
            return column.cast(pa.int64())
        if types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        numbers = column.cast(pa.int64())
    except (pa.ArrowException, OverflowError) as error:
        raise IngestError(
            f"labels of {where} from row {start} on are {kind} that are no class numbers "
            f"({one_line(error)}); give whole numbers from 0, or words, or name another column "
            "with --label-column"
        ) from error
    return pc.if_else(pc.less(numbers, 0), pa.scalar(None, pa.int64()), numbers)


def _words(column: pa.Array, start: int, where: str) -> pa.Array:
    """Return labels as strings; blanks alone are none."""
    try:
        words = column.cast(pa.string())
    except pa.ArrowException as error:
        raise IngestError(
            f"labels of {where} from row {start} on are bytes that are no UTF-8 "
            f"({one_line(error)}); write them as words, or name another column with --label-column"
        ) from error
    blank = pc.equal(pc.utf8_trim_whitespace(words), "")
    return pc.if_else(blank, pa.scalar(None, pa.string()), words)


def _only_values(column: pa.Array, start: int, where: str) -> pa.Array:
    """Return the single value of each list; null for lists that have none."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    several = pc.index(pc.greater(lengths, 1), True).as_py()
    if several >= 0:
        raise IngestError(
            f"row {start + several} of {where} has {lengths[several].as_py()} labels; give each "
            "image one class, or name another column with --label-column"
        )
    values = column.flatten()
    places = pc.if_else(
        pc.equal(lengths, 1),
        pc.subtract(pc.cumulative_sum(pc.cast(lengths, pa.int64())), 1),
        pa.scalar(None, pa.int64()),
    )
    return values.take(places)


def names_of_truth(kind: pa.DataType) -> tuple[str, ...]:
    """Return the names of the classes of truth values; () of other labels."""
    return ("false", "true") if types.is_boolean(kind) else ()


def numbered(labels: pa.Array, names: Sequence[str]) -> pa.Array:
    """Return labels as int64: words by their place in `names`, null where they are not in it."""
    if not is_words(labels.type):
        return labels
    return pc.index_in(labels, value_set=pa.array(names, pa.string())).cast(pa.int64())
