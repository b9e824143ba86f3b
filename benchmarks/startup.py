"""Claim: training starts in a small multiple of what Ray itself takes to start.

From the start of `downpour train mnist-bn` to its first update and to all ten replicas, as the run
records them, over what `ray.init()` and one actor that imports torch take, in the same round. A run
has more processes that import torch than one; what Ray takes for as many actors that do that, and
nothing else, is measured too: on few processors it is most of a start.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from downpour.benchmarks.baselines.common import START_DEADLINE_S, Setup
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.benchmarks.processes import Child, measure_in_child
from downpour.cluster.config import recipes
from downpour.cluster.config.resolve import num_processes
from downpour.cluster.run.folder import RESULT, RunFolder
from downpour.shuffler.processors import processors

FIRST, ALL = "time_to_first_update_s", "time_to_all_replicas_s"


def run(settings: Settings, say: Say) -> Report:
    """Start both in every round."""
    if settings.only:
        raise BadSettings(f"startup has nothing called {settings.only[0]!r}: leave out --only")
    replicas = 2 if settings.quick else 10
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        prefix = f"startup, round {number + 1} of {settings.repeat}"
        found: dict[str, Any] = {}
        for name, actors in (("ray", 1), ("ray_actors", num_importing(replicas))):
            say(f"{prefix}: Ray and {actors} actor(s)")
            found[name] = _start_ray(actors, dashboard=not settings.quick)
        say(f"{prefix}: downpour train mnist-bn")
        found["downpour"] = _train(replicas, dashboard=not settings.quick)
        rounds.append(found)
    return _report(replicas, rounds, settings)


def num_importing(replicas: int) -> int:
    """Processes of a run that import torch before its replicas train: theirs, and a partition."""
    members = dataclasses.replace(recipes.find("mnist-bn").replicas, replicas=replicas)
    return 1 + num_processes(members, processors())


def _start_ray(actors: int, *, dashboard: bool) -> dict[str, Any]:
    setup = Setup(data="", workers=actors, seconds=0, warmup_s=0, dashboard=dashboard)
    return measure_in_child(
        "starting Ray",
        "downpour.benchmarks.baselines.ray_start",
        dataclasses.asdict(setup),
        START_DEADLINE_S,
    )


def _train(replicas: int, *, dashboard: bool) -> dict[str, Any]:
    """Some epochs by the command itself; what its result says of its start.

    One takes a second, and would be over before all replicas were there.
    """
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        arguments = [
            *("-m", "downpour", "train", "mnist-bn", "--runs", scratch, "--name", "startup"),
            *("--replicas", str(replicas), "--warm-start-epochs", "0", "--ramp-epochs", "0"),
            *("--epochs", "20", "--learning-rate", "0.002"),
            "--dashboard" if dashboard else "--no-dashboard",
        ]
        with Child("training for a start", arguments) as child:
            child.wait(2 * START_DEADLINE_S)
            result = RunFolder.open(Path(scratch) / "startup").read_json(RESULT)
    return {key: result[key] for key in (FIRST, ALL, "wall_s", "updates", "exactly_once")}


def _report(replicas: int, rounds: list[dict[str, Any]], settings: Settings) -> Report:
    base, as_many = (
        [r[name]["init_and_actors_s"] for r in rounds] for name in ("ray", "ray_actors")
    )
    first, every = ([r["downpour"][key] for r in rounds] for key in (FIRST, ALL))
    result: dict[str, Any] = {"ray_init_and_actor_s": median(base)}
    rows: list[tuple[str, ...]] = []
    for key, what, seconds in (
        (None, "ray.init() and one actor that imports torch", base),
        ("ray_init_and_actors_s", f"the same, and {num_importing(replicas)} actors", as_many),
        (FIRST, "from the command to the first update", first),
        (ALL, f"from the command to all {replicas} replicas", every),
    ):
        ratio = median([s / b for s, b in zip(seconds, base, strict=True)])
        if key is not None:
            result[key] = median(seconds)
            result[key.removesuffix("_s") + "_multiple"] = ratio
        rows.append((what, f"{median(seconds):.2f}", f"{ratio:.2f}"))
    return Report(
        name="startup",
        title="the start of `downpour train mnist-bn`",
        columns=("", "seconds", "multiple"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s); multiples are within a round. Ray's time is "
            "without interpreter and imports of its driver, ours with them.",
        ),
        configuration={
            "replicas": replicas,
            "recipe": "mnist-bn",
            "importing": num_importing(replicas),
        },
        result=result,
        rounds=rounds,
    )
