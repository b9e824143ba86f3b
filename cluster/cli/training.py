"""Commands that train: train, resume, scale, replay."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import click
from click.core import ParameterSource
from rich.console import Console

from downpour.cluster.cli.shared import (
    RUNS,
    with_ray_options,
)
from downpour.cluster.config import recipes
from downpour.cluster.config.options import ConfigCommand, apply, config_options
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import OptionalValue
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import MAX_REPLICAS, RunFolder
from downpour.workers.spec import DeviceName


@click.command(cls=ConfigCommand, named_by="recipe", find=recipes.find, of_data=recipes.of_data)
@config_options(RunConfig)
@click.argument("recipe")
@click.option("--name", default=None, help="Name of the run; default: recipe, date and time.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=RUNS, help="Folder that runs are kept in."
)
@with_ray_options
def train(
    recipe: str,
    name: str | None,
    runs: Path,
    address: str | None,
    dashboard: bool,
    given: dict[str, object],
) -> int:
    """Train RECIPE from the beginning. `downpour recipes` lists the recipes.

    `downpour train RECIPE --help` shows the values of that recipe.
    """
    from downpour.cluster.training import api, from_data, inputs, launch

    console = Console(stderr=True)
    config = recipes.admit(apply(recipes.find(recipe), given))
    lines: list[str] = []
    config = from_data.complete(config, given, lines.append)
    data = inputs.check_data(config)
    for line in lines:
        console.print(line, markup=False)
    folder = api.create(config, name=name, runs=runs)
    try:
        return launch.train(
            folder,
            data,
            resume=False,
            address=address,
            dashboard=dashboard,
            console=console,
        )
    except BaseException:
        folder.discard_if_unused()
        raise


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--replicas", type=click.IntRange(1, MAX_REPLICAS), help="Another number of them.")
@click.option("--partitions", type=click.IntRange(1), help="Another number of them.")
@click.option(
    "--replica-device", type=click.Choice(get_args(DeviceName)), help="Another one to compute on."
)
@click.option(
    "--stop-at-accuracy", type=OptionalValue(click.FLOAT), help="Another one to finish at, or none."
)
@click.option(
    "--patience", type=OptionalValue(click.INT), help="Another number of scorings, or none."
)
@with_ray_options
@click.pass_context
def resume(
    context: click.Context,
    run: Path,
    replicas: int | None,
    partitions: int | None,
    replica_device: DeviceName | None,
    stop_at_accuracy: float | None,
    patience: int | None,
    address: str | None,
    dashboard: bool,
) -> int:
    """Go on with the run in the folder RUN, which was stopped or died."""
    from downpour.cluster.training import change, inputs, launch

    folder = RunFolder.open(run)
    data = inputs.check_data(recipes.admit(folder.config()))
    ends = {"stop_at_accuracy": stop_at_accuracy, "patience": patience}
    default = ParameterSource.DEFAULT
    change.change(
        folder,
        data,
        replicas=replicas,
        partitions=partitions,
        device=replica_device,
        until={k: v for k, v in ends.items() if context.get_parameter_source(k) is not default},
    )
    return launch.train(
        folder,
        data,
        resume=True,
        address=address,
        dashboard=dashboard,
        console=Console(stderr=True),
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--replicas", type=click.IntRange(1, MAX_REPLICAS), required=True, help="How many.")
@click.option(
    "--wait", "wait_s", type=float, default=30.0, show_default=True, help="Seconds to wait for it."
)
def scale(run: Path, replicas: int, wait_s: float) -> int:
    """Change the number of replicas of RUN while it trains."""
    folder = RunFolder.open(run)
    from downpour.cluster.monitoring.watch import end, states

    pulse = folder.pulse()
    (ended,) = states([folder])
    if ended is not None:
        raise UserError(f"{run} is not being trained: {ended}")
    folder.ask_for_replicas(replicas)
    give_up_s = time.monotonic() + wait_s
    while time.monotonic() < give_up_s:
        time.sleep(0.1)
        status = folder.status()
        if status.get("replicas_wanted") == replicas:
            click.echo(f"{run} goes on with {replicas} replicas")
            return 0
        if end(folder, pulse) is not None:
            break
    raise UserError(
        f"{run} has not taken note of it within {wait_s:g} s: `downpour status {run}` shows "
        "whether it trains"
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def replay(run: Path) -> int:
    """Compute RUN again from its record, and compare every bit with its last checkpoint.

    RUN has to be trained with --record-pushes.
    """
    from downpour.cluster.monitoring.bars import progress_bar
    from downpour.cluster.replay.run import replay_run

    console = Console(stderr=True)
    with progress_bar("pushes", console=console) as show:
        found = replay_run(
            RunFolder.open(run),
            show,
            lambda line: console.print(line, style="yellow", markup=False),
        )
    click.echo(f"{found.pushes:,} pushes, to versions {', '.join(map(str, found.versions))}")
    for line in found.differing:
        click.echo(line)
    if found.checkpoint is None:
        click.echo("there is no checkpoint to compare with")
    elif not found.differing:
        click.echo(f"the same to the bit as checkpoint {found.checkpoint}")
    return 1 if found.differing else 0


COMMANDS = (train, resume, scale, replay)
