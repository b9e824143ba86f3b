"""`downpour inspect`: what it says is what the dataset holds, and what is wrong is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from downpour.cluster.cli.commands import downpour
from downpour.cluster.errors import run_cli
from tests.helpers import mask_pictures, tables, tiny


@pytest.fixture
def data(tmp_path):
    return tiny.dataset(tmp_path / "data", 300)


def test_as_json(capsys, data, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["--strategy", "none", "--epochs", "4", "--batch-size", "16", "--mirror"]
    assert run_cli(downpour, ["inspect", data, "--json", "--sheet", str(sheet), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    assert (train["rows"], train["shards"]) == (300, 2)
    _, labels = tiny.images(300, 1)
    assert {c["label"]: c["rows"] for c in train["classes"]} == {
        label: int((labels == label).sum()) for label in range(tiny.CLASSES)
    }
    assert train["images"]["height"] == [tiny.SIDE] * 3
    assert found["splits"]["test"]["rows"] == 200
    pairs = found["pairs"]
    assert pairs["repeats"] == pairs["meetings"] * 3 // 4
    assert pairs["times_chance"] > 5
    with Image.open(sheet) as picture:
        side = 9 * tiny.SIDE  # enlarged, so that there is room for the label below
        assert picture.size == (4 * (side + 4), 4 * (side + 14 + 4))
        captions = np.asarray(picture)[side + 4 : side + 18 : 1]
        columns = np.split(captions, 4, axis=1)
        assert all((column < 128).any() for column in columns), "a label each"


def test_for_people(capsys, data):
    assert run_cli(downpour, ["inspect", data, "--epochs", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "train: 300 rows in 2 shard(s)" in shown
    assert "images of 8x8" in shown
    assert "0 of" in shown
    assert "none in 1 epochs" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "dev"], ["'dev'", "test, train"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--sheet", "/no/such/sheet.png", "--epochs", "1"], ["/no/such/sheet.png"]),
    ],
)
def test_what_is_wrong_is_named(capsys, data, arguments, words):
    assert run_cli(downpour, ["inspect", data, *arguments]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line


def test_tables_and_masks_are_not_for_it(capsys, tmp_path):
    for name, made in (("a", tables.dataset), ("b", mask_pictures.dataset)):
        assert run_cli(downpour, ["inspect", made(tmp_path / name)]) == 2
        assert "inspect shows pictures with labels, and" in capsys.readouterr().err
