"""Plots of a run, from the files that it leaves in its folder.

`plot_run` reads `metrics.jsonl` and, if there is one, `result.json`, and writes
`plots/training.png`. It may be called while the run lasts or after a crash: a last line that is cut
off is left out. Not here: writing metrics.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.scores import TITLES, metric_in
from downpour.workers.tasks import ACCURACY, SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
TRAINING_PLOT = Path("plots", "training.png")

_ACCURACY, _LOSS, _RATE, _STALENESS = "#2a9d5c", "#d9822b", "#3b6fb6", "#8b5fbf"
_GREY = "#8a8f98"

Metrics = Sequence[Mapping[str, Any]]

_RENAMED = {"replicas": "replicas_alive", "time_s": "elapsed_s"}
"""Keys as older runs wrote them, and as they are called now."""


class ReportError(UserError):
    """A run has nothing to plot, or its files cannot be read."""


def plot_run(run_folder: str | os.PathLike[str]) -> Path:
    """Draws a run's training curves and returns the path of the picture.

    There are four panels. Validation accuracy@1 (or the task's figure), training loss and updates a
    second are drawn against updates applied. The fourth is the histogram of staleness if there is a
    `result.json`, and otherwise mean staleness against updates applied.

    Raises:
        ReportError: the folder has no metrics, or a file in it is damaged.
    """
    folder = Path(run_folder)
    metrics = read_metrics(folder / METRICS_FILE)
    if not metrics:
        raise ReportError(f"{folder / METRICS_FILE} holds no metrics yet; train for longer")
    histogram = _staleness_histogram(folder / RESULT_FILE)

    # On a canvas of its own: no window system, no state shared with other figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss, rate, staleness = figure.subplots(2, 2).flat
    _draw_figure(accuracy, metrics)
    _draw_loss(loss, metrics)
    _draw_curve(rate, metrics, "updates_per_s", _RATE)
    rate.set_title("updates a second", loc="left")
    rate.set_ylim(bottom=0)
    if histogram:
        _draw_histogram(staleness, histogram)
    else:
        _draw_curve(staleness, metrics, "staleness_mean", _STALENESS)
        staleness.set_title("mean staleness", loc="left")
        staleness.set_ylim(bottom=0)
    for axes in (accuracy, loss, rate, staleness):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.suptitle(folder.resolve().name, x=0.01, ha="left", fontweight="bold")

    picture = folder / TRAINING_PLOT
    picture.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: somebody may be looking at the previous one.
    unfinished = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(unfinished, format="png", dpi=130)
    unfinished.replace(picture)
    return picture


def plot_histogram(picture: Path, histogram: Sequence[tuple[float, float]], title: str) -> None:
    """Draws a histogram of staleness.

    Args:
        picture: the file to write.
        histogram: pairs of a bucket's lower edge, in versions, and its count.
        title: shown above it.

    Raises:
        ReportError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_histogram(axes, [(low, count) for low, count in histogram if count])
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    try:
        figure.savefig(picture, format="png", dpi=130)
    except OSError as error:
        raise ReportError(f"{picture} cannot be written: {error.strerror}; give another") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the objects in a file of JSON lines, oldest first, without a cut-off last line.

    Raises:
        ReportError: no such file, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise ReportError(f"no {path.name} in {path.parent}; is it the folder of a run?") from None
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or cut off inside a character
            row = None
        if isinstance(row, dict):
            metrics.append(_under_present_names(row))
        elif number < len(lines):
            raise ReportError(f"{path}, line {number} is not a JSON object; remove it")
    return metrics


def _under_present_names(row: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in row.items()}


def series(metrics: Metrics, key: str, *, against: str = "updates") -> tuple[list[float], ...]:
    """Returns the xs (`against`) and ys (`key`) of the rows that have finite numbers for both."""
    points = [
        (float(row[against]), float(row[key]))
        for row in metrics
        if _is_finite(row.get(against)) and _is_finite(row.get(key))
    ]
    return [x for x, _ in points], [y for _, y in points]


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Returns the exponential moving average `s <- decay*s + (1-decay)*v`, free of start-up bias.

    The bias is divided out (`s_t / (1 - decay^t)`), so the first value stands as it is.
    """
    means = []
    total = weight = 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _draw_figure(axes: Axes, metrics: Metrics) -> None:
    """Draws accuracy, or the figure that the task has in its place."""
    metric = metric_in(metrics)
    if metric == ACCURACY:
        _draw_accuracy(axes, metrics)
        return
    axes.set_title(f"validation {TITLES[metric]}", loc="left")
    axes.set_ylabel(TITLES[metric])
    if metric in SHARES:
        _draw_shares(axes, metrics, metric)
        return
    _draw_curve(axes, metrics, metric, _ACCURACY)


def _draw_accuracy(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("validation accuracy@1", loc="left")
    _draw_shares(axes, metrics, ACCURACY)


def _draw_shares(axes: Axes, metrics: Metrics, key: str) -> None:
    """Draws a figure that is a share, in percent, with its highest value."""
    updates, values = series(metrics, key)
    axes.set_xlabel("updates")
    if not values:
        _say_nothing_measured(axes)
        return
    axes.plot(updates, [100 * a for a in values], color=_ACCURACY, marker=".", markersize=4)
    best = max(range(len(values)), key=values.__getitem__)
    axes.annotate(
        f"{100 * values[best]:.2f}%",
        (updates[best], 100 * values[best]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="right",
        color=_ACCURACY,
    )
    axes.yaxis.set_major_formatter("{x:g}%")
    low, high = min(values), max(values)
    room = max(0.02, (high - low) / 10)
    axes.set_ylim(100 * max(0.0, low - room), 100 * min(1.0, high + room))


def _draw_loss(axes: Axes, metrics: Metrics) -> None:
    updates, loss = series(metrics, "loss")
    axes.set_title("training loss", loc="left")
    axes.set_xlabel("updates")
    if not loss:
        _say_nothing_measured(axes)
        return
    axes.plot(updates, loss, color=_LOSS, alpha=0.3, linewidth=0.8)
    axes.plot(updates, smoothed(loss), color=_LOSS, marker=_marker(loss))
    # A decade or more between the ends is read better in logarithms.
    if min(loss) > 0 and max(loss) > 10 * min(loss):
        axes.set_yscale("log")


def _draw_curve(axes: Axes, metrics: Metrics, key: str, color: str) -> None:
    updates, values = series(metrics, key)
    axes.set_xlabel("updates")
    if values:
        axes.plot(updates, values, color=color, marker=_marker(values))
    else:
        _say_nothing_measured(axes)


def _marker(values: Sequence[float]) -> str:
    """A single value is no line."""
    return "." if len(values) == 1 else ""


def _draw_histogram(axes: Axes, histogram: Sequence[tuple[float, float]]) -> None:
    lows = [low for low, _ in histogram]
    # Empty buckets are left out of the list, so the closest pair gives the width of one.
    width = min((after - low for low, after in itertools.pairwise(lows)), default=1.0)
    total = sum(count for _, count in histogram) or 1.0
    shares = [100 * count / total for _, count in histogram]
    axes.bar(lows, shares, width=width, align="edge", color=_STALENESS, linewidth=0)
    axes.set_title("staleness of the updates applied", loc="left")
    axes.set_xlabel("versions")
    axes.yaxis.set_major_formatter("{x:g}%")


def _say_nothing_measured(axes: Axes) -> None:
    axes.text(
        0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=_GREY
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _staleness_histogram(path: Path) -> list[tuple[float, float]]:
    """Returns (lower edge, count) pairs in order; none if the run has no result yet."""
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}; remove it to plot without it") from error
    staleness = result.get("staleness") if isinstance(result, dict) else None
    buckets = staleness.get("histogram") if isinstance(staleness, dict) else None
    if buckets is None:
        return []
    try:
        pairs = sorted((float(low), float(count)) for low, count in buckets)
    except (TypeError, ValueError):
        raise ReportError(
            f"{path}: staleness.histogram must be a list of [lower edge, count] pairs"
        ) from None
    return [(low, count) for low, count in pairs if math.isfinite(low) and math.isfinite(count)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
