"""The commands of `downpour`, as click sees them. Each is a few lines over what does the work."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from cluster import recipes
from cluster.cluster_commands import COMMANDS
from cluster.config import ROOT, RunConfig
from cluster.errors import UserError
from cluster.inspection import InspectConfig
from cluster.options import ConfigCommand, apply, config_options
from cluster.reproduce.commands import reproduce
from cluster.run_folder import CONFIG, MAX_REPLICAS, RESULT, STATUS, RunFolder
from cluster.serving import ServeConfig
from cluster.simulate.commands import simulate
from shuffler.ingest import IngestConfig
from workers.spec import DeviceName

RUNS = Path("runs")
BENCHMARKS = (
    *("push-pull", "peers", "replicas", "simulate", "startup", "checkpoints", "chaos"),
    *("recovery", "shuffle", "policies"),
    "all",
)

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="downpour")
def downpour() -> None:
    """Train batch-normalised networks asynchronously, on a sharded parameter server."""


@downpour.command(cls=ConfigCommand)
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
    """Train RECIPE from the beginning. `downpour recipes` lists the recipes."""
    from cluster import launch

    config = apply(recipes.find(recipe), given)
    data = launch.check_data(config)
    folder = RunFolder.create(
        runs / (name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"), config
    )
    try:
        return launch.train(
            folder,
            data,
            resume=False,
            address=address,
            dashboard=dashboard,
            console=Console(stderr=True),
        )
    except Exception:
        folder.discard_if_unused()
        raise


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--replicas", type=click.IntRange(1, MAX_REPLICAS), help="Another number of them.")
@click.option("--partitions", type=click.IntRange(1), help="Another number of them.")
@click.option(
    "--replica-device", type=click.Choice(get_args(DeviceName)), help="Another one to compute on."
)
@with_ray_options
def resume(
    run: Path,
    replicas: int | None,
    partitions: int | None,
    replica_device: DeviceName | None,
    address: str | None,
    dashboard: bool,
) -> int:
    """Go on with RUN, the folder of a run that was stopped or died."""
    from cluster import launch

    folder = RunFolder.open(run)
    data = launch.check_data(recipes.admit(folder.config()))
    launch.change(folder, data, replicas=replicas, partitions=partitions, device=replica_device)
    return launch.train(
        folder,
        data,
        resume=True,
        address=address,
        dashboard=dashboard,
        console=Console(stderr=True),
    )


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--replicas", type=click.IntRange(1, MAX_REPLICAS), required=True, help="How many.")
@click.option(
    "--wait", "wait_s", type=float, default=30.0, show_default=True, help="Seconds to wait for it."
)
def scale(run: Path, replicas: int, wait_s: float) -> int:
    """Have RUN, which is training, go on with another number of replicas."""
    folder = RunFolder.open(run)
    if not folder.held():
        raise UserError(f"{run} is not being trained: `downpour resume {run}` goes on with it")
    folder.ask_for_replicas(replicas)
    give_up_s = time.monotonic() + wait_s
    while time.monotonic() < give_up_s:
        time.sleep(0.1)
        status = folder.read_json(STATUS) if (folder.path / STATUS).exists() else {}
        if status.get("replicas_wanted") == replicas:
            click.echo(f"{run} goes on with {replicas} replicas")
            return 0
        if not folder.held():
            break
    raise UserError(
        f"{run} has not taken note of it within {wait_s:g} s: `downpour status {run}` shows "
        "whether it trains"
    )


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
def replay(run: Path) -> int:
    """Compute RUN again from its record, and compare it to the bit with its last checkpoint.

    For runs that were trained with --record-pushes.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from cluster.replay import replay_run

    folder = RunFolder.open(run)
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pushes", total=None)
        found = replay_run(
            folder,
            lambda done, total: bar.update(task, completed=done, total=total),
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


@downpour.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_weights_options
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option("--split", default=None, help="Split to score; default: the run's evaluation split.")
@crops_option
def evaluate(
    runs: tuple[Path, ...],
    best: bool,
    weights: str | None,
    data: str | None,
    split: str | None,
    crops: str,
) -> None:
    """Score the weights of one of RUNS, or of several as an ensemble, on a split.

    Batch normalization uses the statistics that the server kept. Class probabilities are averaged
    over the crops of an image and over the networks.
    """
    from cluster import inference

    loaded = [inference.load(run, best=best, weights=weights) for run in runs]
    score = inference.evaluate(loaded, data=data, split=split, crops=int(crops))
    click.echo(json.dumps(score))


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option("--split", default=None, help="Split to use; default: the run's training split.")
@click.option(
    "--batches", default=500, show_default=True, type=click.IntRange(1), help="Mini-batches."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write; default: recalibrated.safetensors in RUN.",
)
def recalibrate(
    run: Path,
    best: bool,
    weights: str | None,
    data: str | None,
    split: str | None,
    batches: int,
    output: Path | None,
) -> None:
    """Recompute the BN statistics of RUN on any dataset (Algorithm 2), its weights as they are.

    The other commands take the result with `--weights`.
    """
    from cluster import inference

    loaded = inference.load(run, best=best, weights=weights)
    told = inference.recalibrate(loaded, data=data, split=split, batches=batches, output=output)
    click.echo(json.dumps(told))


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_weights_options
@also_option
@crops_option
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to show."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    run: Path,
    images: tuple[Path, ...],
    best: bool,
    weights: str | None,
    also: tuple[Path, ...],
    crops: str,
    top: int,
    as_json: bool,
) -> None:
    """Tell the most probable classes of IMAGES (files), by the weights of RUN."""
    from cluster import inference
    from workers.predictor import Predictor

    files = inference.read_images(images)
    loaded = [inference.load(path, best=best, weights=weights) for path in (run, *also)]
    predictor = Predictor([one.network for one in loaded], crops=int(crops))
    names = [str(path) for path in images]
    answers = inference.predict(predictor, loaded[0].class_names, files, names, top=top)
    if as_json:
        pairs = zip(names, answers, strict=True)
        click.echo(json.dumps([{"image": n, "predictions": found} for n, found in pairs]))
        return
    for name, found in zip(names, answers, strict=True):
        told = "  ".join(f"{p['class']} {p['probability']:.1%}" for p in found)
        click.echo(f"{name}: {told}")


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@click.option(
    "--format", "kind", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write; default: model.onnx or model.pt2 in RUN.",
)
@click.option("--data", default=None, help="Folder or URI with the shards; default: the run's.")
@click.option(
    "--batches",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Mini-batches that the BN statistics are checked on.",
)
@click.option(
    "--max-disagreement",
    default="0.25",
    show_default=True,
    metavar="FLOAT|none",
    help="Most that moving and recomputed statistics may differ, in standard deviations.",
)
def export(
    run: Path,
    best: bool,
    weights: str | None,
    kind: Any,
    output: Path | None,
    data: str | None,
    batches: int,
    max_disagreement: str,
) -> None:
    """Write the network of RUN, its batch normalization folded, for other programs.

    The file is read back and compared with the checkpoint before it is kept.
    """
    try:
        bound = None if max_disagreement.lower() == "none" else float(max_disagreement)
    except ValueError:
        raise UserError(f"--max-disagreement {max_disagreement}: give a number, or none") from None
    from cluster import export as exporting
    from cluster import inference

    loaded = inference.load(run, best=best, weights=weights)
    path = output or loaded.folder.path / f"model{exporting.SUFFIX[kind]}"
    told = exporting.export(
        loaded, path, format=kind, data=data, batches=batches, max_disagreement=bound
    )
    click.echo(json.dumps(told))


