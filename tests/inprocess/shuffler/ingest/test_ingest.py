"""Ingest keeps every row, changes their order, stays in its memory, and never half succeeds."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from downpour.shuffler.dataset.encoding import EncodedImages, PackedBits, schema_for
from downpour.shuffler.dataset.manifest import MANIFEST_NAME, MARKER_NAME, parse_manifest
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError, DecodeError, IngestError, ShufflerError
from downpour.shuffler.images.decode import decode
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest

ROOT = Path(__file__).parents[4]


def digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct grey images [n, 6, 5] and labels of 0 to 9."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 5), dtype=np.uint8)
    return pixels, (np.arange(count) % 10).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    return target.getvalue()


def write_idx(folder: Path, prefix: str, count: int, gz: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    pixels, labels = digits(count)
    images = struct.pack(">4I", 0x803, count, 6, 5) + pixels.tobytes()
    for kind, data in (
        ("images-idx3", images),
        ("labels-idx1", struct.pack(">2I", 0x801, count) + labels.tobytes()),
    ):
        name = f"{prefix}-{kind}-ubyte"
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


def write_parquet(folder: Path, split: str, count: int, names=tuple("0123456789")) -> None:
    folder.mkdir(exist_ok=True)
    pixels, labels = digits(count)
    images = [{"bytes": png(image), "path": None} for image in pixels]
    table = pa.table({"image": images, "label": labels}, schema=schema_for(EncodedImages(), names))
    half = count // 2
    pq.write_table(table[:half], folder / f"{split}-00000-of-00002.parquet", row_group_size=50)
    pq.write_table(table[half:], folder / f"{split}-00001-of-00002.parquet", row_group_size=50)


def write_folders(folder: Path, split: str, count: int) -> None:
    pixels, labels = digits(count)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        target = folder / split / f"n{label:08d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number}.JPEG").write_bytes(png(image))  # as ImageNet has a PNG or two


def read_back(folder: Path, split: str, threshold: int | None = None) -> list[tuple[bytes, int]]:
    """Return each row's pixels and label, in the dataset's order."""
    dataset = Dataset.open(folder, split, verify_checksums=True)
    reader = RowReader(dataset)
    batch = reader.take(np.arange(dataset.num_rows))
    reader.close()
    spec = ImageSpec(height=6, width=5, channels=1, binary_threshold=threshold)
    inputs, labels = decode(batch, spec)
    scale = 255 if threshold is None else 1
    pixels = np.round(inputs * scale).astype(np.uint8)
    return [(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)]


def expected_rows(count: int, threshold: int | None = None) -> list[tuple[bytes, int]]:
    pixels, labels = digits(count)
    if threshold is not None:
        pixels = (pixels > threshold).astype(np.uint8)
    return [(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)]


@pytest.mark.parametrize("threshold", [None, 127])
@pytest.mark.parametrize("format", ["idx", "idx.gz", "folder", "huggingface"])
def test_round_trip(tmp_path, format, threshold):
    source, out = tmp_path / "source", tmp_path / "out"
    if format == "folder":
        write_folders(source, "train", 230)
        write_folders(source, "val", 40)
    elif format == "huggingface":
        write_parquet(source, "train", 230)
        write_parquet(source, "validation", 40)
    else:
        write_idx(source, "train", 230, gz=format == "idx.gz")
        write_idx(source, "t10k", 40, gz=format == "idx.gz")
    second = "test" if format.startswith("idx") else "validation"
    config = IngestConfig(rows_per_shard=100, row_group_rows=30, binary_threshold=threshold)
    manifest = ingest(source, out, config)
    assert manifest.source_format == format.removesuffix(".gz")
    assert manifest.encoding == (EncodedImages() if threshold is None else PackedBits(6, 5))
    assert [split.num_rows for split in manifest.splits.values()] == (
        [40, 230] if second == "test" else [230, 40]
    )
    for split, count in (("train", 230), (second, 40)):
        found, expected = read_back(out, split, threshold), expected_rows(count, threshold)
        assert Counter(found) == Counter(expected)
        assert found != expected
        assert sum(a == b for a, b in zip(found, expected, strict=True)) < count / 10
    dataset = Dataset.open(out, "train")
    assert [shard.num_rows for shard in dataset.shards] == [76, 77, 77]
    assert dataset.shards[0].row_group_rows == (30, 30, 16)
    assert len(dataset.class_names) == 10
    assert parse_manifest((out / MANIFEST_NAME).read_text(), "manifest") == manifest
    assert sorted(path.name for path in out.iterdir() if "parquet" not in path.name) == [
        MANIFEST_NAME
    ]


def test_folders_keep_paths_and_sort_classes(tmp_path):
    write_folders(tmp_path / "source", "train", 25)
    (tmp_path / "source/train/n00000003/notes.txt").write_text("not an image")
    ingest(tmp_path / "source", tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out", "train")
    assert dataset.class_names == tuple(f"n{i:08d}" for i in range(10))
    reader = RowReader(dataset)
    rows = reader.take(np.arange(25)).to_pylist()
    reader.close()
    assert all(row["image"]["path"].startswith(f"n{row['label']:08d}/") for row in rows)


def test_the_order_is_the_seeds(tmp_path):
    write_idx(tmp_path / "source", "train", 100)
    for name, seed, memory in (("a", 1, 64), ("b", 1, 1), ("c", 2, 64)):
        config = IngestConfig(seed=seed, memory_bytes=memory << 20)
        ingest(tmp_path / "source", tmp_path / name, config)
    orders = [read_back(tmp_path / name, "train") for name in "abc"]
    assert orders[0] == orders[1] != orders[2]


def test_memory_is_bounded(tmp_path):
    """8 MB of rows through 2 MB; Arrow's allocations are counted by a pool of their own."""
    source, memory = tmp_path / "source", 2 << 20
    source.mkdir()
    schema = schema_for(EncodedImages(), ("a", "b"))
    with pq.ParquetWriter(source / "train-00000-of-00001.parquet", schema) as writer:
        for start in range(0, 2000, 100):
            images = [
                {"bytes": os.urandom(4000), "path": str(i)} for i in range(start, start + 100)
            ]
            labels = [i % 2 for i in range(100)]
            writer.write_table(pa.table({"image": images, "label": labels}, schema=schema))
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        config = IngestConfig(memory_bytes=memory, row_group_rows=64)
        ingest(source, tmp_path / "out", config)
        peak = pool.max_memory()
    finally:
        pa.set_memory_pool(before)
    assert peak < memory
    (shard,) = (tmp_path / "out").glob("*.parquet")
    paths = pq.read_table(shard).column("image").combine_chunks().field("path")
    assert sorted(paths.to_pylist(), key=int) == [str(i) for i in range(2000)]


