"""Every kind of source that people have is taken without loss, or refused in a line; nothing is
left out in silence.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.errors import DatasetError, IngestError, ShufflerError
from downpour.shuffler.images.decode import decode_image
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest
from tests.helpers import foreign

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("name", foreign.KINDS)
def test_a_kind_of_source(tmp_path, name):
    kind, told = foreign.KINDS[name], []
    kind.make(tmp_path / "source")
    config = IngestConfig(**kind.options)
    if not kind.rows:
        with pytest.raises(ShufflerError) as caught:
            ingest(tmp_path / "source", tmp_path / "out", config, say=told.append)
        assert kind.says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    manifest = ingest(tmp_path / "source", tmp_path / "out", config, say=told.append)
    assert {split: entry.num_rows for split, entry in manifest.splits.items()} == kind.rows
    assert list(manifest.class_names) == kind.names
    assert any(kind.says in line for line in told) if kind.says else told == []
    for split in kind.rows:
        _check_rows(Dataset.open(tmp_path / "out", split), name)


def _check_rows(dataset: Dataset, name: str) -> None:
    """Each image of a table, an archive or a list shows what its label says."""
    if name == "no images":
        return  # one cannot be decoded
    reader = RowReader(dataset)
    rows = reader.take(np.arange(dataset.num_rows)).to_pylist()
    reader.close()
    for row in rows:
        pixels = decode_image(row["image"]["bytes"], 3)
        shade = (int(np.median(pixels)) - 30) // 70
        label = row["label"]
        if len(dataset.class_names) == 3 or name in ("own columns", "two labels", "jsonl"):
            assert shade == label
        elif name == "labels from 1":
            assert shade == label - 1
        elif name == "label bool":
            assert shade % 2 == label


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    told: list[str] = []
    foreign.KINDS["strangers"].make(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "out", say=told.append)
    for reason in (
        "1 hidden files (such as 'a/.hidden.png')",
        "1 files with the suffix .txt (such as 'a/notes.txt')",
        "1 files without a suffix (such as 'a/plain')",
        "1 images outside of a class folder (such as 'train/loose.png')",
        "1 links that lead nowhere (such as 'b/nowhere.png')",
        "1 images deeper in a class folder (such as 'b/deeper')",
    ):
        assert f"left out: {reason}" in told


def test_the_shares_are_the_same_whatever_the_batches(tmp_path):
    foreign.KINDS["share"].make(tmp_path / "source")
    found = []
    for name, memory in (("a", 64 << 20), ("b", 1 << 20)):
        config = IngestConfig(validation_share=0.25, memory_bytes=memory)
        ingest(tmp_path / "source", tmp_path / name, config)
        parts = {}
        for split in ("train", "validation"):
            reader = RowReader(Dataset.open(tmp_path / name, split))
            rows = reader.take(np.arange(reader.dataset.num_rows)).to_pylist()
            reader.close()
            parts[split] = {row["image"]["path"] for row in rows}
        assert not parts["train"] & parts["validation"]
        assert len(parts["train"] | parts["validation"]) == 8
        found.append(parts)
    assert found[0] == found[1]
    config = IngestConfig(validation_share=0.99)
    with pytest.raises(IngestError, match="leaves none to train on"):
        ingest(tmp_path / "source", tmp_path / "c", config)
    foreign.KINDS["folders"].make(tmp_path / "both")
    with pytest.raises(IngestError, match="no split validation"):
        ingest(tmp_path / "both", tmp_path / "d", IngestConfig(validation_share=0.1))


def test_the_hub_is_answered_in_a_line(tmp_path):
    with pytest.raises(DatasetError, match="hf download --repo-type dataset uoft-cs/cifar10 "):
        ingest("hf://datasets/uoft-cs/cifar10", tmp_path / "out")


def test_a_split_without_labels_that_is_asked_for_is_refused(tmp_path):
    foreign.KINDS["unlabelled -1"].make(tmp_path / "source")
    with pytest.raises(IngestError, match="split 'test' has no row with a label; leave it out"):
        ingest(tmp_path / "source", tmp_path / "out", IngestConfig(splits=("train", "test")))


def test_sigterm_leaves_nothing(tmp_path):
    foreign.KINDS["folders"].make(tmp_path / "source")
    script = (
        "import os, signal, sys\n"
        "from downpour.cluster.cli.commands import downpour\n"
        "from downpour.cluster.errors import run_cli\n"
        "from downpour.shuffler.ingest import ingest as module\n"
        "def end(*_): os.kill(os.getpid(), signal.SIGTERM)\n"
        "module._Counter.add = end\n"
        "sys.exit(run_cli(downpour, ['ingest', *sys.argv[1:]]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(tmp_path / "source"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done
    assert "stopped by SIGTERM; what was written is removed" in done.stderr
    assert not out.exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ingest(tmp_path / "source", out)
