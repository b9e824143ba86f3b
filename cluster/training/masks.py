"""Masks in Parquet files: which column has them, how many classes are in them, and what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import pyarrow as pa

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.image_columns import holds_images
from downpour.shuffler.dataset.reader import NOT_COUNTED
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.mask_survey import check_several, classes_in
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.config import ModelConfig
from downpour.workers.tasks import TASKS

Say = Callable[[str], object]

IMAGE: Final = "image"
NAMES: Final = (
    *("mask", "masks", "label", "labels", "segmentation_mask", "segmentation", "annotation"),
    *("target", "annotations", "semantic_segmentation"),
)
"""What columns of masks are called, the likeliest first."""
COUNTED_ROWS: Final = 5000
"""Most masks whose classes are counted before a run starts: each costs some milliseconds."""
SHOWN: Final = 5


def candidates(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that may hold masks, the likeliest first; none if there is no picture."""
    if IMAGE not in schema.names or not holds_images(schema.field(IMAGE).type):
        return ()
    found = [field.name for field in schema if field.name != IMAGE and holds_images(field.type)]
    return tuple(sorted(found, key=lambda name: _place(name.lower())))


def _place(name: str) -> int:
    return NAMES.index(name) if name in NAMES else len(NAMES)


def has_masks(config: RunConfig, schema: pa.Schema) -> bool:
    """Whether targets are masks, by the task, the column that is named, or the only ones there."""
    if config.model.task is not None:
        return config.model.task == "segmentation"
    targets, found = config.data.target_column, candidates(schema)
    if targets:
        return len(targets) == 1 and targets[0] in found
    return bool(found) and not config.data.input_columns and not _has_labels(schema)


def _has_labels(schema: pa.Schema) -> bool:
    at = schema.get_field_index("label")
    return at >= 0 and not holds_images(schema.field(at).type)


def with_masks(
    config: RunConfig, schema: pa.Schema, where: str, given: Mapping[str, object], say: Say
) -> RunConfig:
    """Return the configuration of a segmentation whose masks are images in Parquet files.

    Args:
        config: of a run that has not begun, with the task's loss.
        schema: of the training split's files.
        where: the first of them.
        given: names of the settings that the user has given.
        say: gets a line about what was settled.

    Raises:
        UserError: there are no masks, or the options do not go with them.
        DatasetError: a mask cannot be read.
    """
    if config.data.input_columns:
        raise UserError(
            f"the inputs of masks are the pictures in column {IMAGE!r}: leave --input-columns out"
        )
    name = _column(config, schema, where)
    columns = Columns(
        targets=(name,), target_widths=(config.model.num_classes,), kind="mask", target_type="int64"
    )
    columns.check(schema, where)
    image = dataclasses.replace(config.model.pictures, fit="whole")
    model = dataclasses.replace(config.model, task="segmentation", columns=columns, image=image)
    count = config.model.num_classes
    if "num_classes" not in given:
        count = _count(dataclasses.replace(config, model=model), say)
    columns = dataclasses.replace(columns, target_widths=(count,))
    model = shaped(dataclasses.replace(model, columns=columns, num_classes=count))
    loss = model.loss
    say(
        f"task {TASKS['segmentation'].name} with the loss {loss}; inputs are pictures, targets the "
        f"masks in column {name!r}, of {count} classes"
    )
    return dataclasses.replace(config, model=model)


def shaped(model: ModelConfig) -> ModelConfig:
    """Return a model whose masks have the size of its pictures; any other as it is."""
    if model.columns.kind != "mask":
        return model
    image = model.pictures
    columns = dataclasses.replace(model.columns, target_shape=(image.height, image.width))
    return dataclasses.replace(model, columns=columns)


def _column(config: RunConfig, schema: pa.Schema, where: str) -> str:
    """The column of the masks."""
    targets, found = config.data.target_column, candidates(schema)
    if len(targets) > 1:
        raise UserError(
            f"a row has one mask, and --target-column names {len(targets)}: name one column"
        )
    if IMAGE not in schema.names or not isinstance(config.model.image, ImageSpec):
        raise UserError(
            f"{where} has no column {IMAGE!r} (it has {', '.join(schema.names) or 'none'}), and "
            "masks are of pictures: call their column so"
        )
    if targets:
        return targets[0]
    if not found:
        raise UserError(
            f"{where} has no column of masks beside {IMAGE!r} (it has {', '.join(schema.names)}): "
            "add one of PNG files as bytes, or give --data dataset:module:function"
        )
    known = [name for name in found if name.lower() in NAMES]
    if len(found) > 1 and len(known) != 1:
        raise UserError(
            f"{where} has images in {', '.join(found)} beside {IMAGE!r}: say which are the masks "
            "with --target-column"
        )
    return found[0]


def _count(config: RunConfig, say: Say) -> int:
    """How many classes the masks of both splits have, by the highest."""
    data, columns = config.data, config.model.columns
    splits = [data.eval_split] if data.node_folder else [data.train_split, data.eval_split]
    opened = [Dataset.open(data.data, split, columns) for split in splits]
    rows = sum(dataset.num_rows for dataset in opened)
    if rows > COUNTED_ROWS:
        raise UserError(
            f"{data.data} has {rows:,} masks, more than are looked through for their classes "
            f"({COUNTED_ROWS:,}): say how many there are with --num-classes"
        )
    reading = config.model.pictures.reading
    seen: set[int] = set()
    for dataset in opened:
        seen |= classes_in(dataset, reading)
    check_several(seen, data.data)
    seen -= {NOT_COUNTED}
    count = max(seen) + 1
    if len(seen) < count:
        shown = ", ".join(map(str, sorted(seen)[:SHOWN])) + ", …" * (len(seen) > SHOWN)
        say(f"{count} classes by the highest in the masks, {len(seen)} of which occur: {shown}")
    return count
