"""What a training run looks like in the terminal: progress while it lasts, a table at its end.

On a terminal the progress is a small panel that redraws itself; anywhere else (a file, a pipe, a
CI log) it is a plain line every few seconds and whenever the phase changes. Nothing here measures
anything: a `Progress` arrives with its numbers, and each of them may be missing or NaN. Files and
plots are `cluster.monitoring.plots`'s.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MISSING = "–"
PANEL_WIDTH = 84
WIDE_ENOUGH = 60
SPARKLINE_WIDTH = 24
LABEL_WIDTH = 9
MAX_HISTORY = 4096

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands at one moment. None stands for what is not known (yet)."""

    elapsed_s: float
    """Seconds since the run began."""

    phase: str
    """What goes on, in a few words: `starting Ray`, `training`, `evaluating`."""

    epoch: int | None = None
    """Epoch under way, from 1, for people."""

    epochs: int | None = None
    """Epochs that the run will have."""

    examples: int | None = None
    """Examples applied by the parameter server."""

    total_examples: int | None = None
    """Examples that the run will have applied at its end."""

    updates: int | None = None
    """Updates applied by the parameter server."""

    updates_per_s: float | None = None
    """Updates a second, over the last few seconds."""

    examples_per_s: float | None = None
    """Examples a second, over the last few seconds."""

    loss: float | None = None
    """Mean training loss of the latest mini-batches."""

    accuracy: float | None = None
    """Validation accuracy@1 in [0, 1] of the latest evaluation."""

    best_accuracy: float | None = None
    """The highest validation accuracy@1 so far."""

    staleness_mean: float | None = None
    """Mean staleness, in versions."""

    staleness_p99: float | None = None
    """99th percentile of staleness, in versions."""

    replicas_alive: int | None = None
    """Model replicas at work."""

    replicas_wanted: int | None = None
    """Model replicas that the run is to have."""

    replicas_held: int | None = None
    """Of those at work, how many train while the loss keeps the others back; None: all may."""

    duplicates: int | None = None
    """Pushes ignored because their mini-batch had been applied before."""

    refused: int | None = None
    """Pushes refused: a NaN, an outlier, too stale."""

    @property
    def fraction(self) -> float | None:
        """Part of the run that is done, in [0, 1]; None if that is not known."""
        if self.examples is None or not self.total_examples or self.total_examples < 0:
            return None
        return min(1.0, max(0.0, self.examples / self.total_examples))

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the end at the present rate; None if that is not known."""
        rate = self.examples_per_s
        if self.examples is None or self.total_examples is None or rate is None:
            return None
        if not math.isfinite(rate) or rate <= 0:
            return None
        return max(0, self.total_examples - self.examples) / rate


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
        self._latest: Progress | None = None
        self._printed: Progress | None = None
        self._printed_at = -math.inf
        self._history: dict[str, list[float]] = {"accuracy": [], "loss": []}

    @property
    def interactive(self) -> bool:
        """Whether this is a terminal that can redraw, and knows more than ASCII."""
        console = self._console
        return console.is_terminal and not console.is_dumb_terminal and _has_unicode(console)

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
            self._print_line(self._latest)

    def update(self, progress: Progress) -> None:
        """Shows a new state of the run."""
        changed_phase = self._latest is None or progress.phase != self._latest.phase
        self._latest = progress
        self._remember("loss", progress.loss)
        self._remember("accuracy", progress.accuracy)
        if self._live is None and (
            changed_phase or self._clock() - self._printed_at >= self._interval_s
        ):
            self._print_line(progress)

    def _remember(self, name: str, value: float | None) -> None:
        history = self._history[name]
        if value is None or not math.isfinite(value) or (history and history[-1] == value):
            return
        history.append(float(value))
        if len(history) > MAX_HISTORY:
            # Half the points tell the same story; the newest must stay.
            history[:] = history[-1::-2][::-1]

    def _print_line(self, progress: Progress) -> None:
        self._printed, self._printed_at = progress, self._clock()
        self._console.print(
            _encodable(plain_line(progress), self._console),
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


def plain_line(progress: Progress) -> str:
    """Returns a state of the run as one line without any control characters."""
    parts = [f"[{clock_text(progress.elapsed_s)}] {progress.phase}"]
    if progress.epoch is not None:
        parts.append(f"epoch {_of(progress.epoch, progress.epochs)}")
    if progress.fraction is not None:
        parts.append(f"{progress.fraction:.0%}")
    if progress.accuracy is not None:
        best = progress.best_accuracy
        beside = "" if best is None else f" (best {percent_text(best)})"
        parts.append(f"accuracy {percent_text(progress.accuracy)}{beside}")
    if progress.loss is not None:
        parts.append(f"loss {number_text(progress.loss)}")
    if progress.updates_per_s is not None:
        parts.append(f"{rate_text(progress.updates_per_s)} updates/s")
    if progress.staleness_mean is not None:
        p99 = progress.staleness_p99
        beside = "" if p99 is None else f" (p99 {rate_text(p99)})"
        parts.append(f"staleness {rate_text(progress.staleness_mean)}{beside}")
    if progress.replicas_alive is not None:
        held = progress.replicas_held
        beside = "" if held is None else f" (held at {held})"
        parts.append(f"replicas {_of(progress.replicas_alive, progress.replicas_wanted)}{beside}")
    parts += [
        f"{count:,} {name}"
        for name, count in (("duplicates", progress.duplicates), ("refused", progress.refused))
        if count
    ]
    if progress.remaining_s is not None:
        parts.append(f"ETA {clock_text(progress.remaining_s)}")
    return "  ".join(" ".join(part.split()) for part in parts)


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
        history: values so far of `accuracy` and `loss`, oldest first.
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
        add("epoch", _value(_of(p.epoch, p.epochs)), _count(p.updates, "updates"))
    if p.loss is not None or p.accuracy is not None:
        accuracy = _value(percent_text(p.accuracy), style="bold green")
        if p.best_accuracy is not None:
            accuracy.append(f"   best {percent_text(p.best_accuracy)}", style="dim")
        add("accuracy", accuracy, _spark(history["accuracy"], "green"))
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
    unicode = _has_unicode(console)
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
        table.add_row(
            Text(_encodable(label, console)), Text(_encodable(text, console), style=style)
        )
    table.add_row("run", Text(_encodable(str(run_folder), console), style="cyan"))
    console.print(table)


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


def clock_text(seconds: float | None) -> str:
    """Returns a length of time as `m:ss`, `h:mm:ss` or `d days h:mm:ss`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, int(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} {'day' if days == 1 else 'days'} {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def percent_text(fraction: float | None) -> str:
    """Returns a fraction as a percentage with two decimals."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.2f}%" if math.isfinite(fraction) else str(fraction)


def number_text(value: float | None) -> str:
    """Returns a number with four significant digits."""
    if value is None:
        return MISSING
    return f"{value:.4g}"


def rate_text(value: float | None) -> str:
    """Returns a rate or a count: one decimal below 100, and then whole with separators."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _has_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _encodable(text: str, console: Console) -> str:
    """Returns text with what the console's encoding lacks replaced: printing must not raise."""
    encoding = console.encoding
    return text.encode(encoding, "replace").decode(encoding)


def _of(count: int, total: int | None) -> str:
    return f"{count}" if total is None else f"{count}/{total}"


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
    text = Text(_of(alive, wanted), style="bold yellow" if short else "bold")
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


# key in result.json, label, how its value is written
RESULT_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("best_accuracy", "best accuracy", percent_text),
    ("accuracy", "last accuracy", percent_text),
    ("moving_accuracy", "by server averages", percent_text),
    ("evaluation_loss", "evaluation loss", number_text),
    ("epochs", "epochs", lambda value: f"{value:,}"),
    ("examples", "examples", lambda value: f"{value:,}"),
    ("updates", "updates", lambda value: f"{value:,}"),
    ("updates_per_s", "updates/s", rate_text),
    ("elapsed_s", "time", clock_text),
    ("replicas", "replicas", lambda value: f"{value:,}"),
    ("duplicates", "duplicates", lambda value: f"{value:,}"),
    ("refused", "refused", lambda value: f"{value:,}"),
    ("dropped", "dropped", lambda value: f"{value:,}"),
)


