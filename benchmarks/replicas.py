"""Claims: what an update costs hardly depends on the number of replicas; where a step computes
for 10 ms and more, the server costs next to nothing.

The first on the MNIST net with 1 to 50 replicas of 5 concurrent steps: updates a second, and
processor time an update over all processes of the run. The second on a convolutional net with 10
replicas, against plain loops of the same net on the same cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.baselines.common import START_DEADLINE_S, Setup
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, decoded_mnist, median
from downpour.benchmarks.processes import measure_in_child
from downpour.cluster.config.run import RunConfig
from downpour.shuffler.processors import processors

SIZES = (1, 2, 5, 10, 50)
CONVNET = "convnet"


def run(settings: Settings, say: Say) -> Report:
    """Measure every number of replicas, and the convolutional net, in every round."""
    sizes, convnet = _wanted(settings)
    rounds: list[dict[str, Any]] = []
    with decoded_mnist(settings.quick) as data:
        for number in range(settings.repeat):
            prefix = f"replicas, round {number + 1} of {settings.repeat}"
            found: dict[str, Any] = {"mnist": {}}
            for size in sizes:
                say(f"{prefix}: MNIST net, {size} x 5")
                found["mnist"][str(size)] = _system(system.mnist(replicas=size), settings)
            if convnet:
                say(f"{prefix}: convolutional net, plain loops")
                found["convnet_plain"] = _plain_convnet(settings, data)
                say(f"{prefix}: convolutional net, 10 x 5")
                found["convnet"] = _system(system.convnet(replicas=10), settings)
            rounds.append(found)
    return _report(sizes, convnet, rounds, settings)


def _wanted(settings: Settings) -> tuple[tuple[int, ...], bool]:
    known = {CONVNET, *map(str, SIZES)}
    unknown = set(settings.only) - known
    if unknown:
        raise BadSettings(
            f"there is no size {min(unknown)!r}: give some of "
            f"{', '.join(map(str, SIZES))}, {CONVNET}"
        )
    if settings.only:
        return tuple(s for s in SIZES if str(s) in settings.only), CONVNET in settings.only
    return ((2,), False) if settings.quick else (SIZES, True)


def _system(config: RunConfig, settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(system.measure(config, settings))


def _plain_convnet(settings: Settings, data: str) -> dict[str, Any]:
    setup = Setup(
        data=data,
        workers=processors(),
        seconds=settings.seconds,
        warmup_s=settings.warmup_s,
        model=CONVNET,
    )
    return measure_in_child(
        "plain loops of the convolutional net",
        "downpour.benchmarks.baselines.plain",
        dataclasses.asdict(setup),
        2 * START_DEADLINE_S + 3 * (settings.seconds + settings.warmup_s),
    )


def _report(
    sizes: tuple[int, ...], convnet: bool, rounds: list[dict[str, Any]], settings: Settings
) -> Report:
    result: dict[str, Any] = {"mnist": {}}
    rows: list[tuple[str, ...]] = []
    for size in sizes:
        found = [r["mnist"][str(size)] for r in rounds]
        rate = median([f["updates_per_s"] for f in found])
        cost = median([f["cpu_ms_per_update"] for f in found])
        stale = median([f["staleness_mean"] for f in found])
        result["mnist"][str(size)] = {
            "updates_per_s": rate,
            "cpu_ms_per_update": cost,
            "staleness_mean": stale,
        }
        rows.append((f"MNIST net, {size} x 5", f"{rate:,.0f}", f"{cost:.2f}", f"{stale:,.0f}", ""))
    notes = [f"medians of {settings.repeat} round(s); ratios are within a round."]
    if {10, 50} <= set(sizes):
        ratio = median(
            [
                r["mnist"]["50"]["cpu_ms_per_update"] / r["mnist"]["10"]["cpu_ms_per_update"]
                for r in rounds
            ]
        )
        result["cost_ratio_10_to_50"] = ratio
        notes.append(f"from 10 to 50 replicas, the cost of an update changes by x{ratio:.2f}.")
    if convnet:
        plain = median([r["convnet_plain"]["updates_per_s"] for r in rounds])
        plain_cost = median([r["convnet_plain"]["cpu_ms_per_update"] for r in rounds])
        rate = median([r["convnet"]["updates_per_s"] for r in rounds])
        cost = median([r["convnet"]["cpu_ms_per_update"] for r in rounds])
        stale = median([r["convnet"]["staleness_mean"] for r in rounds])
        ratio = median(
            [r["convnet"]["updates_per_s"] / r["convnet_plain"]["updates_per_s"] for r in rounds]
        )
        result["convnet"] = {
            "plain_updates_per_s": plain,
            "plain_step_ms": plain_cost,
            "updates_per_s": rate,
            "cpu_ms_per_update": cost,
            "ratio_to_plain": ratio,
        }
        rows += [
            ("convolutional net, plain loops", f"{plain:,.1f}", f"{plain_cost:.2f}", "", "1.00"),
            (
                "convolutional net, 10 x 5",
                f"{rate:,.1f}",
                f"{cost:.2f}",
                f"{stale:,.0f}",
                f"{ratio:.2f}",
            ),
        ]
    return Report(
        name="replicas",
        title="replicas of 5 concurrent steps, mini-batches of 32",
        columns=("", "updates/s", "CPU ms/update", "staleness", "ratio to plain"),
        rows=tuple(rows),
        notes=tuple(notes),
        configuration={
            "sizes": list(sizes),
            "concurrent_steps": 5,
            "plain_processes": processors(),
            "system": system.as_plain(system.mnist(replicas=10)),
            "system_convnet": system.as_plain(system.convnet(replicas=10)),
        },
        result=result,
        rounds=rounds,
    )
