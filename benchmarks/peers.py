"""Claim: 10 replicas x 5 steps reach 80% and more of plain loops on the same cores.

The MNIST net of section 4.1 with BN, mini-batches of 32, momentum SGD, the same data: plain loops
without any server, which are the limit; this system with everything on; and what else trains a
net with 10 workers. They run one after the other in each round, each in processes of its own with
one torch thread each, and are compared within the round. Medians are over the rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.baselines.common import START_DEADLINE_S, Setup
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, decoded_mnist, median
from downpour.benchmarks.processes import measure_in_child
from downpour.shuffler.processors import processors

LIMIT = "plain"
TITLES = {
    LIMIT: "plain loops, one a core: the limit",
    "plain-fused": "plain loops with torch's fused SGD",
    "downpour": "this system, all on: {workers} x 5",
    "ray": "Ray's asynchronous parameter server, {workers} workers",
    "rpc": "torch RPC parameter server, {workers} trainers",
    "ddp": "torch DDP over gloo, {workers} ranks",
}
"""Who is compared -> what that is."""


def run(settings: Settings, say: Say) -> Report:
    """Measure every peer in every round."""
    unknown = set(settings.only) - set(TITLES)
    if unknown:
        raise BadSettings(f"there is no peer {min(unknown)!r}: give some of {', '.join(TITLES)}")
    names = [n for n in TITLES if n == LIMIT or not settings.only or n in settings.only]
    workers = 2 if settings.quick else 10
    rounds: list[dict[str, Any]] = []
    with decoded_mnist(settings.quick) as data:
        for number in range(settings.repeat):
            found: dict[str, Any] = {}
            for name in names:
                say(f"peers, round {number + 1} of {settings.repeat}: {_title(name, workers)}")
                found[name] = _measure(name, settings, data, workers)
            rounds.append(found)
    return _report(names, rounds, settings, workers)


def _measure(name: str, settings: Settings, data: str, workers: int) -> dict[str, Any]:
    if name == "downpour":
        return dataclasses.asdict(system.measure(system.mnist(replicas=workers), settings))
    setup = Setup(
        data=data,
        workers=processors() if name.startswith(LIMIT) else workers,
        seconds=settings.seconds,
        warmup_s=settings.warmup_s,
        fused=name == "plain-fused",
    )
    module = {"ray": "ray_server", "rpc": "rpc_server", "ddp": "ddp"}.get(name, "plain")
    return measure_in_child(
        f"{name} among the peers",
        f"downpour.benchmarks.baselines.{module}",
        dataclasses.asdict(setup),
        2 * START_DEADLINE_S + 3 * (settings.seconds + settings.warmup_s),
    )


def _report(
    names: list[str], rounds: list[dict[str, Any]], settings: Settings, workers: int
) -> Report:
    def over(value: Callable[[dict[str, Any]], float]) -> float:
        return median([value(found) for found in rounds])

    result: dict[str, Any] = {}
    rows = []
    for name in names:
        rate = over(lambda found, n=name: found[n]["updates_per_s"])  # type: ignore[misc]
        ratio = over(
            lambda found, n=name: found[n]["updates_per_s"] / found[LIMIT]["updates_per_s"]  # type: ignore[misc]
        )
        result[name] = {"updates_per_s": rate, "ratio_to_plain": ratio}
        cost = [found[name].get("cpu_ms_per_update") for found in rounds]
        if None not in cost:
            result[name]["cpu_ms_per_update"] = median(cost)
        shown = f"{median(cost):.2f}" if None not in cost else "–"
        rows.append((_title(name, workers), f"{rate:,.0f}", f"{ratio:.2f}", shown))
    return Report(
        name="peers",
        title="the MNIST net of section 4.1 with BN, mini-batches of 32",
        columns=("", "updates/s", "ratio to the limit", "CPU ms/update"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s); ratios are within a round. DDP is "
            "synchronous: each rank's mini-batch counts as an update.",
        ),
        configuration={
            "workers": workers,
            "concurrent_steps": 5,
            "plain_processes": processors(),
            "setup": dataclasses.asdict(
                Setup(data="", workers=workers, seconds=settings.seconds, warmup_s=0)
            ),
            "system": system.as_plain(system.mnist(replicas=workers)),
        },
        result=result,
        rounds=rounds,
    )


def _title(name: str, workers: int) -> str:
    return TITLES[name].format(workers=workers)
