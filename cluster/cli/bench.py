"""The command `downpour bench`."""

from __future__ import annotations

import click

BENCHMARKS = (
    *("push-pull", "peers", "replicas", "inception", "simulate", "startup", "checkpoints"),
    *("chaos", "hangs", "goodput", "recovery", "standby", "shuffle", "policies", "serve"),
    *("learning", "all"),
)


@click.command()
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.option("--repeat", default=3, show_default=True, help="Rounds; medians are shown.")
@click.option("--seconds", default=10.0, show_default=True, help="Seconds that each is measured.")
@click.option("--seeds", default=3, show_default=True, help="Of learning: trainings of each peer.")
@click.option(
    "--settings-from",
    metavar="RECORD",
    help="Of learning: take each peer's best setting from this record, and search for none.",
)
@click.option("--only", multiple=True, help="Peers or sizes to run; may be given several times.")
@click.option("--quick", is_flag=True, help="Only show that it works, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: raw output and medians.")
@click.option(
    "--save", is_flag=True, help="Keep the JSON in benchmarks/results, here or in the checkout."
)
def bench(
    name: str,
    repeat: int,
    seconds: float,
    seeds: int,
    settings_from: str | None,
    only: tuple[str, ...],
    quick: bool,
    as_json: bool,
    save: bool,
) -> int:
    """Run the benchmark NAME, behind a claim of speed in the docs. The machine should be idle."""
    from downpour.benchmarks import suite
    from downpour.benchmarks.harness import BadSettings, Settings

    if quick and settings_from is not None:
        raise BadSettings(f"--settings-from {settings_from} is not for --quick: leave one out")
    settings = (
        Settings.quickly(only)
        if quick
        else Settings(
            repeat=repeat, seconds=seconds, seeds=seeds, only=only, settings_from=settings_from
        )
    )
    return suite.run(name, settings, as_json=as_json, save=save)


COMMANDS = (bench,)
