"""Datasets open or say why not; rows come in the order asked, whatever the cache holds."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from downpour.shuffler.dataset import row_groups
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.dataset.encoding import EncodedImages, PackedBits, encoding_of, schema_for
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset, split_names
from downpour.shuffler.delivery import Part, join
from downpour.shuffler.errors import DatasetError

NAMES = ("cat", "dog", "eel")


def write_shards(
    folder: Path, split: str = "train", sizes=(7, 5, 8), names=NAMES, group_rows: int = 3
) -> pa.Table:
    """Write shards in the Hugging Face convention; return all their rows."""
    schema = schema_for(EncodedImages(), names)
    start, tables = 0, []
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        images = [{"bytes": f"image {i}".encode() * (i + 1), "path": f"{i}.png"} for i in rows]
        table = pa.table({"image": images, "label": [i % 3 for i in rows]}, schema=schema)
        name = f"{split}-{number:05d}-of-{len(sizes):05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=group_rows)
        tables.append(table)
        start += size
    return pa.concat_tables(tables)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def test_open(folder):
    dataset = Dataset.open(folder, "train")
    assert dataset.num_rows == 20
    assert dataset.class_names == NAMES
    assert dataset.encoding == EncodedImages()
    assert dataset.row_group_starts().tolist() == [0, 3, 6, 7, 10, 12, 15, 18, 20]
    assert dataset.describe_row(12) == "row 12 (row 0 of train-00002-of-00003.parquet)"
    assert Dataset.open(folder.as_uri(), "train").fingerprint == dataset.fingerprint
    assert pickle.loads(pickle.dumps(dataset)) == dataset  # noqa: S301


def test_fingerprint_changes_with_the_rows(folder):
    before = Dataset.open(folder, "train").fingerprint
    write_shards(folder, sizes=(7, 6, 8))
    assert Dataset.open(folder, "train").fingerprint != before


@pytest.mark.parametrize("cache_bytes", [0, 1500, 1 << 20])
def test_take_equals_a_full_read(folder, cache_bytes):
    everything = pq.read_table(folder)
    reader = RowReader(Dataset.open(folder, "train"), cache_bytes=cache_bytes, num_threads=3)
    random = np.random.default_rng(0)
    for rows in (np.arange(20), random.permutation(20), random.integers(0, 20, 50), [19], [4, 4]):
        batch = reader.take(np.asarray(rows))
        expected = everything.take(pa.array(rows))
        assert batch.to_pylist() == expected.to_pylist()
        assert batch.schema.equals(reader.dataset.schema, check_metadata=True)
        assert reader.cached_bytes <= cache_bytes
    assert reader.take(np.array([], dtype=np.int64)).num_rows == 0
    reader.close()


def test_a_dataset_that_fits_is_read_once(folder):
    reader = RowReader(Dataset.open(folder, "train"))
    expected = reader.take(np.arange(20))
    for shard in folder.iterdir():
        shard.unlink()
    assert reader.take(np.arange(20)) == expected
    reader.close()


def test_threads_share_a_reader(folder):
    reader = RowReader(Dataset.open(folder, "train"), cache_bytes=1000)
    expected = pq.read_table(folder).column("label").to_numpy()

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 20, 9)
        return bool((reader.take(rows).column("label").to_numpy() == expected[rows]).all())

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(60)))
    reader.close()


def test_packed_bits(tmp_path):
    encoding = PackedBits(3, 5, "little")
    schema = schema_for(encoding, NAMES)
    table = pa.table({"bits": [b"ab", b"cd"], "label": [0, 2]}, schema=schema)
    pq.write_table(table, tmp_path / "test-0.parquet")
    dataset = Dataset.open(tmp_path, "test")
    assert dataset.encoding == encoding
    assert dataset.class_names == NAMES
    reader = RowReader(dataset)
    batch = reader.take(np.array([1, 0]))
    assert batch.column("bits").to_pylist() == [b"cd", b"ab"]
    assert encoding_of(batch.schema, "batch") == encoding
    reader.close()


def test_columns_in_any_order_and_others_beside(tmp_path):
    image = pa.StructArray.from_arrays([pa.array(["p"]), pa.array([b"x"])], names=["path", "bytes"])
    table = pa.table({"label": pa.array([5]), "width": pa.array([1]), "image": image})
    pq.write_table(table, tmp_path / "train-0.parquet")
    reader = RowReader(Dataset.open(tmp_path, "train"))
    assert reader.take(np.array([0])).to_pylist() == [
        {"image": {"bytes": b"x", "path": "p"}, "label": 5}
    ]
    reader.close()


def rewrite(path: Path, **columns) -> None:
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.drop_columns([name])
        table = table if column is None else table.append_column(name, column)
    pq.write_table(table, path)


def damage_magic(folder: Path) -> None:
    (folder / "train-00001-of-00003.parquet").write_bytes(b"not parquet at all")


def truncate(folder: Path) -> None:
    path = folder / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_label(folder: Path) -> None:
    rewrite(folder / "train-00001-of-00003.parquet", label=None)


def retype_label(folder: Path) -> None:
    rewrite(folder / "train-00001-of-00003.parquet", label=pa.array(["a"] * 5))


def retype_image(folder: Path) -> None:
    rewrite(folder / "train-00000-of-00003.parquet", image=pa.array([b"x"] * 7))


def drop_image(folder: Path) -> None:
    rewrite(folder / "train-00000-of-00003.parquet", image=None)


def mix_encodings(folder: Path) -> None:
    schema = schema_for(PackedBits(2, 4), NAMES)
    table = pa.table({"bits": [b"x"], "label": [0]}, schema=schema)
    pq.write_table(table, folder / "train-00001-of-00003.parquet")


def mix_names(folder: Path) -> None:
    table = pq.read_table(folder / "train-00001-of-00003.parquet")
    schema = schema_for(EncodedImages(), ("x", "y", "z"))
    pq.write_table(
        table.replace_schema_metadata(schema.metadata), folder / "train-00001-of-00003.parquet"
    )


def lose_a_shard(folder: Path) -> None:
    (folder / "train-00001-of-00003.parquet").unlink()


def empty_all(folder: Path) -> None:
    write_shards(folder, sizes=(0, 0, 0))


def bits_without_shape(folder: Path) -> None:
    path = folder / "train-00000-of-00003.parquet"
    rewrite(path, image=None)
    table = pq.read_table(path).append_column("bits", pa.array([b"x"] * 7, pa.binary(1)))
    pq.write_table(table.replace_schema_metadata(None), path)


def break_metadata(folder: Path) -> None:
    path = folder / "train-00000-of-00003.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": "{"}), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_magic, r"train-00001-of-00003.parquet is not readable as Parquet"),
        (truncate, r"train-00001-of-00003.parquet is not readable as Parquet.*copy it again"),
        (drop_label, r"train-00001-of-00003.parquet has no column 'label'"),
        (retype_label, r"train-00001-of-00003.parquet has column 'label' as string, not int64"),
        (retype_image, r"train-00000-of-00003.parquet has column 'image' as binary, not struct"),
        (drop_image, r"train-00000-of-00003.parquet has no column 'image' or 'bits'"),
        (mix_encodings, r"train-00001-of-00003.parquet holds PackedBits.*different folders"),
        (mix_names, r"name their classes differently"),
        (lose_a_shard, r"lacks shard 1 of 3"),
        (empty_all, r"split 'train' of .* has zero rows"),
        (bits_without_shape, r"packed bits but no shape"),
        (break_metadata, r"schema metadata 'huggingface' that is not a JSON object"),
    ],
)
def test_a_damaged_dataset_does_not_open(folder, damage, message):
    damage(folder)
    with pytest.raises(DatasetError, match=message) as error:
        Dataset.open(folder, "train")
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "the message should name a remedy"


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("{folder}/none", "train", "none does not exist"),
        ("{folder}/train-00000-of-00003.parquet", "train", "is not a folder"),
        ("{folder}", "validation", r"no shards of split 'validation' \(it has: train\)"),
        ("nosuch://bucket/x", "train", "cannot be reached"),
    ],
)
def test_what_is_not_there(folder, uri, split, message):
    with pytest.raises(DatasetError, match=message) as error:
        Dataset.open(uri.format(folder=folder), split)
    assert "\n" not in str(error.value)


def test_a_bucket_that_cannot_be_reached(monkeypatch):
    """Nobody listens on the port: it is bound, but not listened on, while the test lasts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        uri = (
            f"s3://bucket/data?endpoint_override=127.0.0.1:{held.getsockname()[1]}"
            "&scheme=http&region=us-east-1"
        )
        with pytest.raises(DatasetError, match=r"s3://bucket/data.*cannot be listed") as error:
            Dataset.open(uri, "train")
    assert "\n" not in str(error.value)
    assert "check access" in str(error.value)


