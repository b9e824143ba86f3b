"""The host of all partitions says that it leaves, and then loses its power."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import HEAD, PARTITIONS
from tests.cluster.launched import RUNS, Cluster, about, events, has, updates, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
NOTICE_S = 100


def test_partitions_move_from_a_host_that_is_to_leave_and_nothing_is_run_again(
    cluster: Cluster,
) -> None:
    """No follower was there before. All of it is computed again, to the bit, from the record."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "left"
    job = cluster.start(
        *("train", "mnist-bn", "--runs", RUNS, "--name", "left", "--epochs", "75"),
        *("--partitions", "2", "--record-pushes"),
        *("--checkpoint-every-s", "1000", "--warm-start-epochs", "0"),
    )
    try:
        wait_for(lambda: updates(run) > 300, "the first updates")
        assert cluster.places()["PartitionActor"] == {PARTITIONS}
        drain(cluster, PARTITIONS)
        wait_for(lambda: has(events(run), "has moved, with all that it had") == 2, about(run))
        bed.kill(bed.hosts[PARTITIONS])
        before = updates(run)
        wait_for(lambda: updates(run) > before + 600, f"updates after that: {about(run)}")
        assert "stopped" in cluster.run("python", "-m", "downpour", "stop", str(run))
        assert wait_for(lambda: cluster.status(job) == "SUCCEEDED", "the job's end")
    finally:
        cluster.end(job)
    told = events(run)
    assert has(told, "moves: its node is to leave") == 2, told
    assert has(told, "replaced") == has(told, "starts again from") == 0, told
    assert {line for line in told if "are run again" in line} == {"0 mini-batches are run again"}
    cluster.run("python", "-m", "downpour", "replay", str(run), timeout_s=300)


def drain(cluster: Cluster, index: int) -> None:
    """Tell Ray that a host is to leave, as a cloud does of a spot machine."""
    bed = cluster.bed
    address = bed.hosts[index].address
    (node,) = [node["node_id"] for node in cluster.nodes() if node["node_ip"] == address]
    bed.ssh(
        bed.hosts[HEAD],
        *("RAY_AUTH_MODE=token", "~/downpour/env/bin/ray", "drain-node"),
        *("--address", f"{bed.hosts[HEAD].address}:6379", "--node-id", node),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"),
        *("--deadline-remaining-seconds", str(NOTICE_S)),
    )
