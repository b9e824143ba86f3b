"""Measures throughput across hosts as a share of one host's: `python -m tests.cluster.throughput`.

Four hosts on this machine share its processors: head, partitions, shufflers, replicas. The same
10 x 5 steps run on the replicas' host alone, over shared memory, and across the hosts, over the
network, with links as fast as the kernel moves bytes and limited to 1 Gbit/s each way. What the
figures compare is therefore the way, not the number of processors.

An update is a push, which may be of several mini-batches (`--steps-together`). So mini-batches a
second are counted, too, and shares are of them: they are how fast a run trains.

Writes a record beside those of the other benchmarks; `--models` and `--ways` choose a part, and
`--also` gives every run more arguments of `downpour train`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from downpour.benchmarks.harness import machine, save
from downpour.cluster.config.recipes import find
from downpour.cluster.config.run import RunConfig
from tests.cluster import bed as hosts
from tests.cluster.launched import RUNS, Cluster, about, launched, wait_for

PARTITIONS, SHUFFLERS = 1, 2
START_S = 180.0
"""Seconds until all replicas have to be there."""
SETTLE_S = 6.0
"""Seconds after all replicas are there that are left out."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Where actors are, and what lies between them."""

    arguments: tuple[str, ...] = ()
    mbit_per_s: int | None = None


BASE = "one host"
ON_REPLICAS = ("--partitions-on", "downpour=replicas", "--shufflers-on", "downpour=replicas")
WAYS: Mapping[str, Way] = {
    BASE: Way(arguments=ON_REPLICAS),
    "across hosts": Way(),
    "1 Gbit/s": Way(mbit_per_s=1000),
    "1 Gbit/s, bfloat16": Way(mbit_per_s=1000, arguments=("--wire", "bfloat16")),
    "1 Gbit/s, int8": Way(mbit_per_s=1000, arguments=("--wire", "int8")),
    "1 Gbit/s, int4": Way(mbit_per_s=1000, arguments=("--wire", "int4")),
    "1 Gbit/s, auto": Way(mbit_per_s=1000, arguments=("--wire", "auto")),
}
BATCH_SIZE = find("mnist-bn").data.batch_size
MODELS: Mapping[str, str] = {"mnist": "mnist-bn", "45 MB": f"{__spec__.name}:wide"}
# All replicas at once, evaluated once, and no checkpoint: the training alone.
COMMON = (
    *("--warm-start-epochs", "0", "--ramp-epochs", "0", "--learning-rate", "0.001"),
    *("--evaluate-every-s", "10000", "--checkpoint-every-s", "10000"),
)


def wide() -> RunConfig:
    """The MNIST net with layers as wide as makes 45 MB of parameters."""
    config = find("mnist-bn")
    arguments = {**config.model.arguments, "hidden": [2950, 2950, 100]}
    return replace(config, recipe="wide", model=replace(config.model, arguments=arguments))


class Rates(NamedTuple):
    """How fast a run trains."""

    updates_per_s: float
    batches_per_s: float


def measure(
    cluster: Cluster, model: str, way: Way, name: str, seconds: float, also: Sequence[str] = ()
) -> Rates:
    """Rates of a run, once all of its replicas are there and it has settled."""
    cluster.bed.limit(way.mbit_per_s)
    run = cluster.bed.shared / "runs" / name
    arguments = ("train", MODELS[model], "--runs", RUNS, "--name", name, "--epochs", "75")
    job = cluster.start(*arguments, *COMMON, *way.arguments, *also)
    try:
        try:
            wait_for(lambda: _whole(run), "all replicas", START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {about(run)}") from None
        time.sleep(SETTLE_S + seconds)  # the measurement itself
        lines = _whole(run)
    finally:
        cluster.end(job)
    return rates(lines, seconds)


def rates(lines: Sequence[Mapping[str, Any]], seconds: float) -> Rates:
    """The rates over lines of metrics, from `SETTLE_S` after the first one on."""
    first = next(line for line in lines if line["time"] >= lines[0]["time"] + SETTLE_S)
    last = lines[-1]
    took_s = last["time"] - first["time"]
    assert took_s > seconds / 2, f"too few figures: {lines}"
    return Rates(
        round((last["updates"] - first["updates"]) / took_s, 1),
        round((last["examples"] - first["examples"]) / BATCH_SIZE / took_s, 1),
    )


def _whole(run: Path) -> list[dict[str, Any]]:
    """The metrics' lines since all replicas train."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(t) for t in path.read_text().splitlines() if t.endswith("}")]
    return [
        line for line in lines if line.get("updates", 0) > 0 and line.get("replicas_alive") == 10
    ]


def shares(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Medians by model and way, over that of one host; empty without one."""
    medians = {m: {w: statistics.median(v) for w, v in ways.items()} for m, ways in found.items()}
    return {
        model: {way: round(rate / ways[BASE], 3) for way, rate in ways.items()}
        for model, ways in medians.items()
        if BASE in ways
    }


def main() -> None:
    """Bring the hosts up, measure, and take them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--also", type=shlex.split, default=[], help="of `downpour train`")
    options = parser.parse_args()
    if reason := hosts.missing():
        raise SystemExit(f"cannot be measured here: {reason}")
    before = machine()
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in Rates._fields}
    with launched(4, {"partitions": PARTITIONS, "shufflers": SHUFFLERS}) as cluster:
        for turn in range(options.repeat):
            for model in options.models:
                for number, way in enumerate(options.ways):
                    name = f"{MODELS[model].partition(':')[2] or 'mnist'}-{number}-{turn}"
                    seen = measure(cluster, model, WAYS[way], name, options.seconds, options.also)
                    for key, rate in seen._asdict().items():
                        found[key].setdefault(model, {}).setdefault(way, []).append(rate)
                    sys.stderr.write(
                        f"{model}, {way}: {seen.updates_per_s} updates of "
                        f"{seen.batches_per_s} mini-batches a second\n"
                    )
    result = {**found, "share_of_one_host": shares(found["batches_per_s"])}
    path = save(
        {
            "benchmark": "hosts",
            "title": "training across hosts of their own, all on this machine's processors",
            "command": shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": before,
            "settings": {
                "seconds": options.seconds,
                "repeat": options.repeat,
                "train": [*COMMON, *options.also],
            },
            "configuration": {name: dataclasses.asdict(way) for name, way in WAYS.items()},
            "result": result,
        }
    )
    sys.stdout.write(json.dumps(result, indent=2) + f"\n{path}\n")


if __name__ == "__main__":
    main()