def test_split_names(folder):
    write_shards(folder, "test", sizes=(2,))
    write_shards(folder, "digits-test", sizes=(2,))
    (folder / "README.md").write_text("x")
    assert split_names(folder) == ("digits-test", "test", "train")


def test_label_out_of_range(folder):
    rewrite(folder / "train-00001-of-00003.parquet", label=pa.array([0, 1, 2, 3, 0]))
    dataset = Dataset.open(folder, "train")
    reader = RowReader(dataset)
    reader.take(np.array([0, 9]))
    message = r"label 3 out of range: row 10 \(row 3 of train-00001.*\) must have a label in \[0, 3"
    with pytest.raises(DatasetError, match=message):
        reader.take(np.array([0, 10]))
    RowReader(dataset, num_classes=4).take(np.array([10]))
    with pytest.raises(DatasetError, match=r"in \[0, 2\)"):
        RowReader(dataset, num_classes=2).take(np.array([2]))
    reader.close()


def test_label_missing(folder):
    rewrite(folder / "train-00000-of-00003.parquet", label=pa.array([0, 1, None, 0, 0, 0, 0]))
    reader = RowReader(Dataset.open(folder, "train"))
    with pytest.raises(DatasetError, match=r"row 2 .* has no label"):
        reader.take(np.arange(4))
    reader.close()


