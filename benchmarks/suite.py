"""`downpour bench`: runs benchmarks by name, shows what came out, and keeps it if asked to."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from downpour.benchmarks import harness
from downpour.benchmarks.harness import Report, Say, Settings
from downpour.benchmarks.processes import alone

MODULES = {
    "push-pull": "downpour.benchmarks.push_pull",
    "peers": "downpour.benchmarks.peers",
    "replicas": "downpour.benchmarks.replicas",
    "inception": "downpour.benchmarks.inception.benchmark",
    "simulate": "downpour.benchmarks.simulate",
    "startup": "downpour.benchmarks.startup",
    "checkpoints": "downpour.benchmarks.checkpoints",
    "chaos": "downpour.benchmarks.chaos",
    "hangs": "downpour.benchmarks.hangs",
    "goodput": "downpour.benchmarks.goodput",
    "recovery": "downpour.benchmarks.recovery",
    "standby": "downpour.benchmarks.standby",
    "shuffle": "downpour.benchmarks.shuffle",
    "policies": "downpour.benchmarks.policies",
    "serve": "downpour.benchmarks.serve",
    "learning": "downpour.benchmarks.learning.benchmark",
}
"""Name -> module with `run(settings, say) -> Report`, in the order in which `all` runs them.

One with `plot(record, path)` draws its record as a PNG, which is kept beside it.
"""


def run(name: str, settings: Settings, *, as_json: bool, save: bool) -> int:
    """Run the benchmark `name`, or `all`; returns the exit status."""
    progress = Console(stderr=True)
    shown = Console()
    if name == "all" and settings.only:
        raise harness.BadSettings(f"--only {settings.only[0]} is not for all: name one benchmark")
    if name != "learning" and settings.settings_from is not None:
        raise harness.BadSettings(
            f"--settings-from {settings.settings_from} is not for {name}: leave it out"
        )
    names = list(MODULES) if name == "all" else [name]
    about = harness.machine()
    plain = []
    for each in names:
        with alone():
            report = _run(each, settings, lambda line: progress.print(line, style="dim"))
        plain.append(harness.record(report, settings, about))
        if not as_json:
            harness.show(report, shown)
        if save:
            for path in _keep(each, plain[-1]):
                progress.print(f"kept in {path}", style="dim", soft_wrap=True)
    if as_json:
        print(json.dumps(_unwrapped(plain)))
    return 0


def _run(name: str, settings: Settings, say: Say) -> Report:
    report: Report = importlib.import_module(MODULES[name]).run(settings, say)
    return report


def _keep(name: str, plain: dict[str, Any]) -> list[Path]:
    paths = [harness.save(plain)]
    plot = getattr(importlib.import_module(MODULES[name]), "plot", None)
    if plot is not None:
        paths.append(paths[0].with_suffix(".png"))
        plot(plain, paths[-1])
    return paths


def _unwrapped(plain: Sequence[dict[str, Any]]) -> Any:
    return plain[0] if len(plain) == 1 else list(plain)
