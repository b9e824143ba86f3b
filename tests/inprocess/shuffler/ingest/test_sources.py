"""ImageNet's layout and CIFAR's binary files, ingested; a full disk; pages that were damaged."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downpour.shuffler.dataset.encoding import class_names_of
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError, IngestError, ShufflerError
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.formats.imagenet import parse_class_list, parse_ground_truth
from downpour.shuffler.ingest.ingest import ingest

ROOT = Path(__file__).parents[4]
SYNSETS = ("n03", "n01", "n02")  # in the order of the list, which is not that of the names
WORDS = ("cat, house cat", "dog", "eel")


def png(value: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(target, format="PNG")
    return target.getvalue()


@pytest.fixture
def imagenet(tmp_path):
    """Nine training images in class folders, and six validation images in one folder."""
    source = tmp_path / "imagenet"
    for number in range(9):
        folder = source / "train" / SYNSETS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{SYNSETS[number % 3]}_{number}.JPEG").write_bytes(png(number))
    (source / "val").mkdir()
    for number in range(1, 7):
        (source / "val" / f"ILSVRC2012_val_0000000{number}.JPEG").write_bytes(png(100 + number))
    lines = [f"{folder} {words}" for folder, words in zip(SYNSETS, WORDS, strict=True)]
    (source / "synset_words.txt").write_text("\n".join(lines) + "\n")
    return source


def contents(folder: Path, split: str) -> tuple[Dataset, dict[str, int]]:
    """Label by path."""
    dataset = Dataset.open(folder, split)
    reader = RowReader(dataset)
    rows = reader.take(np.arange(dataset.num_rows)).to_pylist()
    reader.close()
    assert len({row["image"]["bytes"] for row in rows}) == len(rows)
    return dataset, {row["image"]["path"]: row["label"] for row in rows}


TRUTHS = {
    "ILSVRC2012_validation_ground_truth.txt": "1\n3\n2\n2\n1\n1\n",
    "val.txt": "".join(
        f"ILSVRC2012_val_0000000{n}.JPEG {label}\n"
        for n, label in ((2, 2), (1, 0), (3, 1), (4, 1), (6, 0), (5, 0))
    ),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(
        f"ILSVRC2012_val_0000000{n},{SYNSETS[label]} 1 2 3 4 \n"
        for n, label in ((6, 0), (2, 2), (1, 0), (3, 1), (4, 1), (5, 0))
    ),
}


@pytest.mark.parametrize("truth", sorted(TRUTHS))
def test_imagenets_layout(imagenet, tmp_path, truth):
    (imagenet / truth).write_text(TRUTHS[truth])
    ingest(imagenet, tmp_path / "out")
    dataset, train = contents(tmp_path / "out", "train")
    assert class_names_of(dataset.schema, "") == WORDS
    assert {path: SYNSETS[label] for path, label in train.items()} == {
        path: path.partition("/")[0] for path in train
    }
    assert len(train) == 9
    _, validation = contents(tmp_path / "out", "validation")
    assert [validation[path] for path in sorted(validation)] == [0, 2, 1, 1, 0, 0]


def test_lists_elsewhere_and_splits_chosen(imagenet, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "mine.txt").write_text("n01\nn02\nn03\n")
    (lists / "truth").write_text("1\n2\n3\n1\n2\n3\n")
    config = IngestConfig(
        class_list=str(lists / "mine.txt"), ground_truth=(lists / "truth").as_uri()
    )
    ingest(imagenet, tmp_path / "out", config)
    dataset, train = contents(tmp_path / "out", "train")
    assert dataset.class_names == ("n01", "n02", "n03")
    assert train["n03/n03_0.JPEG"] == 2
    assert sorted(contents(tmp_path / "out", "validation")[1].values()) == [0, 0, 1, 1, 2, 2]
    ingest(imagenet, tmp_path / "train-only", IngestConfig(splits=("train",)))
    assert len(contents(tmp_path / "train-only", "train")[1]) == 9


def test_what_is_missing_or_wrong_is_named(imagenet, tmp_path):
    def fails(message: str, **options: str) -> None:
        with pytest.raises(IngestError, match=message) as error:
            ingest(imagenet, tmp_path / "out", IngestConfig(**options))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    fails(r"val has images without class folders, so their labels are missing; name a ground")
    fails(r"/no/list does not exist", class_list="/no/list")
    truth = imagenet / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n")
    fails(r"2 labels for 6 images")
    truth.write_text("1\n2\n3\n4\n1\n1\n")
    fails(r"label 4, and there are 3 classes")
    (imagenet / "synset_words.txt").write_text("n01 dog\nn02 eel\n")
    truth.write_text("1\n2\n1\n2\n1\n1\n")
    fails(r"train has class 'n03', which the class list does not have")
    (imagenet / "synset_words.txt").unlink()
    fails(r"gives classes by number, and nothing says which number is which; name a class list")
    truth.unlink()
    (imagenet / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n01\n")
    fails(r"no label for ILSVRC2012_val_00000002.JPEG \(5 such\)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg n09\n", "class 'n09' for a.jpg"),
        ("a.jpg\n", "the line 'a.jpg'"),
        ("a.jpg 7\n", "label 7"),
        ("0\n", "label 0"),
    ],
)
def test_lines_of_a_ground_truth(text, message):
    with pytest.raises(IngestError, match=message):
        parse_ground_truth(text, ["a.jpg"], ["n01", "n02"], "truth")


@pytest.mark.parametrize(("text", "message"), [("\n", "no classes"), ("a\nb\na x\n", "a twice")])
def test_class_lists_that_are_none(text, message):
    with pytest.raises(IngestError, match=message):
        parse_class_list(text, "list")


def write_cifar(folder: Path, label_bytes: int) -> dict[bytes, int]:
    """Files of one of the two datasets; the label of each image's planes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = {1: ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")}
    expected = {}
    for name in names.get(label_bytes, ("train.bin", "test.bin")):
        records = b""
        for number in range(7):
            planes = rng.integers(0, 256, 3072, dtype=np.uint8).tobytes()
            records += bytes([9] * (label_bytes - 1) + [number % 3]) + planes
            expected[planes] = number % 3
        (folder / name).write_bytes(records)
    listed = "batches.meta.txt" if label_bytes == 1 else "fine_label_names.txt"
    (folder / listed).write_text("cat\ndog\neel\n\n")
    return expected


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifars_binary_files(tmp_path, label_bytes):
    expected = write_cifar(tmp_path / "bin", label_bytes)
    manifest = ingest(tmp_path / "bin", tmp_path / "out")
    assert manifest.source_format == "cifar"
    assert manifest.class_names == ("cat", "dog", "eel")
    found = {}
    for split, count in (("train", 14 if label_bytes == 1 else 7), ("test", 7)):
        dataset = Dataset.open(tmp_path / "out", split, verify_checksums=True)
        assert dataset.num_rows == count
        reader = RowReader(dataset)
        for row in reader.take(np.arange(count)).to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                found[np.asarray(image).transpose(2, 0, 1).tobytes()] = row["label"]
        reader.close()
    assert found == expected


