"""The command `downpour`, put together from the groups of its commands."""

from __future__ import annotations

import click

from downpour.cluster.cli import bench, clusters, datasets, inference, runs, training
from downpour.cluster.cli.reproduce import reproduce
from downpour.cluster.simulate.commands import simulate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="downpour")
def downpour() -> None:
    """Train batch-normalised networks asynchronously, on a partitioned parameter server."""


for _group in (training, inference, datasets, runs, clusters, bench):
    for _command in _group.COMMANDS:
        downpour.add_command(_command)
downpour.add_command(reproduce)
downpour.add_command(simulate)
