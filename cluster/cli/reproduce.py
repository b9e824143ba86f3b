"""The commands `downpour reproduce …`, as click sees them."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from downpour.cluster.config import inception_recipes
from downpour.cluster.config.options import ConfigCommand, config_options
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import TupleValue
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.bars import Show, progress_bar
from downpour.cluster.reproduce.choices.choice import CHOICES

ConfigT = TypeVar("ConfigT")

LINES_EVERY_S = 5.0
"""Between two lines on how far an experiment is, if there is no terminal."""

output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the report and of what the experiment goes on from; default: runs/reproduce/…",
)


def _made_of(kind: Callable[..., ConfigT], given: Mapping[str, Any]) -> ConfigT:
    """The configuration with what was given of it.

    Raises:
        UserError: A value is out of its range.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from None


@contextlib.contextmanager
def _steps_shown(console: Console) -> Iterator[Show]:
    """Show the steps of an experiment that computes here, on one thread, and goes on if stopped."""
    import torch

    torch.set_num_threads(1)
    try:
        with progress_bar("steps", console=console, lines_every_s=LINES_EVERY_S) as show:
            yield show
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from what was saved")
        raise


@click.group()
def reproduce() -> None:
    """Run the papers' experiments and write a report.

    An experiment that was stopped goes on if the same command is given again.
    """


@reproduce.command()
@output_option
@click.option("--steps", type=click.IntRange(1), default=None, help="Steps; the paper's: 50,000.")
@click.option("--batch-size", type=int, default=None, help="Mini-batches; the paper's: of 60.")
@click.option("--learning-rate", type=float, default=None, help="The rate, at the beginning.")
@click.option("--final-rate", type=float, default=None, help="The share of it left at the end.")
@click.option("--init-std", type=float, default=None, help="Of the initial weights.")
@click.option("--record-every", type=int, default=None, help="Steps between two looks.")
@click.option("--seed", type=int, default=None, help="What weights and mini-batches come from.")
@click.option("--data", default=None, help="Folder or URI with the shards; default: bundled.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON at the end.")
def mnist(output: Path | None, as_json: bool, **given: Any) -> None:
    """Section 4.1: MNIST with and without batch normalization, and Figure 1."""
    import json

    from downpour.cluster.reproduce.mnist.experiment import VARIANTS, MnistConfig, summary, train
    from downpour.cluster.reproduce.mnist.page import make_report

    config = _made_of(MnistConfig, given)
    folder = output or Path("runs", "reproduce", "mnist")
    done = dict.fromkeys(VARIANTS, 0)
    with _steps_shown(Console(stderr=True)) as show:

        def told(variant: str, step: int) -> None:
            done[variant] = step
            show(sum(done.values()), len(done) * config.steps)

        found = train(config, folder / "state", show=told)
    page = make_report(folder, config, found, command_line())
    if as_json:
        click.echo(json.dumps(summary(config, found)))
    click.echo(str(page))


@reproduce.command(name="mnist-choices")
@output_option
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([choice.name for choice in CHOICES]),
    metavar="CHOICE",
    help="Train nets of this choice only; may be given several times.",
)
@click.option("--seeds", type=int, default=None, help="Nets of each choice; default: 3.")
@click.option("--steps", type=int, default=None, help="Steps; the paper's: 50,000.")
@click.option("--batch-size", type=int, default=None, help="Mini-batches; the paper's: of 60.")
@click.option("--record-every", type=int, default=None, help="Steps between two looks.")
@click.option("--data", default=None, help="Folder or URI with the shards; default: bundled.")
@click.option(
    "--grey",
    default=None,
    help="Folder or URI with MNIST's grey images, for choices of other pixels.",
)
def mnist_choices(output: Path | None, only: tuple[str, ...], **given: Any) -> None:
    """What section 4.1 leaves open, one choice at a time, over several seeds.

    Rate, decay and momentum, initial weights, pixels, where BN stands, and the loss. Nets are
    trained several at once, on one thread. A look at fewer steps is `--steps 15000 --seeds 1`.
    """
    from downpour.cluster.reproduce.choices.choice import ChoicesConfig
    from downpour.cluster.reproduce.choices.page import make_report
    from downpour.cluster.reproduce.choices.training import train

    config = _made_of(ChoicesConfig, {"only": only, **given})
    folder = output or Path("runs", "reproduce", "mnist-choices")
    console = Console(stderr=True)
    if config.left_out:
        names = ", ".join(choice.name for choice in config.left_out)
        console.print(f"left out without --grey: {names}", style="yellow", markup=False)
    with _steps_shown(console) as show:
        records = train(config, folder / "state", show=show)
    click.echo(str(make_report(folder, config, records, command_line())))


address_option = click.option(
    "--address",
    default=None,
    help="Ray cluster to run on; without it RAY_ADDRESS, or a new one on this machine.",
)