def _result_rows(result: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Returns (label, text, style) for each row of the result table."""
    rows = []
    known = {key for key, _, _ in RESULT_ROWS}
    if isinstance(result.get("recipe"), str):
        rows.append(("recipe", str(result["recipe"]), "bold"))
    for key, label, write in RESULT_ROWS:
        value = result.get(key)
        if _is_number(value):
            style = "bold green" if key == "best_accuracy" else ""
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
    reached = result.get("reached")
    if isinstance(reached, Mapping) and reached:
        parts = [f"{float(key):.1%} {_seconds(first)}" for key, first in reached.items()]
        rows.append(("reached after", "   ".join(parts), ""))
    for key, value in result.items():
        if key in known or key in ("recipe", "run"):
            continue
        if isinstance(value, bool | str):
            rows.append((key.replace("_", " "), str(value), ""))
        elif isinstance(value, int | float):
            label, text = _measure(key, value)
            rows.append((label, text, ""))
    return rows


def _seconds(first: Mapping[str, float]) -> str:
    return f"{first['training_s']:.1f} s"


def _measure(key: str, value: float) -> tuple[str, str]:
    """Returns the label and the text of a number whose key may end in a unit."""
    if key.endswith("_s"):
        short = math.isfinite(value) and abs(value) < 60
        text = f"{value:.2f} s" if short else clock_text(value)
        return key.removesuffix("_s").replace("_", " "), text
    return key.replace("_", " "), f"{value:,}" if isinstance(value, int) else number_text(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