@downpour.command(cls=ConfigCommand)
@config_options(ServeConfig)
@click.argument("run", type=click.Path(path_type=Path))
@with_weights_options
@also_option
@click.option(
    "--address",
    default=None,
    help="Ray cluster to run on; without it RAY_ADDRESS, or a new one on this machine.",
)
def serve(
    run: Path,
    best: bool,
    weights: str | None,
    also: tuple[Path, ...],
    address: str | None,
    given: dict[str, object],
) -> None:
    """Answer images over HTTP with the classes that RUN finds in them, until interrupted.

    Callers have to show a key: a new one for each deployment, or the one in --key-file. The file
    that is named at the start holds it as the header that they send.
    """
    from cluster import serving

    config = apply(ServeConfig(), given)
    runs = (run, *also)
    with serving.serving(runs, best=best, weights=weights, config=config, address=address) as told:
        url, header = told
        click.echo(f"serving {run} at {url}")
        click.echo(f"try: curl -H @{header} --data-binary @image.jpg {url}/predict")
        sys.stdout.flush()
        serving.wait_for_signal()


@downpour.command(cls=ConfigCommand)
@config_options(IngestConfig)
@click.argument("source")
@click.argument("destination")
def ingest(source: str, destination: str, given: dict[str, object]) -> None:
    """Make a dataset in DESTINATION from SOURCE, its rows shuffled once.

    SOURCE is a folder of IDX files (MNIST's), of CIFAR's binary files, of a folder for each class
    (ImageNet's layout, with its class list and validation ground truth), or of Parquet in the
    Hugging Face convention. Both may be URIs of pyarrow.fs, such as s3://bucket/folder.
    """
    from shuffler.ingest import ingest as write

    with _bar("shuffling rows") as show:
        manifest = write(source, destination, apply(IngestConfig(), given), progress=show)
    for name, split in manifest.splits.items():
        size = sum(shard.num_bytes for shard in split.shards)
        click.echo(f"{name}: {split.num_rows:,} rows, {size:,} bytes, {len(split.shards)} file(s)")


