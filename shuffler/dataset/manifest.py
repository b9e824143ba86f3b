"""The manifest of a dataset that `ingest` wrote: what every file of it should be.

`manifest.json` is written last, and a marker file stands in the folder until then, so a folder
that was left half written does not open. Datasets from elsewhere have neither. What the rows hold
is `encoding`'s; comparing a folder with its manifest is `records`'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from downpour.shuffler.dataset.encoding import Encoding, encoding_from
from downpour.shuffler.errors import DatasetError

MANIFEST_NAME = "manifest.json"
MARKER_NAME = "INGEST_IN_PROGRESS"
FORMAT_NAME = "downpour-dataset"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One Parquet file."""

    name: str
    """File name within the dataset's folder."""

    num_rows: int
    """Rows of the file."""

    num_bytes: int
    """Size of the file."""

    sha256: str
    """Checksum of the file, in hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEntry:
    """One split of the dataset."""

    num_rows: int
    """Rows of all its shards."""

    shards: tuple[ShardEntry, ...]
    """Its shards in the order of their rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a dataset is made of."""

    encoding: Encoding
    """How rows keep their images."""

    class_names: tuple[str, ...]
    """Names of the labels 0, 1, ...; empty where the source names none."""

    seed: int
    """Seed of the one global shuffle."""

    source_format: str
    """What the dataset was made from: `idx`, `cifar`, `folder` or `huggingface`."""

    binary_threshold: int | None
    """Grey values above it became 1; None where images were kept as they were."""

    splits: Mapping[str, SplitEntry]
    """Splits by name."""

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return (
            json.dumps(
                {
                    "format": FORMAT_NAME,
                    "format_version": FORMAT_VERSION,
                    "source_format": self.source_format,
                    "seed": self.seed,
                    "binary_threshold": self.binary_threshold,
                    "encoding": self.encoding.describe(),
                    "class_names": list(self.class_names),
                    "splits": {name: asdict(split) for name, split in self.splits.items()},
                },
                indent=2,
            )
            + "\n"
        )


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Return the manifest that `to_json` wrote.

    Raises:
        DatasetError: the text is not a manifest, or of a later format; it names `where`.
    """
    try:
        values = json.loads(text)
        if values["format"] != FORMAT_NAME:
            raise KeyError(values["format"])
        if values["format_version"] != FORMAT_VERSION:
            raise DatasetError(
                f"{where} has format_version {values['format_version']}, and this version reads "
                f"{FORMAT_VERSION}; use the version that wrote it, or ingest the dataset again"
            )
        return Manifest(
            encoding=encoding_from(values["encoding"], where),
            class_names=tuple(values["class_names"]),
            seed=values["seed"],
            source_format=values["source_format"],
            binary_threshold=values["binary_threshold"],
            splits={name: _split(entry) for name, entry in values["splits"].items()},
        )
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{where} is not a manifest of this program ({type(error).__name__}: {error}); restore "
            "the file, or ingest the dataset again"
        ) from error


def read_manifest(filesystem: fs.FileSystem, folder: str) -> Manifest | None:
    """Return the manifest of a dataset's folder, None where it has none.

    Raises:
        DatasetError: the manifest cannot be understood, or ingest did not finish here.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    manifest, marker = filesystem.get_file_info([path, f"{folder}/{MARKER_NAME}"])
    if manifest.type == fs.FileType.File:
        with filesystem.open_input_stream(path) as stream:
            return parse_manifest(stream.read(), path)
    if marker.type == fs.FileType.File:
        raise DatasetError(
            f"{folder} is half written: an ingest into it did not finish; remove the folder and "
            "run ingest again"
        )
    return None


def _split(entry: Mapping[str, Any]) -> SplitEntry:
    shards = tuple(ShardEntry(**shard) for shard in entry["shards"])
    return SplitEntry(num_rows=entry["num_rows"], shards=shards)
