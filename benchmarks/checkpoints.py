"""Claim: a checkpoint of a 45 MB model every 10 s costs less than 5% of the throughput.

The net of section 4.1 with wide layers, 11.3 million parameters and as many of momentum, on two
partitions; the same run with and without checkpoints in each round, one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.cluster.config.run import RunConfig

EVERY_S = 10.0
NEVER_S = 3600.0
HIDDEN, QUICK_HIDDEN = [2100, 2100, 2500], [200, 200, 200]


def wide(hidden: list[int], every_s: float) -> RunConfig:
    """Two replicas of two steps: slots of 45 MB are what memory allows on a small machine."""
    config = system.mnist(replicas=2, concurrent_steps=2)
    return dataclasses.replace(
        config,
        recipe="bench-checkpoints",
        model=dataclasses.replace(
            config.model, arguments={**config.model.arguments, "hidden": hidden}
        ),
        policy=dataclasses.replace(
            config.policy, checkpoint_every_s=every_s, evaluate_every_s=NEVER_S
        ),
    )


def run(settings: Settings, say: Say) -> Report:
    """Measure with and without checkpoints in every round."""
    if settings.only:
        raise BadSettings(f"--only {settings.only[0]}: checkpoints has nothing to choose from")
    hidden = QUICK_HIDDEN if settings.quick else HIDDEN
    every_s = 0.2 if settings.quick else EVERY_S
    if not settings.quick and settings.seconds < 2 * EVERY_S:
        settings = dataclasses.replace(settings, seconds=2 * EVERY_S)
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        found = {}
        order = (("with", every_s), ("without", NEVER_S))
        for name, seconds in order if number % 2 else reversed(order):
            say(f"checkpoints, round {number + 1} of {settings.repeat}: {name} them")
            found[name] = dataclasses.asdict(system.measure(wide(hidden, seconds), settings))
        rounds.append(found)
    share = median([r["with"]["updates_per_s"] / r["without"]["updates_per_s"] for r in rounds])
    rates = {n: median([r[n]["updates_per_s"] for r in rounds]) for n in ("without", "with")}
    return Report(
        name="checkpoints",
        title=f"a wide MNIST net, 2 x 2 steps, a checkpoint every {every_s:g} s",
        columns=("", "updates/s", "ratio"),
        rows=(
            ("no checkpoints", f"{rates['without']:,.1f}", "1.00"),
            ("checkpoints", f"{rates['with']:,.1f}", f"{share:.3f}"),
        ),
        notes=(f"medians of {settings.repeat} round(s); the ratio is within a round.",),
        configuration={"every_s": every_s, "system": system.as_plain(wide(hidden, every_s))},
        result={**rates, "ratio": share},
        rounds=rounds,
    )
