"""Claim: after a death a run is at full speed within twice the time that one actor takes to start.

A process of replicas, and then the partition, is killed (kill -9) while the MNIST net trains with
10 x 5 steps. From the run's own metrics, written ten times a second for this: when updates come
again at 90% of their rate before, and the fewest updates in half a second meanwhile, which for a
dead process of replicas is what the others do. The yardstick is an actor that imports torch,
started on a Ray that does nothing else, in the same round. All of that without spares, with, and
with a follower for the partition (`--hot-standby`), whose death is to take no update back.

As a main module (`python -m downpour.benchmarks.recovery RUN`) it is the process that trains.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from downpour.benchmarks import system
from downpour.benchmarks.baselines.common import START_DEADLINE_S, Setup
from downpour.benchmarks.chaos import TITLES
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.benchmarks.processes import BenchmarkFailed, Child, descendants, measure_in_child
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.failures.account import SPARES_AFTER_S
from downpour.cluster.monitoring.plots import Metrics, read_metrics
from downpour.cluster.run.folder import EVENTS, METRICS, RunFolder

REPORT_EVERY_S = 0.1
BEFORE_S = 4.0
"""Over which the rate before a death is taken."""
WINDOW_S, LEAST_WINDOW_S = 1.0, 0.5
"""Over which a rate counts as full; over which the fewest updates are looked for."""
FULL = 0.9
AFTER_S = 12.0
"""Followed after a death, before the next one: spares are made again meanwhile."""
LOOK_EVERY_S = 0.05
SPARE_TITLES = ("ray::ReplicasSpare", "ray::PartitionSpare", "ray::Follower")
SPARES: tuple[Spares, ...] = ("none", "all", "hot")
"""What `--only` chooses from: `--spares none`, `--spares all`, and `--hot-standby` alone."""
KINDS = ("replicas", "partition")
Spares = Literal["none", "all", "hot"]

Points = Sequence[tuple[float, int]]
"""(Unix time, updates applied so far)."""


def run(settings: Settings, say: Say) -> Report:
    """Kill one of each kind in every round, without spares and with."""
    if unknown := set(settings.only) - set(SPARES):
        raise BadSettings(f"there is no {min(unknown)!r}: give some of {', '.join(SPARES)}")
    wanted = [s for s in SPARES if s in (settings.only or SPARES)]
    config = system.mnist(replicas=4 if settings.quick else 10)
    rounds: list[dict[str, Any]] = []
    for number in range(settings.repeat):
        prefix = f"recovery, round {number + 1} of {settings.repeat}"
        say(f"{prefix}: one actor")
        setup = Setup(data="", workers=1, seconds=0, warmup_s=0, dashboard=False)
        start = measure_in_child(
            "starting an actor",
            "downpour.benchmarks.baselines.ray_start",
            dataclasses.asdict(setup),
            START_DEADLINE_S,
        )
        found: dict[str, Any] = {"actor_s": start["actors_s"]}
        for spares in wanted:
            say(f"{prefix}: deaths, spares {spares}")
            found[spares] = _deaths(_with_spares(config, spares), settings)
        rounds.append(found)
    return _report(config, wanted, rounds, settings)


def _with_spares(config: RunConfig, spares: Spares) -> RunConfig:
    kept: Literal["auto", "none", "all"]
    kept = "auto" if spares == "hot" else spares
    replicas = dataclasses.replace(config.replicas, spares=kept)
    server = dataclasses.replace(config.server, hot_standby=spares == "hot")
    return dataclasses.replace(config, replicas=replicas, server=server)


def _deaths(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """One run, in which one of each kind is killed."""
    killed_s: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        folder = RunFolder.create(Path(scratch) / "run", config)
        with Child(
            "a run with deaths", ["-m", "downpour.benchmarks.recovery", folder.path]
        ) as child:
            follower = system.RunFollower(child, folder.path / METRICS)
            # The evaluator is the last to come up, after all replicas train.
            line = follower.next(lambda line: line.get("accuracy") is not None, START_DEADLINE_S)
            follower.rates(line["time"] + SPARES_AFTER_S + settings.warmup_s + BEFORE_S)
            if config.server.hot_standby:
                system.await_follower(folder, child)
            memory = spare_memory_mb(child.process.pid)
            for kind in KINDS:
                killed_s[kind] = time.time()
                _kill(child, kind)
                follower.rates(killed_s[kind] + AFTER_S)
            child.process.send_signal(signal.SIGTERM)
            child.end(system.STOP_DEADLINE_S)
        metrics = read_metrics(folder.path / METRICS)
        points = updates(metrics)
        events = read_metrics(folder.path / EVENTS)
    found: dict[str, Any] = {
        kind: dataclasses.asdict(recovered(points, at_s, BEFORE_S, AFTER_S))
        for kind, at_s in killed_s.items()
    }
    began_s = min(killed_s.values())
    told = [(round(e["time"] - began_s, 2), e["event"]) for e in events if e["time"] >= began_s]
    lost = points[-1][1] - [line["updates"] for line in metrics if "replicas_alive" in line][-1]
    return {**found, "updates_lost": lost, "spare_memory_mb": memory, "events": told}


def _kill(child: Child, kind: str) -> None:
    """Kill that of a kind which has done most: one that trains, and no spare."""
    family = descendants(child.process.pid).values()
    victims = {p.cpu_s: p.pid for p in family if p.command.startswith(TITLES[kind])}
    if not victims:
        raise BenchmarkFailed(f"there is no {kind} to kill: see {child.log}")
    os.kill(victims[max(victims)], signal.SIGKILL)


def updates(metrics: Metrics) -> Points:
    """(time, updates applied): what a death took back was applied all the same."""
    points: list[tuple[float, int]] = []
    before = lost = 0
    for line in metrics:
        if "replicas_alive" in line:
            lost += max(0, before - line["updates"])
            before = line["updates"]
            points.append((line["time"], before + lost))
    return points


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a death cost."""

    rate: float
    """Updates a second before it."""
    full_after_s: float | None
    """From the kill to the beginning of the first second at `FULL` of that; None for never."""
    least_rate: float
    """Fewest updates a second, over `LEAST_WINDOW_S`, from the kill until then."""