@reproduce.command(cls=ConfigCommand)
@config_options(RunConfig)
@output_option
@address_option
@click.option(
    "--search-rates",
    type=TupleValue(click.FLOAT),
    default=None,
    help="Choose Inception's rate among these, by a short run at each, before all else.",
)
@click.option(
    "--search-epochs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Epochs of each of those runs.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*inception_recipes.VARIANTS, *inception_recipes.FAILURES]),
    help="Train and report on this variant and Inception only; may be given several times.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs of each variant; the two failures have one.",
)
@click.option(
    "--all-in-flight",
    multiple=True,
    type=click.Choice(inception_recipes.VARIANTS),
    help="Train this variant with every step in flight besides; may be given several times.",
)
def inception(
    output: Path | None,
    address: str | None,
    search_rates: tuple[float, ...] | None,
    search_epochs: int,
    only: tuple[str, ...],
    seeds: int,
    all_in_flight: tuple[str, ...],
    given: dict[str, object],
) -> int:
    """Section 4.2: the five variants and the two failures, Figures 2 and 3.

    `--learning-rate`, `--decay-epochs` and `--weight-decay` are Inception's. Those of the other
    variants follow in the paper's proportions. All other options are the same for all runs: for
    a small machine, give `--width 0.25 --image-size 32 --epochs 10`.
    """
    from downpour.cluster.reproduce.family.experiment import best_rate, family, trials
    from downpour.cluster.reproduce.family.page import make_report
    from downpour.cluster.reproduce.runs import curve_of, train_all

    if search_rates and "learning_rate" in given:
        raise UserError("--learning-rate and --search-rates: give one of the two")
    folder, console = output or Path("runs", "reproduce", "inception"), Console(stderr=True)
    tried = {}
    if search_rates:
        short = trials(given, search_rates, search_epochs)
        names = {f"rate-{rate:g}": config for rate, config in short.items()}
        status = train_all(names, folder / "search", address=address, console=console)
        if status:
            return status
        tried = {rate: curve_of(folder / "search" / f"rate-{rate:g}") for rate in short}
        classes = next(iter(short.values())).model.num_classes
        given = {**given, "learning_rate": best_rate(tried, 1 / classes)}
        console.print(f"Inception's rate is {given['learning_rate']:g}")
    runs = family(given, only, seeds=seeds, all_in_flight=all_in_flight)
    status = train_all(runs, folder / "runs", address=address, console=console)
    if status:
        return status
    curves = {name: curve_of(folder / "runs" / name) for name in runs}
    click.echo(str(make_report(folder, runs, curves, command_line(), tried=tried)))
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
@click.option(
    "--members",
    type=click.IntRange(1, len(inception_recipes.ENSEMBLE)),
    default=len(inception_recipes.ENSEMBLE),
    show_default=True,
    help="Train the first so many networks only.",
)
def ensemble(
    output: Path | None,
    address: str | None,
    most_crops: str,
    rows: int | None,
    members: int,
    given: dict[str, object],
) -> int:
    """Section 4.2.3: one crop, 10 and 144, and the average of six networks; Figure 4.

    The networks are trained on random crops, as the paper's were. `--no-random-crop` shows what
    crops at evaluation are worth without: `--min-area` is the least share of an image in a crop.
    """
    from downpour.cluster.reproduce import ensemble as experiment
    from downpour.cluster.reproduce.runs import train_all

    folder = output or Path("runs", "reproduce", "ensemble")
    runs, console = experiment.members(given, members), Console(stderr=True)
    warning = experiment.unseen_sizes(runs, int(most_crops))
    if warning is not None:
        console.print(warning, style="yellow", markup=False)
    status = train_all(runs, folder / "runs", address=address, console=console)
    if status:
        return status
    paths = [folder / "runs" / name for name in runs]
    crops = [count for count in (1, 10, 144) if count <= int(most_crops)]
    with progress_bar("images", console=console, lines_every_s=LINES_EVERY_S) as show:
        found = experiment.errors(paths, crops=crops, rows=rows, show=console.print, progress=show)
    click.echo(str(experiment.make_report(folder, runs, found, command_line())))
    return 0


@reproduce.command(cls=ConfigCommand)
@config_options(RunConfig)
@output_option
@address_option
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each kind."
)
@click.option(
    "--looks",
    type=click.IntRange(2),
    default=10,
    show_default=True,
    help="Versions of a run that are scored with all statistics.",
)
def asynchrony(
    output: Path | None, address: str | None, seeds: int, looks: int, given: dict[str, object]
) -> int:
    """What the paper could not show: whose BN statistics, and which shuffling, on 50 steps.

    The MNIST net is trained with 1, 10 and 50 steps in flight, and scored with the statistics of
    one replica, of all, of the server and of Algorithm 2. It is also trained under several ways of
    shuffling.
    """
    from downpour.cluster.reproduce.asynchrony import experiment
    from downpour.cluster.reproduce.asynchrony.page import make_report
    from downpour.cluster.reproduce.runs import curve_of, train_all

    folder, console = output or Path("runs", "reproduce", "asynchrony"), Console(stderr=True)
    flights = experiment.flight_runs(given, range(seeds))
    data = next(iter(flights.values())).data
    shards = {
        by_class: experiment.write_shards(
            data.data,
            folder / "data" / ("by-class" if by_class else "stored"),
            train_split=data.train_split,
            eval_split=data.eval_split,
            by_class=by_class,
        ).absolute()
        for by_class in (False, True)
    }
    runs = flights | experiment.shuffle_runs(given, range(seeds), shards)
    status = train_all(runs, folder / "runs", address=address, console=console)
    if status:
        return status
    curves = {name: curve_of(folder / "runs" / name) for name in runs}
    failed = [f"{name} ({curve.failure})" for name, curve in curves.items() if curve.failure]
    if failed:
        raise UserError(f"{failed[0]} did not end: give a lower --learning-rate")
    measured = {}
    for number, name in enumerate(flights, 1):
        console.print(f"{name}: computed again and scored ({number} of {len(flights)})")
        with progress_bar("pushes", console=console, lines_every_s=LINES_EVERY_S) as show:
            measured[name] = experiment.measure(
                folder / "runs" / name,
                looks=looks,
                progress=show,
                say=lambda line: console.print(line, style="yellow", markup=False),
            )
    page = make_report(folder, runs, measured, curves, seeds=seeds, command=command_line())
    click.echo(str(page))
    return 0


def command_line() -> str:
    """Return the command as a user would type it again."""
    return shlex.join(["downpour", *sys.argv[1:]])
