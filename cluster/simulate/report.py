"""How a virtual cluster has learned: a table, JSON, and a plot of accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from downpour.cluster.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from downpour.cluster.simulate.curve import LearningCurve


def give(
    curves: Sequence[LearningCurve], goals: Sequence[float], *, plot: Path | None, as_json: bool
) -> None:
    """Print what was learned, and draw it if `plot` is given.

    Raises:
        UserError: the picture cannot be written.
    """
    if plot is not None:
        plot_curves(plot, curves, goals)
    if as_json:
        click.echo(json.dumps([curve.as_plain(goals) for curve in curves]))
    else:
        show(curves, goals, Console())


def show(curves: Sequence[LearningCurve], goals: Sequence[float], console: Console) -> None:
    """Print a table with a row for each setting."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("best", "staleness", "epochs", "virtual s"):
        table.add_column(name, justify="right")
    for goal in goals:
        table.add_column(f"{100 * goal:g}%: s / epochs", justify="right")
    for curve in curves:
        best = curve.best
        cells = [
            curve.name,
            "not scored" if best is None else f"{100 * best.accuracy:.2f}%",
            f"{curve.staleness.summary()['mean']:,.1f}",
            f"{curve.points[-1].examples / curve.epoch_examples:.2f}" if curve.points else "",
            f"{curve.seconds:,.1f}",
        ]
        for goal in goals:
            point = curve.reached(goal)
            cells.append(
                "never"
                if point is None
                else f"{point.seconds:,.1f} / {point.examples / curve.epoch_examples:.2f}"
            )
        table.add_row(*cells)
    console.print(table)
    for curve in curves:
        told = [
            f"{number:,} {what}"
            for number, what in (
                (curve.dropped, "pushes dropped"),
                (curve.refused, "mini-batches refused"),
                (curve.deaths, "deaths"),
                (curve.repeated, "pushes repeated"),
            )
            if number
        ]
        if told:
            line = f"{curve.name}: {', '.join(told)}"
            console.print(line, style="dim", highlight=False, soft_wrap=True)


def plot_curves(picture: Path, curves: Sequence[LearningCurve], goals: Sequence[float]) -> None:
    """Draw accuracy against virtual time and against epochs of examples.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_examples = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        accuracy = [100 * point.accuracy for point in curve.points]
        epochs = [point.examples / curve.epoch_examples for point in curve.points]
        seconds = [point.seconds for point in curve.points]
        by_time.plot(seconds, accuracy, marker=".", markersize=4, label=curve.name)
        by_examples.plot(epochs, accuracy, marker=".", markersize=4, label=curve.name)
    by_time.set_xlabel("virtual seconds")
    by_examples.set_xlabel("epochs of examples applied")
    by_time.set_title("accuracy@1 on the evaluation split", loc="left")
    best = max((p.accuracy for curve in curves for p in curve.points), default=1.0)
    for axes in (by_time, by_examples):
        _finish(axes, goals)
        # The goals and the best are what is compared; the first scorings would hide them.
        axes.set_ylim(100 * min(0.9 * best, *goals), 100 * min(1.0, max(best, *goals) + 0.003))
    if curves:
        by_examples.legend(loc="lower right", fontsize="small")
    try:
        figure.savefig(picture, format="png", dpi=130)
    except OSError as error:
        raise UserError(f"{picture} cannot be written: {error.strerror}; give another") from None


def _finish(axes: Axes, goals: Sequence[float]) -> None:
    for goal in goals:
        axes.axhline(100 * goal, color="#8a8f98", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.yaxis.set_major_formatter("{x:g}%")
