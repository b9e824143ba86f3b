"""`downpour bench`: runs benchmarks by name, shows what came out, and keeps it if asked to."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Report, Say, Settings
from benchmarks.processes import alone

MODULES = {
    "push-pull": "benchmarks.push_pull",
    "peers": "benchmarks.peers",
    "replicas": "benchmarks.replicas",
    "simulate": "benchmarks.simulate",
    "startup": "benchmarks.startup",
    "checkpoints": "benchmarks.checkpoints",
    "chaos": "benchmarks.chaos",
    "recovery": "benchmarks.recovery",
    "shuffle": "benchmarks.shuffle",
    "policies": "benchmarks.policies",
}
"""Name -> module with `run(settings, say) -> Report`, in the order in which `all` runs them."""


def run(name: str, settings: Settings, *, as_json: bool, save: bool) -> int:
    """Run the benchmark `name`, or `all`; returns the exit status."""
    progress = Console(stderr=True)
    shown = Console()
    if name == "all" and settings.only:
        raise harness.BadSettings(f"--only {settings.only[0]} is not for all: name one benchmark")
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
            progress.print(f"kept in {harness.save(plain[-1])}", style="dim", soft_wrap=True)
    if as_json:
        print(json.dumps(_unwrapped(plain)))
    return 0


def _run(name: str, settings: Settings, say: Say) -> Report:
    report: Report = importlib.import_module(MODULES[name]).run(settings, say)
    return report


def _unwrapped(plain: Sequence[dict[str, Any]]) -> Any:
    return plain[0] if len(plain) == 1 else list(plain)
