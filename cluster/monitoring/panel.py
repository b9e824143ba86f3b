"""The panel that shows a run on a terminal or in a notebook, as something that rich can draw.

In a notebook it is one output of the cell that is drawn again and again. IPython's own displays
will do for that; no widgets are needed.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.monitoring.scores import TITLES
from downpour.cluster.monitoring.texts import (
    MISSING,
    clock_text,
    number_text,
    of_total,
    rate_text,
)

PANEL_WIDTH = 84
WIDE_ENOUGH = 60
SPARKLINE_WIDTH = 24
LABEL_WIDTH = 9

_BLOCKS = "▁▂▃▄▅▆▇█"


def training_panel(
    progress: Progress,
    history: Mapping[str, Sequence[float]],
    *,
    title: str,
    width: int = PANEL_WIDTH,
) -> RenderableType:
    """Returns the live panel for a state of the run.

    Args:
        progress: the state.
        history: values so far of `figure` and `loss`, oldest first.
        title: the run's name.
        width: columns of the terminal.
    """
    p = progress
    # What stands at the right is the first to go when the terminal is narrow.
    aside = width >= WIDE_ENOUGH
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
    rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    rows.add_column(no_wrap=True, justify="right", overflow="crop")

    def add(label: str, value: Text, right: Text | None = None) -> None:
        rows.add_row(label, value, right if aside and right is not None else "")

    if p.epoch is not None:
        add("epoch", _value(of_total(p.epoch, p.epochs)), _count(p.updates, "updates"))
    if p.loss is not None or p.figure is not None:
        text = MISSING if p.figure is None else p.figure.value_text
        figure = _value(text, style="bold green")
        if p.best is not None:
            figure.append(f"   best {p.best.value_text}", style="dim")
        if p.goal is not None:
            figure.append(f"   until {p.goal.value_text}", style="dim")
        name = p.metric if p.figure is None else p.figure.metric
        add(TITLES[name], figure, _spark(history["figure"], "green"))
        add("loss", _value(number_text(p.loss)), _spark(history["loss"], "yellow"))
    if p.updates_per_s is not None or p.examples_per_s is not None:
        add("rate", _pair(p.updates_per_s, "updates/s", p.examples_per_s, "examples/s"))
    if p.staleness_mean is not None:
        add("staleness", _pair(p.staleness_mean, "mean", p.staleness_p99, "p99"))
    if p.replicas_alive is not None:
        add("replicas", _replicas(p), _trouble(p))

    parts: list[RenderableType] = []
    if p.fraction is not None:
        parts.append(_bar(p.fraction, p.remaining_s))
    if rows.row_count:
        parts.append(rows)
    subtitle = Text(clock_text(p.elapsed_s), style="dim")
    heading = Text.assemble((title, "bold"), (f" · {' '.join(p.phase.split())}", "cyan"))
    return Constrain(
        Panel(
            Group(*parts) if parts else Text("…", style="dim"),
            title=heading,
            title_align="left",
            subtitle=subtitle,
            subtitle_align="right",
            border_style="grey50",
            padding=(0, 1),
        ),
        PANEL_WIDTH,
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns values as a line of bars, at most `width` characters, each the mean of its share.

    The lowest value has the lowest bar and the highest the highest; equal values stand half-way.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width <= 0:
        return ""
    columns = min(width, len(finite))
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [math.fsum(finite[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return _BLOCKS[len(_BLOCKS) // 2] * columns
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / span * top)] for mean in means)


def _value(text: str, style: str = "bold") -> Text:
    return Text(text, style="dim" if text == MISSING else style)


def _pair(first: float | None, first_unit: str, second: float | None, second_unit: str) -> Text:
    text = Text()
    for value, unit in ((first, first_unit), (second, second_unit)):
        if value is not None:
            text.append("   " if text else "")
            text.append(rate_text(value), style="bold")
            text.append(f" {unit}", style="dim")
    return text


def _count(count: int | None, unit: str) -> Text:
    return Text("" if count is None else f"{count:,} {unit}", style="dim")


def _bar(fraction: float, remaining_s: float | None) -> RenderableType:
    # In a grid because a bar by itself does not end its line.
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(
        total=1.0, completed=fraction, complete_style="cyan", finished_style="green", style="grey30"
    )
    text = Text(f"{fraction:.0%}", style="bold cyan")
    if remaining_s is not None and fraction < 1:
        text.append(f"   ETA {clock_text(remaining_s)}", style="dim")
    line.add_row(bar, text)
    return line


def _replicas(progress: Progress) -> Text:
    alive, wanted = progress.replicas_alive or 0, progress.replicas_wanted
    short = wanted is not None and alive < wanted
    text = Text(of_total(alive, wanted), style="bold yellow" if short else "bold")
    if progress.replicas_held is not None:
        text.append(f"   held at {progress.replicas_held}", style="yellow")
    return text


def _trouble(progress: Progress) -> Text:
    counts = (("duplicates", progress.duplicates, "dim"), ("refused", progress.refused, "yellow"))
    text = Text()
    for name, count, style in counts:
        if count is not None:
            text.append("   " if text else "")
            text.append(f"{count:,} {name}", style=style if count else "dim")
    return text


def _spark(values: Sequence[float], style: str) -> Text:
    # One bar says nothing.
    return Text(sparkline(values, SPARKLINE_WIDTH) if len(values) > 1 else "", style=style)


NOTEBOOK_WIDTH = 100
PAGE = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'


class NotebookPanel:
    """What one cell shows of a run."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._shown: Any = None

    def show(self, renderable: RenderableType) -> None:
        """Show this in place of what was shown before."""
        import IPython.display

        notebook: Any = IPython.display  # without types in some versions
        page = notebook.HTML(html_of(renderable))
        if self._shown is None:
            self._shown = notebook.display(page, display_id=True)
        else:
            self._shown.update(page)


def html_of(renderable: RenderableType) -> str:
    """What rich would draw on a terminal, as HTML with its colours."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=NOTEBOOK_WIDTH,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
    )
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=PAGE)
