"""The host of all partitions loses its power; their followers are on another host."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.cluster.conftest import HEAD, PARTITIONS
from tests.cluster.launched import RUNS, Cluster, about, events, has, updates, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
RAY_NOTICES_S = 20.0
"""A host that says nothing any more, at the earliest."""


def test_a_host_of_all_partitions_that_loses_its_power_costs_no_update(cluster: Cluster) -> None:
    """No packet says so. All of it is computed again, to the bit, from the record."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "followed"
    job = cluster.start(
        *("train", "mnist-bn", "--runs", RUNS, "--name", "followed", "--epochs", "75"),
        *("--partitions", "2", "--hot-standby", "--record-pushes"),
        *("--checkpoint-every-s", "1000", "--warm-start-epochs", "0"),
    )
    try:
        wait_for(lambda: has(events(run), "has a follower") == 2, f"followers: {about(run)}")
        wait_for(lambda: updates(run) > 300, "the first updates")
        where = cluster.places()
        assert (where["PartitionActor"], where["FollowerActor"]) == ({PARTITIONS}, {HEAD})
        bed.kill(bed.hosts[PARTITIONS])
        wait_for(
            lambda: has(events(run), "its follower takes its place") == 2,
            f"both promotions: {about(run)}",
        )
        before = updates(run)
        wait_for(lambda: updates(run) > before + 600, f"updates after that: {about(run)}")
        assert "stopped" in cluster.run("python", "-m", "downpour", "stop", str(run))
        assert wait_for(lambda: cluster.status(job) == "SUCCEEDED", "the job's end")
    finally:
        cluster.end(job)
    told = events(run)
    assert has(told, "starts again from") == 0, told
    # By its kernel's silence; not by Ray, which may take a minute.
    assert has(told, "machine has acknowledged nothing") == 2, told
    assert {line for line in told if "are run again" in line} == {"0 mini-batches are run again"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [(line["time"], line["updates"]) for line in lines if "replicas_alive" in line]
    assert all(earlier[1] <= later[1] for earlier, later in itertools.pairwise(points))
    assert longest_pause_s(points) < RAY_NOTICES_S, told
    cluster.run("python", "-m", "downpour", "replay", str(run), timeout_s=300)


def longest_pause_s(points: list[tuple[float, int]]) -> float:
    """The longest time, by reports a second apart, in which the updates stayed as they were."""
    longest_s, since_s, last = 0.0, points[0][0], points[0][1]
    for time_s, count in points:
        if count > last:
            since_s, last = time_s, count
        longest_s = max(longest_s, time_s - since_s)
    return longest_s
