"""Claim: what a follower costs in updates a second, beside its partition and over the network.

The MNIST net with 10 x 5 steps, four ways: through shared memory without and with `--hot-standby`,
and over an encrypted network (`--transport network`, loopback) without and with it. Over the
network a follower is sent every gradient, and a push is answered once it has all of it, as it would
be on another machine. On one machine the follower also takes processor time from the replicas, and
what a cable adds in latency is not here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.cluster.config.run import RunConfig
from downpour.paramserver.transport.names import TransportName

WAYS: dict[str, tuple[TransportName, bool]] = {
    "shared": ("auto", False),
    "shared, followed": ("auto", True),
    "network": ("network", False),
    "network, followed": ("network", True),
}
"""Way -> transport, and whether there is a follower."""


def run(settings: Settings, say: Say) -> Report:
    """Measure each way in every round."""
    if unknown := set(settings.only) - WAYS.keys():
        raise BadSettings(f"--only {min(unknown)}: give one of {', '.join(WAYS)}")
    wanted = [way for way in WAYS if way in (settings.only or WAYS)]
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        found = {}
        for way in wanted:
            say(f"standby, round {number + 1} of {settings.repeat}: {way}")
            found[way] = dataclasses.asdict(system.measure(_config(way, settings), settings))
        rounds.append(found)
    return report(rounds, settings)


def _config(way: str, settings: Settings) -> RunConfig:
    transport, followed = WAYS[way]
    config = system.mnist(replicas=4 if settings.quick else 10)
    network = dataclasses.replace(config.server.network, transport=transport)
    server = dataclasses.replace(config.server, hot_standby=followed, network=network)
    # No start beside what is measured.
    replicas = dataclasses.replace(config.replicas, spares="none")
    return dataclasses.replace(config, server=server, replicas=replicas)


def report(rounds: list[dict[str, Any]], settings: Settings) -> Report:
    """Return the medians, and each followed way's share of the rate without a follower."""
    result: dict[str, Any] = {}
    for way in rounds[0]:
        result[way] = {
            key: median([found[way][key] for found in rounds])
            for key in ("updates_per_s", "cpu_ms_per_update", "staleness_mean")
        }
    for way, about in result.items():
        alone = result.get(way.removesuffix(", followed"))
        if alone is not None:
            about["share"] = about["updates_per_s"] / alone["updates_per_s"]
    return Report(
        name="standby",
        title="what a follower costs, the MNIST net",
        columns=("", "updates/s", "of without", "CPU ms/update", "staleness"),
        rows=tuple(
            (
                way,
                f"{about['updates_per_s']:,.0f}",
                f"{about['share']:.2f}" if "share" in about else "",
                f"{about['cpu_ms_per_update']:.2f}",
                f"{about['staleness_mean']:.1f}",
            )
            for way, about in result.items()
        ),
        notes=(f"medians of {len(rounds)} round(s) of {settings.seconds:g} s each.",),
        configuration={
            "ways": {way: list(about) for way, about in WAYS.items()},
            "system": system.as_plain(_config(next(iter(rounds[0])), settings)),
        },
        result=result,
        rounds=rounds,
    )