def test_rows_out_of_range(folder):
    reader = RowReader(Dataset.open(folder, "train"))
    with pytest.raises(DatasetError, match=r"rows 3\.\.20 are not all in \[0, 20\)"):
        reader.take(np.array([3, 20]))
    reader.close()


def test_a_shard_that_goes_away_is_named(folder):
    reader = RowReader(Dataset.open(folder, "train"), cache_bytes=0)
    (folder / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(DatasetError, match=r"row group 0 of .*train-00002.* cannot be read"):
        reader.take(np.array([0, 12]))
    assert reader.take(np.array([1])).num_rows == 1
    reader.close()


def test_class_names_as_hugging_face_writes_them(tmp_path):
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = schema_for(EncodedImages(), ()).with_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [None], "label": [1]}, schema=schema), sink)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(sink.getvalue())
    assert Dataset.open(tmp_path, "train").class_names == ("a", "b")


def read_ahead(reader: RowReader) -> None:
    """Wait until a reader has read all that it was told to prefetch."""
    give_up_s = time.monotonic() + 30
    while reader._groups._ahead_running:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def test_prefetched_rows_are_not_read_again(folder):
    reader = RowReader(Dataset.open(folder, "train"))
    reader.prefetch(np.array([0, 8]), np.array([1, 19]))
    read_ahead(reader)
    assert not reader.keeps_all
    for shard in folder.iterdir():
        shard.unlink()
    assert reader.take(np.array([2, 7, 18])).column("label").to_pylist() == [2, 1, 0]
    assert (reader.hits, reader.misses) == (3, 3)
    with pytest.raises(DatasetError, match="cannot be read"):
        reader.take(np.array([4]))
    reader.close()


def test_what_is_all_in_memory_needs_no_prefetching(folder):
    reader = RowReader(Dataset.open(folder, "train"))
    reader.take(np.arange(20))
    assert reader.keeps_all
    reader.close()


