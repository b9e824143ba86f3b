"""The real command on a Ray of several nodes, which its partitions are reached over the network.

Actors go where the nodes' labels say; shards are read from the disks of two nodes.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.dataset.manifest import MANIFEST_NAME
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest
from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes, connecting, ray_nodes
from tests.helpers.small_run import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
NODES = (
    {"downpour": "partitions"},
    {"downpour": "shufflers", "downpour-node": "a"},
    {"downpour": "shufflers", "downpour-node": "b"},
    {"downpour": "replicas"},
)
WHERE = {
    "PartitionActor": ["partitions"],
    "ShufflerActor": ["shufflers"],
    "ReplicasActor": ["replicas"],
    "EvaluatorActor": [""],
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head that computes nothing, and four nodes."""
    with ray_nodes(NODES, head_cpus=0) as found, connecting():
        yield found


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """The dataset's folder, without shards; they are in `disks/a` and `disks/b` beside it."""
    whole = tmp_path / "whole"
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
    return whole


def test_a_label_that_no_node_has_is_refused(nodes: RayNodes, tmp_path: Path) -> None:
    status = commands.run(
        *("train", "mnist-bn", "--runs", tmp_path, "--address", nodes.address, *SMALL),
        *("--name", "nowhere", "--replicas-on", "downpour=gpu"),
        log=tmp_path / "wrong",
    )
    assert status == 2
    said = (tmp_path / "wrong").read_text()
    assert "no node for replicas has label downpour=gpu" in said
    assert "downpour=partitions, downpour=replicas, downpour=shufflers" in said
    assert "Traceback" not in said
    assert not (tmp_path / "nowhere").exists()


def test_a_run_on_labelled_nodes_with_rows_from_two_disks(
    nodes: RayNodes, disks: Path, tmp_path: Path
) -> None:
    """Nothing is trained while a shard is missing; a shuffler that is killed costs time only."""
    log, run = tmp_path / "log", tmp_path / "run"
    common = (
        *("train", "mnist-bn", "--runs", tmp_path, "--address", nodes.address, *SMALL),
        *("--data", disks, "--node-folder", tmp_path / "disks" / "{node}"),
    )
    shard = min((tmp_path / "disks" / "b").iterdir())
    missing = shutil.move(shard, tmp_path)
    assert commands.run(*common, "--name", "missing", log=tmp_path / "wrong") == 2
    said = (tmp_path / "wrong").read_text()
    assert f"shard {shard.name} of 4 is on none of 2 nodes" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    shutil.move(missing, shard)

    process = commands.start(
        *(*common, "--name", "run", "--epochs", "4"),
        *("--transport", "network", "--wire", "bfloat16"),
        log=log,
    )
    try:
        commands.wait_for(lambda: commands.updates(run) > 0, "updates")
        commands.wait_for(lambda: len(nodes.roles_of_actors()) == len(WHERE), "all actors")
        assert nodes.roles_of_actors() == WHERE
        first = nodes.processes("ShufflerActor")
        assert len(first) == 2  # one on each node that has shards, whatever --shufflers says
        commands.kill(min(first))
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        commands.end(process)
    check_result(commands.result(run), epochs=4)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("shuffler" in str(event) for event in events)
    output = log.read_text()
    assert "Traceback" not in output
    assert "PRIVATE KEY" not in output
    assert "PRIVATE KEY" not in (run / "config.json").read_text()


@pytest.mark.soak
def test_a_node_with_all_partitions_that_is_killed_costs_no_update(
    nodes: RayNodes, tmp_path: Path
) -> None:
    """Their followers are beside the driver. To be run last: there is no node for partitions then.

    A run without end, stopped once it has gone on; it is the same to the bit when it is replayed.
    """
    log, run = tmp_path / "log", tmp_path / "run"
    process = commands.start(
        *("train", "mnist-bn", "--runs", tmp_path, "--address", nodes.address, *SMALL),
        *("--name", "run", "--epochs", "70", "--partitions", "2", "--hot-standby"),
        *("--record-pushes", "--checkpoint-every-s", "1000", "--no-dashboard"),
        log=log,
    )
    try:
        commands.wait_for(lambda: told(run, "has a follower on") == 2, "both followers")
        before = commands.updates(run)
        commands.wait_for(lambda: commands.updates(run) > before, "updates with followers")
        where = nodes.roles_of_actors()
        assert (where["PartitionActor"], where["FollowerActor"]) == (["partitions"], [""])
        nodes.kill("partitions")
        commands.wait_for(lambda: told(run, "its follower takes its place") == 2, "both promotions")
        before = commands.updates(run)
        commands.wait_for(lambda: commands.updates(run) > before + 50, "updates after that")
        process.send_signal(signal.SIGTERM)
        assert process.wait(commands.DEADLINE_S) == 143, log.read_text()
    finally:
        commands.end(process)
    assert told(run, "mini-batches are run again") == told(run, 'event": "0 mini-batches are')
    assert told(run, "starts again from") == 0
    updates = [m["updates"] for m in commands.metrics(run) if "replicas_alive" in m]
    assert updates == sorted(updates)
    replay = tmp_path / "replay"
    assert commands.run("replay", run, log=replay) == 0, replay.read_text()


def told(run: Path, what: str) -> int:
    """How many lines of `events.jsonl` have this in them."""
    path = run / "events.jsonl"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0
