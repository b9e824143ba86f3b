"""Progress of a loop whose length is known: a bar on a terminal, lines elsewhere if asked for.

Not here: the progress of a training run (`display`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from downpour.cluster.monitoring.texts import clock_text, rate_text

LINES_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal."""

Show = Callable[[int, int | None], None]
"""Is told the steps done, and the steps in all if that is known."""


@contextlib.contextmanager
def progress_bar(
    what: str,
    *,
    console: Console | None = None,
    lines_every_s: float | None = LINES_EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Show]:
    """Show how far a loop is.

    Args:
        what: what is counted, in the plural.
        console: where to show it; None takes stderr.
        lines_every_s: seconds between two lines if there is no terminal; None shows none there.
        clock: seconds, monotonic.

    Yields:
        What to call with the steps done and the steps in all, as often as one likes.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _ignore if lines_every_s is None else _lines(what, console, lines_every_s, clock)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)

    def show(done: int, total: int | None) -> None:
        bar.start()  # not before the first call: what refuses its work shows no bar
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


def _ignore(done: int, total: int | None) -> None:
    pass


def _lines(what: str, console: Console, every_s: float, clock: Callable[[], float]) -> Show:
    """Print a line every `every_s`, with the rate and the time left."""
    began: tuple[float, int] | None = None
    last_s = clock()

    def show(done: int, total: int | None) -> None:
        nonlocal began, last_s
        now_s = clock()
        if began is None:
            began = (now_s, done)  # what was done before says nothing of the rate
        if now_s - last_s < every_s:
            return
        last_s = now_s
        seconds, steps = now_s - began[0], done - began[1]
        line = f"{done:,} {what}" if total is None else f"{done:,} of {total:,} {what}"
        if seconds > 0 and steps > 0:
            line += f"  {rate_text(steps / seconds)} a second"
            if total is not None:
                line += f"  {clock_text((total - done) * seconds / steps)} left"
        console.print(line, highlight=False, soft_wrap=True)

    return show