def test_no_more_is_read_ahead_than_the_cache_holds(folder):
    reader = RowReader(Dataset.open(folder, "train"), cache_bytes=1200)
    for _ in range(3):  # the same windows again and again: nothing is read twice
        reader.prefetch(np.array([1, 4, 8]), np.arange(20))
        read_ahead(reader)
    first = reader._groups._cache.keys()
    assert {0, 1} <= first < set(range(8))
    assert reader.misses == len(first)
    reader.close()


def test_reading_is_bounded_and_a_single_row_group_always_admitted(folder, monkeypatch):
    """However many threads read, those in the middle of it hold so many bytes at most."""
    monkeypatch.setattr(row_groups, "LEAST_READING_BYTES", 1)
    reader = RowReader(Dataset.open(folder, "train"), cache_bytes=0, num_threads=8)
    groups, lock, most = reader._groups, threading.Lock(), []
    conform = row_groups.conform

    def watched(table, schema, *chosen):
        with lock:
            most.append(groups._reading_bytes)
        return conform(table, schema, *chosen)

    monkeypatch.setattr(row_groups, "conform", watched)
    assert len(reader.take(np.arange(20))) == 20
    sizes = [sum(groups._sizes(group)) for group in range(8)]
    assert sorted(most) == sorted(sizes)  # one at a time
    assert groups._reading_bytes == 0
    reader.close()


_MEMORY = """
import json, resource, sys
import pyarrow as pa
from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec

def resident_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10

plan = Plan(num_rows=Dataset.open(sys.argv[1], "train").num_rows, window_batches=8)
shuffler = ShufflerActor(
    ShufflerSpec(data=sys.argv[1], plan=plan, num_classes=10, cache_bytes=int(sys.argv[2]))
)
before, resident, total, largest = resident_bytes(), 0, 0, 0
for epoch in range(2):
    for window in plan.window_order(epoch).tolist():
        part = shuffler.deliver(epoch, tuple(plan.window_batches_order(epoch, window).tolist()))
        resident = max(resident, resident_bytes())
        total, largest = total + part.batch.nbytes, max(largest, part.batch.nbytes)
        del part
pool = pa.default_memory_pool()
print(json.dumps([before, resident, total, largest, pool.max_memory()]))
"""


def test_a_shufflers_memory_is_its_caches_whatever_the_dataset(tmp_path):
    """Two epochs of a dataset eight times the cache, in a process of its own."""
    schema, random = schema_for(EncodedImages(), ()), np.random.default_rng(0)
    path = tmp_path / "train-00000-of-00001.parquet"
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for _ in range(128):  # row groups of 1 MB
            images = [{"bytes": random.bytes(1 << 14), "path": ""} for _ in range(64)]
            writer.write_table(pa.table({"image": images, "label": [0] * 64}, schema=schema))
    cache_bytes = 16 << 20
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path), str(cache_bytes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    before, most_resident, total, largest, most_allocated = json.loads(done.stdout)
    assert total > 2 * 8 * cache_bytes
    # Cached row groups, those being read, and a window: as it came, in one piece, and in order.
    assert most_allocated < cache_bytes + row_groups.LEAST_READING_BYTES + 3 * largest
    # The allocator keeps some more, by threads and time; what was kept of all rows would be beyond.
    assert most_resident < before + path.stat().st_size


def test_rows_that_do_not_fit_one_column_are_refused(tmp_path, monkeypatch):
    reader = RowReader(Dataset.open(BUNDLED_MNIST, "test"))
    rows = np.arange(100)
    whole = reader.take(rows)
    monkeypatch.setattr("downpour.shuffler.dataset.reader.MOST_BYTES", whole.nbytes - 1)
    with pytest.raises(DatasetError, match=r"100 rows .*smaller --window-batches"):
        reader.take(rows)
    half = Part(batch=whole[:50], positions=rows[:50], lengths=np.array([100]), rows=rows)
    other = dataclasses.replace(half, batch=whole[50:], positions=rows[50:])
    with pytest.raises(DatasetError, match="smaller --window-batches"):
        join([half, other])
    reader.close()
