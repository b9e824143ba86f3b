"""Datasets open or say why not; rows come in the order asked, whatever the cache holds."""

from __future__ import annotations

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shuffler.encoding import EncodedImages, PackedBits, encoding_of, schema_for
from shuffler.errors import DatasetError
from shuffler.reader import RowReader
from shuffler.records import Dataset, split_names

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


def test_prefetched_rows_are_not_read_again(folder):
    reader = RowReader(Dataset.open(folder, "train"))
    reader.prefetch(np.array([0, 8, 19]))
    reader.prefetch(np.array([1, 9]))
    reader._fetching.shutdown(wait=True)
    for shard in folder.iterdir():
        shard.unlink()
    assert reader.take(np.array([2, 7, 18])).column("label").to_pylist() == [2, 1, 0]
    with pytest.raises(DatasetError, match="cannot be read"):
        reader.take(np.array([4]))
    reader.close()
