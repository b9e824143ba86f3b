"""The real command on a Ray of several nodes: actors go where the nodes' labels say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.ray.test_train import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
ROLES = ("partitions", "shufflers", "replicas")

_NODES = """
import json, sys, time
from ray.cluster_utils import Cluster
head = {"num_cpus": 0, "object_store_memory": 2**28}
cluster = Cluster(initialize_head=True, head_node_args=head)
for role in sys.argv[1].split(","):
    cluster.add_node(num_cpus=1, labels={"downpour": role}, object_store_memory=2**28)
print(json.dumps({"address": cluster.address}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Four nodes on this machine, three of them labelled."""
    with tempfile.TemporaryDirectory(prefix="dp", dir="/tmp") as short:  # Ray's sockets are there
        monkeypatch.setenv("RAY_TMPDIR", short)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        process = subprocess.Popen(
            [sys.executable, "-c", _NODES, ",".join(ROLES)],
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
            yield json.loads(line)["address"]
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(commands.DEADLINE_S)


def test_actors_go_where_the_labels_say(address: str, tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "a"
    common = ("train", "mnist-bn", "--runs", tmp_path, "--address", address, *SMALL)
    status = commands.run(
        *(*common, "--name", "nowhere", "--replicas-on", "downpour=gpu"), log=tmp_path / "wrong"
    )
    assert status == 2
    said = (tmp_path / "wrong").read_text()
    assert "no node for replicas has label downpour=gpu" in said
    assert "downpour=partitions, downpour=replicas, downpour=shufflers" in said
    assert "Traceback" not in said
    assert not (tmp_path / "nowhere").exists()
    process = commands.start(
        *(*common, "--name", "a", "--epochs", "3", "--transport", "network"), log=log
    )
    try:
        commands.wait_for(lambda: commands.updates(run) > 0, "updates")
        listed = subprocess.run(
            [sys.executable, "-c", _WHERE, address], capture_output=True, text=True, check=True
        )
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        commands.end(process)
    check_result(commands.result(run), epochs=3)
    assert json.loads(listed.stdout.splitlines()[-1]) == {
        "PartitionActor": ["partitions"],
        "ShufflerActor": ["shufflers"],
        "ReplicasActor": ["replicas"],
        "EvaluatorActor": [""],
    }


_WHERE = """
import json, sys, time
import ray
from ray.util.state import list_actors
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
labels = {node["NodeID"]: node["Labels"].get("downpour", "") for node in ray.nodes()}
give_up = time.monotonic() + 60
while time.monotonic() < give_up:
    found = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True):
        found.setdefault(actor.class_name, set()).add(labels[actor.node_id])
    if len(found) == 4:
        break
print(json.dumps({name: sorted(where) for name, where in found.items()}))
"""
