"""The real command on a Ray of two nodes, each with some of the shards in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.dataset.manifest import MANIFEST_NAME
from downpour.shuffler.ingest.ingest import IngestConfig, ingest
from tests.helpers import commands
from tests.ray.test_train import NUM_BATCHES, SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_NODES = """
import json, sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 0, "object_store_memory": 2**28}
cluster = Cluster(initialize_head=True, head_node_args=head)
for name in ("a", "b"):
    labels = {"downpour-node": name}
    cluster.add_node(num_cpus=1, labels=labels, object_store_memory=2**28)
print(json.dumps({"address": cluster.address}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A head and two nodes on this machine: their address, and the process that holds them."""
    with tempfile.TemporaryDirectory(prefix="dp", dir="/tmp") as short:  # Ray's sockets are there
        monkeypatch.setenv("RAY_TMPDIR", short)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        process = subprocess.Popen(
            [sys.executable, "-c", _NODES],
            env=dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            line = next(line for line in process.stdout if line.startswith("{"))
            yield json.loads(line)["address"], process.pid
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(commands.DEADLINE_S)


def shufflers_of(holder: int) -> set[int]:
    """The shufflers' processes among those of the nodes."""
    family = commands.descendants(holder)
    return {pid for pid, command in family.items() if "ShufflerActor" in command}


def test_rows_from_two_nodes_disks(nodes: tuple[str, int], tmp_path: Path) -> None:
    address, holder = nodes
    whole, log, run = tmp_path / "whole", tmp_path / "log", tmp_path / "run"
    ingest(BUNDLED_MNIST, str(whole), IngestConfig(rows_per_shard=15_000))
    shards = sorted(whole.glob("train-*.parquet"))
    assert len(shards) == 4
    for name, mine in (("a", shards[::2]), ("b", shards[1::2])):
        folder = tmp_path / "disks" / name
        folder.mkdir(parents=True)
        for shard in mine:
            shutil.move(shard, folder)
    assert not list(whole.glob("train-*"))
    assert (whole / MANIFEST_NAME).exists()
    common = (
        *("train", "mnist-bn", "--runs", tmp_path, "--address", address, *SMALL),
        *("--data", whole, "--node-folder", tmp_path / "disks" / "{node}"),
    )
    missing = shutil.move(tmp_path / "disks" / "b" / shards[1].name, tmp_path)
    assert commands.run(*common, "--name", "missing", log=tmp_path / "wrong") == 2
    said = (tmp_path / "wrong").read_text().strip().splitlines()[-1]
    assert f"shard {shards[1].name} of 4 is on none of 2 nodes" in said
    assert "Traceback" not in (tmp_path / "wrong").read_text()
    shutil.move(missing, tmp_path / "disks" / "b")

    process = commands.start(
        *(*common, "--name", "run", "--epochs", "5", "--transport", "network"), log=log
    )
    try:
        commands.wait_for(lambda: commands.updates(run) > 0, "updates")
        first = commands.wait_for(lambda: shufflers_of(holder), "shufflers")
        assert len(first) == 2  # one on each node that has shards, whatever --shufflers says
        os.kill(min(first), signal.SIGKILL)
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        commands.end(process)
    check_result(commands.result(run), epochs=5)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("shuffler" in str(event) for event in events)
    assert commands.result(run)["updates"] == 5 * NUM_BATCHES
