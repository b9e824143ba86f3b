"""Claim: training starts in a small multiple of what Ray itself takes to start.

From the start of `downpour train mnist-bn` to its first update and to all ten replicas, as the run
records them, over what `ray.init()` and one actor that imports torch take, in the same round.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.baselines.common import START_DEADLINE_S, Setup
from benchmarks.harness import BadSettings, Report, Say, Settings, median
from benchmarks.processes import Child, measure_in_child
from cluster.run_folder import RESULT, RunFolder

FIRST, ALL = "time_to_first_update_s", "time_to_all_replicas_s"


def run(settings: Settings, say: Say) -> Report:
    """Start both in every round."""
    if settings.only:
        raise BadSettings(f"startup has nothing called {settings.only[0]!r}: leave out --only")
    replicas = 2 if settings.quick else 10
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        prefix = f"startup, round {number + 1} of {settings.repeat}"
        say(f"{prefix}: Ray and one actor")
        setup = Setup(data="", workers=1, seconds=0, warmup_s=0, dashboard=not settings.quick)
        ray = measure_in_child(
            "starting Ray",
            "benchmarks.baselines.ray_start",
            dataclasses.asdict(setup),
            START_DEADLINE_S,
        )
        say(f"{prefix}: downpour train mnist-bn")
        rounds.append({"ray": ray, "downpour": _train(replicas, dashboard=not settings.quick)})
    return _report(replicas, rounds, settings)


def _train(replicas: int, *, dashboard: bool) -> dict[str, Any]:
    """One epoch by the command itself; what its result says of its start."""
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        arguments = [
            *("-m", "cluster", "train", "mnist-bn", "--runs", scratch, "--name", "startup"),
            *("--replicas", str(replicas), "--warm-start-epochs", "0", "--ramp-epochs", "0"),
            *("--epochs", "1", "--learning-rate", "0.002"),
            "--dashboard" if dashboard else "--no-dashboard",
        ]
        with Child("training for a start", arguments) as child:
            child.wait(2 * START_DEADLINE_S)
            result = RunFolder.open(Path(scratch) / "startup").read_json(RESULT)
    return {key: result[key] for key in (FIRST, ALL, "wall_s", "updates", "exactly_once")}


def _report(replicas: int, rounds: list[dict[str, Any]], settings: Settings) -> Report:
    base = median([r["ray"]["init_and_actor_s"] for r in rounds])
    result: dict[str, Any] = {"ray_init_and_actor_s": base}
    rows: list[tuple[str, ...]] = [
        ("ray.init() and one actor that imports torch", f"{base:.2f}", "1.00")
    ]
    for key, what in ((FIRST, "the first update"), (ALL, f"all {replicas} replicas")):
        seconds = median([r["downpour"][key] for r in rounds])
        ratio = median([r["downpour"][key] / r["ray"]["init_and_actor_s"] for r in rounds])
        result[key] = seconds
        result[key.removesuffix("_s") + "_multiple"] = ratio
        rows.append((f"from the command to {what}", f"{seconds:.2f}", f"{ratio:.2f}"))
    return Report(
        name="startup",
        title="the start of `downpour train mnist-bn`",
        columns=("", "seconds", "multiple"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s); multiples are within a round. Ray's time is "
            "without interpreter and imports of its driver, ours with them.",
        ),
        configuration={"replicas": replicas, "recipe": "mnist-bn"},
        result=result,
        rounds=rounds,
    )
