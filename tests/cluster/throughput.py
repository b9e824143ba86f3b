"""Measures throughput across hosts as a share of one host's: `python -m tests.cluster.throughput`.

Four hosts on this machine share its processors: head, partitions, shufflers, replicas. The same
10 x 5 steps run on the replicas' host alone, over shared memory, and across the hosts, over the
network, with links as fast as the kernel moves bytes and limited to 1 Gbit/s each way. What the
figures compare is therefore the way, not the number of processors. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.recipes import find
from tests.cluster import bed as hosts
from tests.cluster.bed import Bed
from tests.cluster.test_hosts import FILE, PORT, RUNS, Cluster, alive, wait_for

HEAD, PARTITIONS, SHUFFLERS, REPLICAS = range(4)
SETTLE_S = 8.0
"""Seconds after the start of training that are left out."""
ONE_HOST = ("--partitions-on", "downpour=replicas", "--shufflers-on", "downpour=replicas")
HALF = ("--wire-dtype", "bfloat16")
COMMON = ("--warm-start-epochs", "0", "--ramp-epochs", "0", "--learning-rate", "0.001")


def wide() -> RunConfig:
    """The MNIST net with layers as wide as makes 45 MB of parameters."""
    config = find("mnist-bn")
    arguments = {**config.model.arguments, "hidden": [2950, 2950, 100]}
    return replace(config, recipe="wide", model=replace(config.model, arguments=arguments))


def measure(
    cluster: Cluster, name: str, recipe: str, extra: Sequence[str], seconds: float
) -> float:
    """Updates a second of a run, from some time after its start."""
    run = cluster.bed.shared / "runs" / name
    arguments = ("train", recipe, "--runs", RUNS, "--name", name, "--epochs", "75")
    job = cluster.start(*arguments, *COMMON, *extra)
    wait_for(lambda: _metrics(run), "the first updates")
    time.sleep(SETTLE_S + seconds)  # the measurement itself
    lines = _metrics(run)
    first = next(line for line in lines if line["time"] >= lines[0]["time"] + SETTLE_S)
    last = lines[-1]
    cluster.run("ray", "job", "stop", job, check=False)
    wait_for(lambda: cluster.status(job) in ("STOPPED", "FAILED", "SUCCEEDED"), "its end")
    return float((last["updates"] - first["updates"]) / (last["time"] - first["time"]))


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(t) for t in path.read_text().splitlines() if t.endswith("}")]
    return [line for line in lines if line["updates"] > 0 and "updates_per_s" in line]


def main() -> None:
    """Bring the hosts up, measure, and take them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    if reason := hosts.missing():
        raise SystemExit(f"cannot be measured here: {reason}")
    found: dict[str, list[float]] = {}
    with Bed(4) as bed:
        checkout = hosts.checkout(bed.laptop / "checkout")
        cluster = Cluster(bed, checkout)
        cluster.run("ray", "get-auth-token", "--generate")
        template = (checkout / "cluster" / "providers" / FILE).read_text()
        roles = {"partitions": PARTITIONS, "shufflers": SHUFFLERS}
        (checkout / FILE).write_text(bed.cluster_file(template, roles))
        cluster.run("ray", "up", "--yes", FILE)
        tunnel = ("ray", "dashboard", FILE, "--port", str(PORT))
        log = bed.folder / "tunnel.log"
        with hosts.background(*tunnel, cwd=checkout, env=cluster.environment, log=log):
            wait_for(lambda: len(alive(cluster)) == len(bed.hosts), "every host", 180)
            for turn in range(options.repeat):
                for model, recipe in (("mnist", "mnist-bn"), ("45 MB", f"{__spec__.name}:wide")):
                    for way, extra, limit in (
                        ("one host", ONE_HOST, None),
                        ("across hosts", (), None),
                        ("across hosts, 1 Gbit/s", (), 1000),
                        ("across hosts, 1 Gbit/s, bfloat16", HALF, 1000),
                    ):
                        if extra == HALF and model == "mnist":
                            continue  # 0.4 MB: the link is not what it waits for
                        bed.limit(limit)
                        name = (
                            f"{model}-{way}-{turn}".replace(" ", "-")
                            .replace("/", "")
                            .replace(",", "")
                        )
                        rate = measure(cluster, name, recipe, extra, options.seconds)
                        found.setdefault(f"{model}, {way}", []).append(round(rate, 1))
                        sys.stderr.write(f"{model}, {way}: {rate:.1f} updates a second\n")
    medians = {key: statistics.median(values) for key, values in found.items()}
    shares = {
        key: round(rate / medians[f"{key.partition(', ')[0]}, one host"], 3)
        for key, rate in medians.items()
    }
    record = {"command": shlex.join(sys.argv), "updates_per_s": found, "share_of_one_host": shares}
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