def recovered(points: Points, killed_s: float, before_s: float, after_s: float) -> Recovered:
    """What the updates say of a death at `killed_s`; only `after_s` from then on are looked at."""
    times = np.array([t for t, _ in points])
    counts = np.array([n for _, n in points], np.float64)

    def rate(begin_s: float, seconds: float) -> float:
        first, last = np.interp([begin_s, begin_s + seconds], times, counts)
        return float(last - first) / seconds

    usual = rate(killed_s - before_s, before_s)
    ends_s = min(killed_s + after_s, float(times[-1]))
    starts = np.arange(killed_s, ends_s - WINDOW_S, LOOK_EVERY_S)
    # A moment after the kill updates are at their old rate still: not yet the end of it.
    rates = [rate(start_s, WINDOW_S) for start_s in starts]
    fell = next((i for i, r in enumerate(rates) if r < FULL * usual), None)
    if fell is None:
        return Recovered(rate=usual, full_after_s=0.0, least_rate=min(rates))
    full = next((i for i in range(fell, len(rates)) if rates[i] >= FULL * usual), None)
    until_s = ends_s if full is None else float(starts[full])
    last_s = max(until_s - LEAST_WINDOW_S, killed_s)
    moments = [killed_s, *np.arange(killed_s + LOOK_EVERY_S, last_s + 1e-9, LOOK_EVERY_S)]
    return Recovered(
        rate=usual,
        full_after_s=None if full is None else float(starts[full]) - killed_s,
        least_rate=min(rate(float(m), LEAST_WINDOW_S) for m in moments),
    )


def spare_memory_mb(pid: int) -> float:
    """Memory of the spares below `pid`, what they share with others in parts (Pss), in megabytes.

    To be called before any of them is used.
    """
    total = 0.0
    for process in descendants(pid).values():
        if process.command.startswith(SPARE_TITLES):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += float(line.split()[1]) / 1024
    return total


def _report(
    config: RunConfig, wanted: Sequence[str], rounds: list[dict[str, Any]], settings: Settings
) -> Report:
    actor_s = median([r["actor_s"] for r in rounds])
    result: dict[str, Any] = {"actor_s": actor_s}
    rows = [("one actor that imports torch", f"{actor_s:.2f}", "1.00", "", "", "")]
    for spares in wanted:
        lost = median([r[spares]["updates_lost"] for r in rounds])
        about: dict[str, Any] = {"updates_lost": lost}
        for kind in KINDS:
            deaths = [r[spares][kind] for r in rounds]
            full = [d["full_after_s"] for d in deaths]
            multiples = [
                None if f is None else f / r["actor_s"] for f, r in zip(full, rounds, strict=True)
            ]
            about[kind] = {
                "full_after_s": _median(full),
                "multiple": _median(multiples),
                "rate_before": median([d["rate"] for d in deaths]),
                "least_rate": min(d["least_rate"] for d in deaths),
            }
            rows.append(
                (
                    f"{kind}, spares {spares}",
                    _shown(about[kind]["full_after_s"]),
                    _shown(about[kind]["multiple"]),
                    f"{about[kind]['rate_before']:,.0f}",
                    f"{about[kind]['least_rate']:,.0f}",
                    f"{lost:,.0f}" if kind == "partition" else "",
                )
            )
        about["spare_memory_mb"] = median([r[spares]["spare_memory_mb"] for r in rounds])
        result[spares] = about
    held = " and ".join(f"{result[s]['spare_memory_mb']:.0f} MB ({s})" for s in wanted)
    return Report(
        name="recovery",
        title="from kill -9 to full speed, the MNIST net",
        columns=("", "seconds", "multiple", "updates/s before", "least", "updates lost"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s), the least of all; multiples are within a "
            f"round. Spares or the follower hold {held}.",
        ),
        configuration={
            "full": FULL,
            "window_s": WINDOW_S,
            "report_every_s": REPORT_EVERY_S,
            "system": system.as_plain(config),
        },
        result=result,
        rounds=rounds,
    )


def _median(values: Sequence[float | None]) -> float | None:
    """The median; None where one of them is, which is a run that was never at full speed again."""
    return None if None in values else median([v for v in values if v is not None])


def _shown(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def main() -> int:
    """Train the run whose folder is given, and report often."""
    from downpour.cluster.controller.members import partitions

    partitions.REPORT_EVERY_S = REPORT_EVERY_S
    return system.main()


if __name__ == "__main__":
    raise SystemExit(main())
