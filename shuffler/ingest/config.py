"""How a dataset is made: the settings of an ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from downpour.shuffler.errors import IngestError
from downpour.shuffler.ingest.formats.source import FORMATS

_MIN_MEMORY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How a dataset is made."""

    format: Literal[
        "auto", "idx", "cifar", "folder", "huggingface", "arrow", "webdataset", "list"
    ] = "auto"
    """What the source is: `idx` pairs, `cifar` binary files, a `folder` of class folders,
    `huggingface` Parquet, `arrow` files of `datasets`, `webdataset` tars, a `list` of paths and
    labels as CSV or JSON lines."""

    splits: tuple[str, ...] = ()
    """Splits to make, by their names in the dataset; none named: all that the source has."""

    split: Mapping[str, str] = field(default_factory=dict)
    """Of Parquet, Arrow, tars and lists: a split and a pattern of its files' paths or names, such
    as train=data/tr*.parquet; may be given several times. None given: by the files' names."""

    image_column: str | None = None
    """Column of the images, or of their paths in a list; of tars the suffix of the image. None: by
    the table's metadata, or its name."""

    label_column: str | None = None
    """Column of the labels; of tars the suffix or the JSON key of the label. None: by the table's
    metadata, or its name."""

    validation_share: float | None = None
    """Share of the training rows, at random, to hold out as split `validation`; 0 holds out none.
    Class folders without train/ need it."""

    class_list: str | None = None
    """Of a folder: file with a class a line, its folder and perhaps words for it, in the order of
    the labels. None: `synset_words.txt` or the like beside train/, otherwise folders by name."""

    ground_truth: str | None = None
    """Of a folder: file with the classes of validation images that are not in class folders.
    None: `ILSVRC2012_validation_ground_truth.txt` or the like beside train/."""

    seed: int = 0
    """Names the one global shuffle."""

    rows_per_shard: int | None = None
    """Most rows of a shard; None: as many as fill 256 MiB. Shards of a split are even."""

    row_group_rows: int | None = None
    """Rows of a row group, the least that is read at once; None: as many as fill 4 MiB. A window
    reads a run of `window_batches` rows in each group of the plan, so much larger ones make a
    dataset that does not fit the reader's cache be read several times over."""

    memory_bytes: int = 512 << 20
    """About the most memory for rows, whatever the size of the dataset."""

    binary_threshold: int | None = None
    """Make images binary (grey value > threshold) and pack them as bits; None keeps the files."""

    scratch: str | None = None
    """Folder on this machine for temporary files, which take as much room as the dataset. None:
    the destination where it is local, else the system's folder for such files."""

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "row_group_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise IngestError(f"{name}={value} is not positive; give 1 or more")
        if self.memory_bytes < _MIN_MEMORY_BYTES:
            raise IngestError(
                f"memory_bytes={self.memory_bytes} is too little; give {_MIN_MEMORY_BYTES} or more"
            )
        if self.format not in ("auto", *FORMATS):
            raise IngestError(
                f"format={self.format!r} is unknown; choose of auto, {', '.join(FORMATS)}"
            )
        share = self.validation_share
        if share is not None and not 0 <= share < 1:
            raise IngestError(f"validation_share={share} is no share; give 0 to less than 1")
        if self.binary_threshold is not None and not 0 <= self.binary_threshold <= 254:
            raise IngestError(
                f"binary_threshold={self.binary_threshold} splits no grey values; give 0 to 254"
            )