@downpour.command(cls=ConfigCommand)
@config_options(InspectConfig)
@click.argument("data")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    default=None,
    help="Save a mini-batch as a picture, varied as in training.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(data: str, sheet: Path | None, as_json: bool, given: dict[str, object]) -> None:
    """Show what the dataset DATA holds, and how a strategy mixes it."""
    from cluster import inspection

    config = apply(InspectConfig(), given)
    with _bar("counting pairs") as show:
        found = inspection.inspect(data, config, progress=show)
    if sheet is not None:
        found["sheet"] = {
            "path": str(sheet),
            "images": inspection.contact_sheet(data, config, sheet),
        }
    if as_json:
        click.echo(json.dumps(found))
    else:
        inspection.show(found, Console())


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
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


@downpour.command(cls=ConfigCommand, name="recipes")
@config_options(RunConfig)
@click.argument("recipe", required=False)
def list_recipes(recipe: str | None, given: dict[str, object]) -> None:
    """List the recipes; or show RECIPE, with options if any: its network and all its values."""
    if recipe is not None:
        from cluster.describe import describe

        describe(apply(recipes.find(recipe), given), Console())
        return
    if given:
        raise UserError("options say nothing without a recipe: name one to see it with them")
    table = Table(box=None, pad_edge=False, show_header=False)
    for known in recipes.RECIPES.values():
        table.add_row(f"[bold]{known.name}[/bold]", known.summary)
    Console().print(table)


@downpour.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=RUNS, help="Folder that runs are kept in."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path | None, runs: Path, as_json: bool) -> None:
    """Show where RUN stands; without one, where all runs stand."""
    if run is not None:
        folders = [RunFolder.open(run)]
    else:
        found = sorted(runs.iterdir()) if runs.is_dir() else []
        folders = [RunFolder.open(path) for path in found if (path / CONFIG).is_file()]
        if not folders and not as_json:
            click.echo(f"no runs in {runs}: `downpour train mnist-bn` makes one")
            return
    rows = [run_status(folder) for folder in folders]
    if as_json:
        click.echo(json.dumps(rows if run is None else rows[0]))
        return
    table = Table(box=None, pad_edge=False)
    columns = ("run", "recipe", "state", "epoch", "updates", "loss", "accuracy")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table)


def run_status(folder: RunFolder) -> dict[str, Any]:
    """Where a run stands. One that says it is training, but that nobody holds, has died."""
    status: dict[str, Any] = {"run": folder.name, "recipe": folder.config().recipe}
    if (folder.path / STATUS).exists():
        status |= folder.read_json(STATUS)
    if (folder.path / RESULT).exists():
        status |= {"state": "finished", "accuracy": folder.read_json(RESULT)["accuracy"]}
    elif status.get("state") != "stopped" and not folder.held():
        status["state"] = "died: `downpour resume` goes on with it"
    return status


@downpour.command()
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.option("--repeat", default=3, show_default=True, help="Rounds; medians are shown.")
@click.option("--seconds", default=10.0, show_default=True, help="Seconds that each is measured.")
@click.option("--only", multiple=True, help="Peers or sizes to run; may be given several times.")
@click.option("--quick", is_flag=True, help="Only show that it works, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: raw output and medians.")
@click.option("--save", is_flag=True, help="Keep the JSON in benchmarks/results/.")
def bench(
    name: str,
    repeat: int,
    seconds: float,
    only: tuple[str, ...],
    quick: bool,
    as_json: bool,
    save: bool,
) -> int:
    """Measure NAME, on a machine that does nothing else: the claims of speed behind the docs."""
    if str(ROOT) not in sys.path:  # the installed command knows the distribution's packages only
        sys.path.append(str(ROOT))
    spec = importlib.util.find_spec("benchmarks")
    if spec is None or spec.origin != str(ROOT / "benchmarks" / "__init__.py"):
        found = "are not there" if spec is None else f"would come from {spec.origin}"
        raise UserError(f"the benchmarks of {ROOT} {found}: run `make bench` in a checkout")
    from benchmarks import suite
    from benchmarks.harness import Settings

    settings = (
        Settings.quickly(only) if quick else Settings(repeat=repeat, seconds=seconds, only=only)
    )
    return suite.run(name, settings, as_json=as_json, save=save)


downpour.add_command(reproduce)
downpour.add_command(simulate)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


for _command in COMMANDS:
    downpour.add_command(_command)
