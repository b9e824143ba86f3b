"""The picture of `bench learning`: accuracy against training seconds, a curve a peer and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.benchmarks.learning.curve import Curve

COLOURS = ("#6b7280", "#d9822b", "#3b6fb6", "#8b5fbf", "#2a9d5c", "#c2453d")
LOWEST = 0.9
"""Accuracy below which a curve is not looked at, unless the goals are lower."""


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of the benchmark to a PNG."""
    # Drawn on a canvas of its own: no window system, no state shared with other figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    goals = record["configuration"]["bounds"]["goals"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    highest = goals[-1]
    for number, (name, found) in enumerate(record["result"].items()):
        colour = COLOURS[number % len(COLOURS)]
        for index, round_ in enumerate(record["rounds"]):
            curve = Curve.from_plain(round_[name])
            highest = max(highest, curve.best)
            axes.plot(
                [look.seconds for look in curve.looks],
                [100 * look.best for look in curve.looks],
                color=colour,
                linewidth=1.2,
                marker=".",
                markersize=3,
                label=None if index else f"{found['title']}: {found['setting_text']}",
            )
    for goal in goals:
        axes.axhline(100 * goal, color="#8a8f98", linewidth=0.8, linestyle="--")
    low = min(LOWEST, goals[0] - 0.1)
    axes.set_ylim(100 * low, 100 * (highest + 0.05 * (highest - low)))
    axes.set_xlim(left=0)
    axes.set_xlabel("training seconds, without start-up")
    axes.set_ylabel("accuracy on the test split, %")
    axes.set_title(record["title"], loc="left", fontsize=10)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
