"""The host of all partitions loses its power; their followers are on another host.

The test prints for how long nobody's updates were applied. That is less than a second if nothing
else runs on the machine; all that is asserted is that it is less than what Ray takes to notice.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.cluster.conftest import HEAD, PARTITIONS
from tests.cluster.launched import RUNS, Cluster, about, events, has, updates, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
RAY_NOTICES_S = 20.0
"""A host that says nothing any more, at the earliest."""


def test_a_host_of_all_partitions_that_loses_its_power_costs_no_update(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """No packet says so. All of it is computed again, to the bit, from the record."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "followed"
    job = cluster.start(
        *("train", "mnist-bn", "--runs", RUNS, "--name", "followed", "--epochs", "75"),
        *("--partitions", "2", "--hot-standby", "--record-pushes"),
        *("--checkpoint-every-s", "1000", "--warm-start-epochs", "0"),
        module="tests.helpers.prompt",
    )
    try:
        wait_for(lambda: has(events(run), "has a follower") == 2, f"followers: {about(run)}")
        wait_for(lambda: updates(run) > 300, "the first updates")
        where = cluster.places()
        assert (where["PartitionActor"], where["FollowerActor"]) == ({PARTITIONS}, {HEAD})
        killed_s = points(run)[-1][0]
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
    found = points(run)
    assert all(earlier[1] <= later[1] for earlier, later in itertools.pairwise(found))
    longest, later = sorted(pauses_s(p for p in found if p[0] >= killed_s))[:-3:-1]
    with capsys.disabled():
        sys.stdout.write(f"\nno update for {longest:.2f} s, and later for {later:.2f} s at most\n")
    assert longest < RAY_NOTICES_S, told
    cluster.run("python", "-m", "downpour", "replay", str(run), timeout_s=300)


def points(run: Path) -> list[tuple[float, int]]:
    """Seconds and updates, by reports a tenth of a second apart."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["elapsed_s"], line["updates"]) for line in found if "replicas_alive" in line]


def pauses_s(points: Iterable[tuple[float, int]]) -> list[float]:
    """How long the updates stayed as they were each time."""
    grown = [next(of_count) for _, of_count in itertools.groupby(points, lambda point: point[1])]
    return [later[0] - earlier[0] for earlier, later in itertools.pairwise(grown)]
