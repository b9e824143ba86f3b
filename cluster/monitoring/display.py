"""What a training run looks like in the terminal: progress while it lasts, a table at its end.

On a terminal the progress is a panel that redraws itself (`panel`), and in a notebook
too. Anywhere else, in a file, a pipe or a CI log, it is a plain line
(`progress.plain_line`) every few seconds and whenever the phase changes. Not here: files and plots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from os import PathLike
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from downpour.cluster.monitoring.panel import NotebookPanel, training_panel
from downpour.cluster.monitoring.progress import Progress, plain_line
from downpour.cluster.monitoring.texts import (
    cell_text,
    clock_text,
    encodable,
    has_unicode,
    number_text,
    once_text,
    percent_text,
    points_text,
    rate_text,
)

MAX_HISTORY = 4096
NOTEBOOK_EVERY_S = 1.0
"""How often the panel of a notebook is drawn again."""


class TrainingDisplay:
    """Shows the progress of one run; a context manager.

    Args:
        title: the run's name, shown in the panel's border.
        console: where to draw; None takes stderr, so that stdout stays for results.
        interval_s: seconds between two plain lines where there is no terminal.
        clock: seconds, monotonic.

    `update` may be called as often as one likes and never raises on account of its numbers or of
    the terminal's size. Log lines printed while the panel is up appear above it.
    """

    def __init__(
        self,
        title: str = "training",
        *,
        console: Console | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._console = console or Console(stderr=True)
        self._interval_s = interval_s
        self._clock = clock
        self._live: Live | None = None
        self._notebook = NotebookPanel() if self._console.is_jupyter else None
        self._latest: Progress | None = None
        self._printed: Progress | None = None
        self._printed_at = -math.inf
        self._history: dict[str, list[float]] = {"figure": [], "loss": []}

    @property
    def interactive(self) -> bool:
        """Whether this is a terminal that can redraw, and knows more than ASCII."""
        console = self._console
        return console.is_terminal and not console.is_dumb_terminal and has_unicode(console)

    def __enter__(self) -> Self:
        """Puts up the panel, where there is a terminal for it."""
        if self.interactive:
            self._live = Live(
                console=self._console, refresh_per_second=8, get_renderable=self._draw
            )
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._latest is not None and self._latest is not self._printed:
            self._print(self._latest)

    def update(self, progress: Progress) -> None:
        """Shows a new state of the run."""
        changed_phase = self._latest is None or progress.phase != self._latest.phase
        self._latest = progress
        self._remember("loss", progress.loss)
        self._remember("figure", None if progress.figure is None else progress.figure.value)
        interval_s = self._interval_s if self._notebook is None else NOTEBOOK_EVERY_S
        if self._live is None and (changed_phase or self._clock() - self._printed_at >= interval_s):
            self._print(progress)

    def _remember(self, name: str, value: float | None) -> None:
        history = self._history[name]
        if value is None or not math.isfinite(value) or (history and history[-1] == value):
            return
        history.append(float(value))
        if len(history) > MAX_HISTORY:
            # Half the points tell the same story; the newest must stay.
            history[:] = history[-1::-2][::-1]

    def _print(self, progress: Progress) -> None:
        self._printed, self._printed_at = progress, self._clock()
        if self._notebook is not None and not self._console.quiet:
            self._notebook.show(self._draw())
            return
        self._console.print(
            encodable(plain_line(progress), self._console),
            markup=False,
            highlight=False,
            soft_wrap=True,
            style=None,
        )

    def _draw(self) -> RenderableType:
        progress = self._latest
        if progress is None:
            return Text(f"{self._title}: starting", style="dim")
        return training_panel(progress, self._history, title=self._title, width=self._console.width)


def print_result(
    result: Mapping[str, object],
    run_folder: str | PathLike[str],
    *,
    console: Console | None = None,
) -> None:
    """Prints the outcome of a run as a table, with the folder that holds the rest.

    Args:
        result: what `result.json` holds. The keys of `RESULT_ROWS` come first, under readable
            labels; other plain values follow under their own names; lists are left to the file.
        run_folder: the run's folder.
        console: where to print; None takes stdout.
    """
    console = console or Console()
    unicode = has_unicode(console)
    table = Table(
        title="result",
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=box.ROUNDED if unicode else box.ASCII,
        border_style="grey50",
        padding=(0, 1),
    )
    # Cropped, because an ellipsis is not ASCII.
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis" if unicode else "crop")
    table.add_column(overflow="fold")
    for label, text, style in _result_rows(result):
        table.add_row(Text(encodable(label, console)), Text(encodable(text, console), style=style))
    table.add_row("run", Text(encodable(str(run_folder), console), style="cyan"))
    console.print(table)


RESULT_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("best_accuracy", "best accuracy", percent_text),
    ("accuracy", "last accuracy", percent_text),
    ("moving_accuracy", "by server averages", percent_text),
    ("best_r2", "best R²", number_text),
    ("r2", "last R²", number_text),
    ("moving_r2", "by server averages", number_text),
    ("rmse", "RMSE", number_text),
    ("mae", "MAE", number_text),
    ("best_f1", "best F1", percent_text),
    ("f1", "last F1", percent_text),
    ("moving_f1", "by server averages", percent_text),
    ("macro_f1", "mean F1 of classes", percent_text),
    ("exact", "rows without a mistake", percent_text),
    ("best_miou", "best mean IoU", percent_text),
    ("miou", "last mean IoU", percent_text),
    ("moving_miou", "by server averages", percent_text),
    ("pixel_accuracy", "pixels that are right", percent_text),
    ("best_evaluation_loss", "best evaluation loss", number_text),
    ("bn_gap", "recomputed BN gains", points_text),
    ("evaluation_loss", "evaluation loss", number_text),
    ("epochs", "epochs", cell_text),
    ("examples", "examples", cell_text),
    ("updates", "updates", cell_text),
    ("examples_per_s", "examples/s", rate_text),
    ("updates_per_s", "updates/s", rate_text),
    ("elapsed_s", "time", clock_text),
    ("replicas", "replicas", cell_text),
    ("duplicates", "duplicates", cell_text),
    ("refused", "refused", cell_text),
    ("dropped", "dropped", cell_text),
)
"""The first rows: key in `result.json`, label, how the value is written."""


def _result_rows(result: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Returns (label, text, style) for each row of the result table."""
    rows = []
    known = {key for key, _, _ in RESULT_ROWS}
    if isinstance(result.get("recipe"), str):
        rows.append(("recipe", str(result["recipe"]), "bold"))
    for key, label, write in RESULT_ROWS:
        value = result.get(key)
        if _is_number(value):
            style = "bold green" if key.startswith("best_") else ""
            rows.append((label, write(value), style))  # type: ignore[arg-type]
    staleness = result.get("staleness")
    if isinstance(staleness, Mapping):
        parts = [
            f"{name} {rate_text(staleness[name])}"
            for name in ("mean", "p50", "p99", "max")
            if _is_number(staleness.get(name))
        ]
        if parts:
            rows.append(("staleness", "   ".join(parts), ""))
    once = once_text(result)
    if once is not None:
        rows.append(("exactly once", once, "" if once == "yes" else "yellow"))
    reached = result.get("reached")
    if isinstance(reached, Mapping) and reached:
        parts = [f"{float(key):.1%} {_seconds(first)}" for key, first in reached.items()]
        rows.append(("reached after", "   ".join(parts), ""))
    for key, value in result.items():
        if key in known or key in ("recipe", "run", "exactly_once"):
            continue
        if isinstance(value, bool | int | float | str):
            rows.append((*_row(key, value), ""))
    return rows


def _seconds(first: Mapping[str, float]) -> str:
    return f"{first['training_s']:.1f} s"


def _row(key: str, value: bool | float | str) -> tuple[str, str]:
    """Returns the label and the text of a value whose key may end in a unit."""
    if key.endswith("_s") and _is_number(value):
        seconds = float(value)
        short = math.isfinite(seconds) and abs(seconds) < 60
        text = f"{seconds:.2f} s" if short else clock_text(seconds)
        return key.removesuffix("_s").replace("_", " "), text
    return key.replace("_", " "), cell_text(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