def test_progress_reaches_the_total(tmp_path):
    write_idx(tmp_path / "source", "train", 100)
    calls: list[tuple[int, int]] = []
    ingest(tmp_path / "source", tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1] == (100, 100)
    assert calls == sorted(calls)
    assert calls[0] == (50, 100)


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_removes_what_was_written(tmp_path, existed, error):
    write_idx(tmp_path / "source", "t10k", 50)
    write_idx(tmp_path / "source", "train", 50)
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def fail(done: int, total: int) -> None:
        if done > 60:  # the first split's shards are whole by then
            assert any(path.suffix == ".parquet" for path in out.iterdir())
            raise error

    with pytest.raises(error):
        ingest(tmp_path / "source", out, progress=fail)
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())


def test_a_killed_ingest_leaves_nothing_that_opens(tmp_path):
    write_idx(tmp_path / "source", "t10k", 50)
    write_idx(tmp_path / "source", "train", 50)
    script = (
        "import os, signal, sys\n"
        "from downpour.shuffler.ingest.ingest import ingest\n"
        "def die(done, total):\n"
        "    if done > 60: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ingest(sys.argv[1], sys.argv[2], progress=die)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(tmp_path / "source"), str(out)]
    killed = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (out / "test-00000-of-00001.parquet").exists()
    with pytest.raises(DatasetError, match=r"half written.*remove the folder"):
        Dataset.open(out, "test")
    with pytest.raises(IngestError, match="is not empty"):
        ingest(tmp_path / "source", out)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(path: Path, **changes) -> None:
    manifest = path.parent / MANIFEST_NAME
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def count_wrong(path: Path) -> None:
    manifest = path.parent / MANIFEST_NAME
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["shards"][0]["num_rows"] += 1
    manifest.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes and should have"),
        (flip, "SHA-256 .* damaged"),
        (count_wrong, "rows and should have 31"),
        (lambda path: edit_manifest(path, splits={}), "manifest does not list"),
        (lambda path: edit_manifest(path, format_version=9), "format_version 9"),
        (lambda path: edit_manifest(path, format="x"), "not a manifest of this program"),
        (lambda path: edit_manifest(path, encoding="x"), "encoding as 'x'"),
        (lambda path: (path.parent / MANIFEST_NAME).write_text("{"), "not a manifest"),
        (lambda path: path.rename(path.parent / "train-x.parquet"), "train-0.* is missing"),
    ],
)
def test_the_manifest_is_held_against_the_files(tmp_path, damage, message):
    write_idx(tmp_path / "source", "train", 30)
    ingest(tmp_path / "source", tmp_path / "out")
    damage(tmp_path / "out/train-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match=message) as error:
        Dataset.open(tmp_path / "out", "train", verify_checksums=True)
    assert "\n" not in str(error.value)


def no_labels(source: Path) -> None:
    (source / "train-labels-idx1-ubyte").unlink()


def bad_magic(source: Path) -> None:
    path = source / "train-images-idx3-ubyte"
    path.write_bytes(b"\x00\x00\x0d\x03" + path.read_bytes()[4:])


def cut_images(source: Path) -> None:
    cut(source / "train-images-idx3-ubyte")


def fewer_labels(source: Path) -> None:
    (source / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 2) + b"\0\0")


