"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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


orientation_option = click.option(
    "--orientation",
    type=click.Choice(["follow", "ignore"]),
    default=None,
    help="Whether photos are turned upright as their EXIF orientation says; default: as the run "
    "was trained.",
)


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
