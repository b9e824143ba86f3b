"""Makers of small sources for `foreign`: pictures with labels, in files of every kind."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS = 24
NAMES = ["ant", "bee", "cat"]
LABELS = [row % 3 for row in range(ROWS)]
BOTH = {"train": ROWS, "test": ROWS}


def picture(label: int, row: int, kind: str = "PNG") -> bytes:
    """An image that shows its label."""
    pixels = np.full((16, 16, 3), 30 + 70 * label, np.uint8)
    pixels[row % 16, :] = 255
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind)
    return target.getvalue()


FILES = [picture(label, row) for row, label in enumerate(LABELS)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = pa.array([{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(FILES)], STRUCT)
NUMBERS = pa.array(LABELS, pa.int64())


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of source."""

    words: str
    """What it is, for the table."""
    make: Callable[[Path], object]
    options: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=lambda: dict(BOTH))
    """Rows of each split of the dataset; none if it is refused."""
    names: list[str] = field(default_factory=lambda: list(NAMES))
    says: str = ""
    """Words of a line that is told, or of the refusal."""


def metadata(image: str = "image", label: str = "label") -> dict[bytes, bytes]:
    features = {image: {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def table(columns: dict[str, pa.Array], meta: dict[bytes, bytes] | None = None) -> pa.Table:
    found = pa.table(columns)
    return found if meta is None else found.replace_schema_metadata(meta)


def parquet(
    columns: dict[str, pa.Array],
    meta: dict[bytes, bytes] | None = None,
    *,
    name: str = "{split}-00000-of-00001.parquet",
    splits: tuple[str, ...] = ("train", "test"),
    test: dict[str, pa.Array] | None = None,
    test_meta: dict[bytes, bytes] | None = None,
) -> Callable[[Path], None]:
    """A maker of one file for each split; `test` has other columns if they are given."""

    def make(folder: Path) -> None:
        for split in splits:
            path = folder / name.format(split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            other = split == "test" and test is not None
            found = table(test or {}, test_meta) if other else table(columns, meta)
            pq.write_table(found, path)

    return make


def labelled(labels: pa.Array, meta: bool = False) -> Callable[[Path], None]:
    return parquet({"image": IMAGES, "label": labels}, metadata() if meta else None)


def shown(images: pa.Array) -> Callable[[Path], None]:
    return parquet({"image": images, "label": NUMBERS}, metadata())


def retyped(data: pa.DataType, path: pa.DataType) -> pa.Array:
    return pa.array(IMAGES.to_pylist(), pa.struct([("bytes", data), ("path", path)]))


def arrow(folder: Path) -> None:
    """What `save_to_disk` writes."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        found = table({"image": IMAGES, "label": NUMBERS}, metadata())
        with (
            pa.OSFile(str(folder / split / "data-00000-of-00001.arrow"), "wb") as target,
            pa.ipc.new_stream(target, found.schema) as writer,
        ):
            writer.write_table(found, max_chunksize=7)
        (folder / split / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def two_folders(folder: Path) -> None:
    for name in ("big", "small"):
        parquet({"image": IMAGES, "label": NUMBERS}, metadata(), splits=("train",))(folder / name)


def tars(
    labels: list[str],
    suffix: str = "cls",
    *,
    ending: str = "tar",
    mode: Any = "w",
    prefix: str = "",
) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        for split in ("train", "test"):
            with tarfile.open(folder / f"x-{split}-000000.{ending}", mode) as archive:
                for row, (data, label) in enumerate(zip(FILES, labels, strict=True)):
                    parts = [("png", data), (suffix, label.encode())]
                    for part, body in parts:
                        info = tarfile.TarInfo(f"{prefix}{row:06d}.{part}")
                        info.size = len(body)
                        archive.addfile(info, io.BytesIO(body))

    return make


def listing(name: str, lines: list[str], *, absent: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "pictures").mkdir(parents=True)
        for row, data in enumerate(FILES):
            if not (absent and row == 5):
                (folder / f"pictures/{row}.png").write_bytes(data)
        for split in ("train", "test"):
            (folder / name.format(split=split)).write_text("\n".join(lines) + "\n")

    return make


def folders(*paths: str, extra: Callable[[Path], None] = lambda _: None) -> Callable[[Path], None]:
    """Folders of four images each; `extra` adds to them."""

    def make(folder: Path) -> None:
        for path in paths:
            (folder / path).mkdir(parents=True)
            for row in range(4):
                data = picture(len(path) % 3, row)
                (folder / path / f"{row}.png").write_bytes(data)
        extra(folder)

    return make


def strangers(folder: Path) -> None:
    (folder / "train/a/.hidden.png").write_bytes(b"x")
    (folder / "train/a/notes.txt").write_text("x")
    (folder / "train/a/plain").write_bytes(FILES[0])
    (folder / "train/loose.png").write_bytes(FILES[0])
    (folder / "train/b/deeper").mkdir()
    (folder / "train/b/deeper/1.png").write_bytes(FILES[0])
    (folder / "train/b/nowhere.png").symlink_to("/nowhere.png")


def other_suffixes(folder: Path) -> None:
    kinds = {".jfif": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".tga": "TGA", ".pgm": "PPM"}
    for suffix, kind in kinds.items():
        (folder / f"train/a/x{suffix}").write_bytes(picture(0, 0, kind))


def ground_truth(folder: Path) -> None:
    (folder / "val/images").mkdir(parents=True)
    (folder / "val/images/v0.png").write_bytes(FILES[0])
    (folder / "val/val_annotations.txt").write_text("v0.png\tn1\t0\t0\t9\t9\n")


def packed(folder: Path) -> None:
    folder.mkdir()
    (folder / "train.zip").write_bytes(b"PK\3\4")


def gzipped(folder: Path) -> None:
    folder.mkdir()
    (folder / "train.parquet.gz").write_bytes(b"\x1f\x8b" + bytes(40))


def twins(folder: Path) -> None:
    (folder / "train/cafe\u0301").mkdir()
    (folder / "train/cafe\u0301/1.png").write_bytes(FILES[0])


def empty_and_html(folder: Path) -> None:
    (folder / "train/a/empty.png").write_bytes(b"")
    (folder / "train/a/page.jpg").write_text("<!doctype html>")


def unlabelled_test(folder: Path) -> None:
    (folder / "test").mkdir()
    (folder / "test/1.png").write_bytes(FILES[0])


CSV = ["path,label", *(f"pictures/{row}.png,{NAMES[label]}" for row, label in enumerate(LABELS))]
JSONL = [
    json.dumps({"file_name": f"pictures/{row}.png", "label": label})
    for row, label in enumerate(LABELS)
]
WORDS = [NAMES[label] for label in LABELS]
SPLIT_CSV = [f"{line},{'train' if n % 3 else 'valid'}" for n, line in enumerate(CSV[1:])]
SPLITS = {"train": 8, "validation": 8}
NONE: dict[str, int] = {}
PLAIN: list[str] = []
