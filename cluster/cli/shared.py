"""Options that several commands have, and their progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

RUNS = Path("runs")


ray_options = [
    click.option(
        "--address",
        default=None,
        help="Ray cluster to run on; without it RAY_ADDRESS, or a new one on this machine.",
    ),
    click.option(
        "--dashboard/--no-dashboard",
        default=True,
        help="Start Ray's dashboard with a cluster of our own.",
    ),
]


def with_ray_options(function: Any) -> Any:
    """Add the options that say which Ray cluster to use."""
    for option in reversed(ray_options):
        function = option(function)
    return function


def with_weights_options(function: Any) -> Any:
    """Add the options that say which weights of a run to use."""
    for option in (
        click.option("--weights", default=None, help="A file of weights, in the run or elsewhere."),
        click.option("--best/--last", default=False, help="The best weights, or the last ones."),
    ):
        function = option(function)
    return function


crops_option = click.option(
    "--crops",
    type=click.Choice(["1", "10", "144"]),
    default="1",
    show_default=True,
    help="Crops of each image whose answers are averaged.",
)


also_option = click.option(
    "--also",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run, for an ensemble; may be given several times.",
)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; gives what is told the steps done and the steps in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


def cell(value: Any) -> str:
    """A value as a cell of a table: a dash for None, numbers with four digits."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
