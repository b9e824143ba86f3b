"""Shards on several nodes' own disks: who has what, and rows that come as from one place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.dataset.manifest import MANIFEST_NAME
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import join
from downpour.shuffler.errors import DatasetError, DecodeError
from downpour.shuffler.holdings import Holding, Inventory, assign, survey
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec
from tests.inprocess.shuffler.ingest.test_ingest import write_idx

DECODER = Decoder(spec=ImageSpec(height=6, width=5, channels=1))
ROWS = 300


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A dataset of six shards."""
    write_idx(tmp_path / "source", "train", ROWS)
    ingest(
        str(tmp_path / "source"),
        str(tmp_path / "whole"),
        IngestConfig(splits=("train",), rows_per_shard=50, row_group_rows=20),
    )
    return tmp_path / "whole"


@pytest.fixture
def nodes(whole: Path) -> dict[str, str]:
    """Three nodes' folders with 3, 2 and 2 of the shards, one of them twice; no manifest."""
    folders = {}
    for node, numbers in {"a": (0, 2, 5), "b": (1, 4), "c": (3, 4)}.items():
        folder = whole.parent / node
        folder.mkdir()
        for number in numbers:
            shutil.copy(whole / f"train-{number:05d}-of-00006.parquet", folder)
        folders[node] = str(folder)
    (whole.parent / "c" / "unfinished.tmp").write_bytes(b"none of ours")
    return folders


def look(whole: Path, nodes: dict[str, str]) -> tuple[Inventory, dict[str, tuple[str, ...]]]:
    inventory = Inventory.read(whole, "train")
    return inventory, {node: survey(uri, inventory, DECODER, 10) for node, uri in nodes.items()}


def test_each_shard_is_one_nodes_business(whole, nodes):
    inventory, held = look(whole, nodes)
    dataset = Dataset.open(whole, "train")
    assert inventory.shard_rows == dataset.shard_rows
    assert inventory.fingerprint == dataset.fingerprint
    assert inventory.class_names == dataset.class_names
    holdings = assign(inventory, held, nodes)
    numbers = {
        node: [inventory.shards.index(shard) for shard in holding.shards]
        for node, holding in holdings.items()
    }
    assert numbers == {"a": [0, 2, 5], "b": [1, 4], "c": [3]}
    assert holdings["a"].firsts == (0, 100, 250)
    shutil.copy(whole / inventory.shards[1].name, nodes["a"])
    del nodes["b"]  # gone: the shard that c has, too, becomes c's
    inventory, held = look(whole, nodes)
    holdings = assign(inventory, held, nodes)
    assert [len(holdings[node].shards) for node in "ac"] == [4, 2]


def test_rows_come_as_from_one_place(whole, nodes):
    """Each window, put together from three shufflers, none of which sees another's shards."""
    inventory, held = look(whole, nodes)
    plan = Plan(num_rows=inventory.num_rows, batch_size=16, window_batches=5, seed=3)
    group = [
        ShufflerActor(
            ShufflerSpec(
                index=i,
                num_shufflers=3,
                data="nowhere",
                plan=plan,
                num_classes=10,
                cache_bytes=1 << 20,
                holding=holding,
            )
        )
        for i, holding in enumerate(assign(inventory, held, nodes).values())
    ]
    alone = RowReader(Dataset.open(whole, "train"))
    seen = np.zeros(ROWS, dtype=int)
    for epoch in range(2):
        for window in plan.window_order(epoch).tolist():
            batches = tuple(plan.window_batches_order(epoch, window).tolist())
            parts = [shuffler.deliver(epoch, batches) for shuffler in group]
            assert all(len(part.positions) == len(part.batch) for part in parts)
            delivery = join(parts)
            rows, lengths = plan.rows_of(epoch, batches)
            assert delivery.batch.equals(alone.take(rows))
            assert (delivery.lengths == lengths).all()
            np.add.at(seen, delivery.rows, 1)
    assert (seen == 2).all()
    alone.close()


def test_a_shard_that_no_node_has_is_named(whole, nodes):
    (Path(nodes["b"]) / "train-00001-of-00006.parquet").unlink()
    inventory, held = look(whole, nodes)
    with pytest.raises(DatasetError) as caught:
        assign(inventory, held, nodes)
    text = str(caught.value)
    assert text.startswith("shard train-00001-of-00006.parquet of 6 is on none of 3 nodes")
    assert nodes["a"] in text
    assert "\n" not in text
    with pytest.raises(DatasetError, match="and 5 more of 6 is on none of 1 nodes"):
        assign(inventory, {"d": ()}, {"d": "/disk"})


def test_a_folder_that_is_not_there_has_none(whole, tmp_path):
    assert survey(str(tmp_path / "nowhere"), Inventory.read(whole, "train"), DECODER, 10) == ()


def test_a_shard_that_changed_on_its_node_is_named(whole, nodes):
    inventory = Inventory.read(whole, "train")
    shard = Path(nodes["b"]) / "train-00004-of-00006.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(DatasetError, match=r"train-00004-of-00006.parquet in .* bytes and should"):
        survey(nodes["b"], inventory, DECODER, 10)
    shard.write_bytes(bytes([content[0]]) + bytes(100) + content[101:])
    with pytest.raises(DatasetError, match="SHA-256"):
        survey(nodes["b"], inventory, DECODER, 10)
    wrong = Decoder(spec=ImageSpec(height=7, width=5, channels=1))
    with pytest.raises(DecodeError, match="6x5 pixels, and 7x5"):
        survey(nodes["a"], inventory, wrong, 10)


def test_a_shard_that_goes_away_after_it_was_assigned_is_named(whole, nodes):
    inventory, held = look(whole, nodes)
    holding = assign(inventory, held, nodes)["a"]
    assert isinstance(holding, Holding)
    (Path(nodes["a"]) / inventory.shards[2].name).unlink()
    with pytest.raises(DatasetError, match=r"train-00002-of-00006\.parquet is missing"):
        holding.open()


def test_without_a_manifest_there_is_no_inventory(whole, nodes):
    with pytest.raises(DatasetError, match=r"has no manifest\.json"):
        Inventory.read(nodes["a"], "train")
    with pytest.raises(DatasetError, match=r"lists no split 'val' \(it lists: train\)"):
        Inventory.read(whole, "val")
    text = json.loads((whole / MANIFEST_NAME).read_text())
    (whole / MANIFEST_NAME).write_text(json.dumps({**text, "format_version": 99}))
    with pytest.raises(DatasetError, match="format_version 99"):
        Inventory.read(whole, "train")
