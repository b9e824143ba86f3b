"""Claim: `downpour simulate` predicts mean staleness within 10% and throughput within 15%.

Real runs of the MNIST net with 1, 5 and 10 replicas of 5 concurrent steps, each beside what the
simulation makes of the processor times that the run itself noted, and of those of the run with 10
replicas. The simulation is told what a step and a push cost, and which share of the machine others
had; it is told nothing of rates, staleness or waiting.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.simulate.commands import partitions_of, predict
from downpour.cluster.simulate.likeness import FEWEST_S, LEFT_OUT_S, Likeness, likeness
from downpour.cluster.simulate.options import SimulateConfig
from downpour.shuffler.processors import processors

SIZES, QUICK_SIZES = (1, 5, 10), (2,)


def run(settings: Settings, say: Say) -> Report:
    """Measure and predict every number of replicas in every round."""
    known = set(map(str, SIZES))
    if unknown := set(settings.only) - known:
        raise BadSettings(f"there is no size {min(unknown)!r}: give some of {', '.join(known)}")
    sizes = QUICK_SIZES if settings.quick else SIZES
    if settings.only:
        sizes = tuple(s for s in sizes if str(s) in settings.only)
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        found: dict[str, Likeness] = {}
        for size in sizes:
            say(f"simulate, round {number + 1} of {settings.repeat}: {size} x 5, measured")
            found[str(size)] = _measured(size, settings)
        say(f"simulate, round {number + 1} of {settings.repeat}: predicted")
        last = found[str(sizes[-1])]
        rounds.append(
            {
                size: {
                    "measured": dataclasses.asdict(like),
                    "predicted": _predicted(int(size), like),
                    "predicted_from_the_largest": _predicted(int(size), last),
                }
                for size, like in found.items()
            }
        )
    return _report(sizes, rounds, settings)


def _measured(replicas: int, settings: Settings) -> Likeness:
    """What a run noted of itself."""
    found: list[Likeness] = []

    def look(folder: RunFolder) -> None:
        config = folder.config()
        found.append(likeness(folder, partitions_of(config), processors()))

    long = dataclasses.replace(settings, seconds=max(settings.seconds, FEWEST_S + LEFT_OUT_S))
    system.measure(system.mnist(replicas=replicas), long, look)
    return found[0]


def _predicted(replicas: int, like: Likeness) -> dict[str, Any]:
    forecast = predict(system.mnist(replicas=replicas), SimulateConfig(), like)
    return {
        "updates_per_s": forecast.updates_per_s,
        "staleness_mean": forecast.staleness.summary()["mean"],
        "staleness_p99": forecast.staleness.summary()["p99"],
    }


def _report(sizes: tuple[int, ...], rounds: list[dict[str, Any]], settings: Settings) -> Report:
    result: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for size in map(str, sizes):
        about: dict[str, Any] = {}
        for key in ("updates_per_s", "staleness_mean"):
            about[key] = {
                how: median([r[size][how][key] for r in rounds])
                for how in ("measured", "predicted", "predicted_from_the_largest")
            }
            for how in ("predicted", "predicted_from_the_largest"):
                ratios = [r[size][how][key] / r[size]["measured"][key] for r in rounds]
                about[key][f"{how}_ratio"] = median(ratios)
                about[key][f"{how}_furthest"] = max(ratios, key=lambda ratio: abs(ratio - 1))
        result[size] = about
        rates, stale = about["updates_per_s"], about["staleness_mean"]
        rows.append(
            (
                f"{size} x 5",
                f"{rates['measured']:,.0f}",
                f"{rates['predicted']:,.0f}",
                f"{rates['predicted_ratio']:.2f}",
                f"{stale['measured']:.1f}",
                f"{stale['predicted']:.1f}",
                f"{stale['predicted_ratio']:.2f}",
            )
        )
    return Report(
        name="simulate",
        title="the MNIST net, measured and predicted",
        columns=("", "updates/s", "predicted", "ratio", "staleness", "predicted", "ratio"),
        rows=tuple(rows),
        notes=(f"medians of {settings.repeat} round(s); ratios are within a round.",),
        configuration={
            "processors": processors(),
            "system": system.as_plain(system.mnist(replicas=sizes[-1])),
        },
        result=result,
        rounds=rounds,
    )