def not_gzip(source: Path) -> None:
    path = source / "train-images-idx3-ubyte"
    path.rename(path.with_name(path.name + ".gz"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_labels, "has no labels; add train-labels-idx1-ubyte"),
        (bad_magic, "begins with 0x00000d03, not 0x00000803"),
        (cut_images, "ends 9 bytes before its header says"),
        (fewer_labels, "30 images and train-labels-idx1-ubyte 2 labels"),
        (not_gzip, r"ubyte.gz cannot be read"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage, message):
    write_idx(tmp_path / "source", "train", 30)
    damage(tmp_path / "source")
    with pytest.raises(IngestError, match=message) as error:
        ingest(tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folder_errors(tmp_path):
    write_folders(tmp_path, "train", 10)
    (tmp_path / "val/zebra").mkdir(parents=True)
    with pytest.raises(IngestError, match="has class 'zebra', which train/ does not have"):
        ingest(tmp_path, tmp_path / "out")
    (tmp_path / "val/zebra").rename(tmp_path / "val/n00000001")
    with pytest.raises(IngestError, match="n00000001 holds no image"):
        ingest(tmp_path, tmp_path / "out")


def test_parquet_errors(tmp_path):
    write_parquet(tmp_path / "source", "train", 20, names=("a", "b", "c"))
    with pytest.raises(IngestError, match=r"row 3 of split 'train' .* label 3, not one of the 3"):
        ingest(tmp_path / "source", tmp_path / "out")
    bits = tmp_path / "bits"
    write_idx(tmp_path / "idx", "train", 20)
    ingest(tmp_path / "idx", bits, IngestConfig(binary_threshold=9))
    with pytest.raises(IngestError, match="packed bits already"):
        ingest(bits, tmp_path / "out", IngestConfig(binary_threshold=9))


def test_an_image_that_cannot_become_binary_is_named(tmp_path):
    write_folders(tmp_path, "train", 12)
    (tmp_path / "train/n00000004/4.JPEG").write_bytes(b"x")
    with pytest.raises(DecodeError, match=r"n00000004/4.JPEG, label 4\) cannot be decoded"):
        ingest(tmp_path, tmp_path / "out", IngestConfig(binary_threshold=127))
    assert not (tmp_path / "out").exists()


def test_source_and_destination_errors(tmp_path):
    write_idx(tmp_path / "source", "train", 10)
    out = tmp_path / "out"
    cases = [
        (tmp_path / "none", out, None, "is not a folder"),
        (tmp_path, out, None, "holds no IDX or CIFAR files, .* and no folder train/"),
        (tmp_path / "source", tmp_path / "source", None, "is not empty"),
        (tmp_path / "source", tmp_path / "source/train-labels-idx1-ubyte", None, "is a file"),
        (tmp_path / "source", out, IngestConfig(splits=("dev",)), r"no split 'dev' \(it has train"),
        (tmp_path / "source", out, IngestConfig(format="folder"), "no folder train/"),
        (tmp_path / "source", out, IngestConfig(format="huggingface"), "no file that ends with"),
        (tmp_path / "source", out, IngestConfig(scratch=str(out / "x")), "scratch folder"),
    ]
    for source, destination, config, message in cases:
        with pytest.raises(ShufflerError, match=message) as error:
            ingest(source, destination, config)
        assert "\n" not in str(error.value)
        assert not out.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"rows_per_shard": 0},
        {"row_group_rows": -1},
        {"memory_bytes": 5},
        {"format": "zip"},
        {"binary_threshold": 255},
    ],
)
def test_config_errors_name_the_value(fields):
    (name, value) = next(iter(fields.items()))
    with pytest.raises(IngestError, match=f"{name}={value!r}"):
        IngestConfig(**fields)


def test_the_bundled_digits():
    """What `data/make_binary_mnist.py` made is whole, and is what section 4.1 needs."""
    folder = ROOT / "data/mnist-binary"
    for split, count in (("train", 60_000), ("test", 10_000)):
        dataset = Dataset.open(folder, split, verify_checksums=True)
        assert dataset.num_rows == count
        assert dataset.encoding == PackedBits(28, 28)
        assert dataset.class_names == tuple("0123456789")
    reader = RowReader(Dataset.open(folder, "test"))
    batch = reader.take(np.arange(10_000))
    reader.close()
    spec = ImageSpec(height=28, width=28, channels=1, binary_threshold=127, flatten=True)
    inputs, labels = decode(batch, spec)
    per_class = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels).tolist() == per_class
    assert 0.12 < inputs.mean() < 0.14
    assert not (folder / MARKER_NAME).exists()