def test_cifar_files_that_are_cut_short(tmp_path):
    write_cifar(tmp_path / "bin", 1)
    path = tmp_path / "bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IngestError, match=r"data_batch_2.bin has 21411 bytes, which are not"):
        ingest(tmp_path / "bin", tmp_path / "out")
    with pytest.raises(IngestError, match=r"no data_batch_1\.bin"):
        ingest(tmp_path, tmp_path / "out", IngestConfig(format="cifar"))


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """The kernel refuses to let files grow, as it would on a full disk, in the middle of it."""
    write_cifar(tmp_path / "bin", 1)
    out = tmp_path / "out"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(
        [sys.executable, "-m", "downpour", "ingest", str(tmp_path / "bin"), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=small_files,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "File too large" in done.stderr
    assert not out.exists()


def test_a_page_that_was_damaged_is_noticed_when_it_is_read(tmp_path):
    write_cifar(tmp_path / "bin", 1)
    ingest(tmp_path / "bin", tmp_path / "out")
    shard = tmp_path / "out" / "train-00000-of-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for verify in (True, None):  # it is small
        with pytest.raises(DatasetError, match="SHA-256"):
            Dataset.open(tmp_path / "out", "train", verify_checksums=verify)
    reader = RowReader(Dataset.open(tmp_path / "out", "train", verify_checksums=False))
    with pytest.raises(ShufflerError, match=r"row group 0 of .* cannot be read .*copy the shard"):
        reader.take(np.arange(14))
    reader.close()
