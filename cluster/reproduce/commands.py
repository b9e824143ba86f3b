"""The commands `downpour reproduce …`, as click sees them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from cluster.config import RunConfig
from cluster.errors import UserError
from cluster.options import ConfigCommand, config_options

output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the report and of what the experiment goes on from; default: runs/reproduce/…",
)


@click.group()
def reproduce() -> None:
    """Run the papers' experiments and write a report.

    What was stopped goes on where it was when the same command is given again.
    """


@reproduce.command()
@output_option
@click.option("--steps", type=click.IntRange(1), default=None, help="Steps; the paper's: 50,000.")
@click.option("--batch-size", type=int, default=None, help="Mini-batches; the paper's: of 60.")
@click.option("--learning-rate", type=float, default=None, help="The initial rate.")
@click.option("--record-every", type=int, default=None, help="Steps between two looks.")
@click.option("--seed", type=int, default=None, help="What weights and mini-batches come from.")
@click.option("--data", default=None, help="Folder or URI with the shards; default: bundled.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON at the end.")
def mnist(output: Path | None, as_json: bool, **given: Any) -> None:
    """Section 4.1: MNIST with and without batch normalization, and Figure 1."""
    import json

    import torch

    from cluster.reproduce.mnist import MnistConfig, summary, train
    from cluster.reproduce.mnist_report import make_report

    values = {name: value for name, value in given.items() if value is not None}
    try:
        config = MnistConfig(**values)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = output or Path("runs", "reproduce", "mnist")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    show = progress(console, config.steps, variants=2)
    try:
        found = train(config, folder / "state", show=show)
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from what was saved")
        raise
    page = make_report(folder, config, found, command_line())
    if as_json:
        click.echo(json.dumps(summary(config, found)))
    click.echo(str(page))


address_option = click.option(
    "--address",
    default=None,
    help="Ray cluster to run on; without it RAY_ADDRESS, or a new one on this machine.",
)


@reproduce.command(cls=ConfigCommand)
@config_options(RunConfig)
@output_option
@address_option
def inception(output: Path | None, address: str | None, given: dict[str, object]) -> int:
    """Section 4.2: the five variants and the two failures, Figures 2 and 3.

    Options scale all runs alike: `--width 0.25 --image-size 32 --epochs 10` is for a small machine.
    """
    from cluster.reproduce.family import family, make_report
    from cluster.reproduce.runs import curve_of, train_all

    folder = output or Path("runs", "reproduce", "inception")
    runs = family(given)
    status = train_all(runs, folder / "runs", address=address, console=Console(stderr=True))
    if status:
        return status
    curves = {name: curve_of(folder / "runs" / name) for name in runs}
    click.echo(str(make_report(folder, runs, curves, command_line())))
    return 0


@reproduce.command(cls=ConfigCommand)
@config_options(RunConfig)
@output_option
@address_option
@click.option(
    "--crops",
    "most_crops",
    type=click.Choice(["1", "10", "144"]),
    default="144",
    show_default=True,
    help="Most crops of an image.",
)
@click.option("--rows", type=click.IntRange(1), default=None, help="Images to score; default: all.")
def ensemble(
    output: Path | None,
    address: str | None,
    most_crops: str,
    rows: int | None,
    given: dict[str, object],
) -> int:
    """Section 4.2.3: one crop, 10 and 144, and the average of six networks; Figure 4."""
    from cluster.reproduce.ensemble import errors, make_report, members
    from cluster.reproduce.runs import train_all

    folder = output or Path("runs", "reproduce", "ensemble")
    runs, console = members(given), Console(stderr=True)
    status = train_all(runs, folder / "runs", address=address, console=console)
    if status:
        return status
    paths = [folder / "runs" / name for name in runs]
    crops = [count for count in (1, 10, 144) if count <= int(most_crops)]
    found = errors(paths, crops=crops, rows=rows, show=console.print)
    click.echo(str(make_report(folder, runs, found, command_line())))
    return 0


def command_line() -> str:
    """The command as a user would type it again."""
    return shlex.join(["downpour", *sys.argv[1:]])


def progress(
    console: Console, steps: int, *, variants: int, every_s: float = 5.0
) -> Callable[[str, int], None]:
    """What shows how far an experiment is, and the time left, once in `every_s`."""
    done: dict[str, int] = {}
    first: dict[str, tuple[float, int]] = {}
    last_s = 0.0

    def show(variant: str, step: int) -> None:
        nonlocal last_s
        now = time.monotonic()
        first.setdefault(variant, (now, step))
        done[variant] = step
        if now - last_s < every_s and step < steps:
            return
        last_s = now
        since, before = first[variant]
        rate = (step - before) / (now - since) if now > since else 0.0
        left = steps * variants - sum(done.values())
        eta = f"{left / rate / 60:.1f} min left" if rate else "–"
        console.print(
            f"{variant}: {step:,} of {steps:,} steps  {rate:,.0f} steps/s  {eta}",
            highlight=False,
        )

    return show
