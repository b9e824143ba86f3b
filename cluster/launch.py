"""From a configuration to a finished run: starts Ray and the actors, and writes what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster import recipes
from cluster.backend import RunFailed
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.config import RunConfig, to_plain
from cluster.display import Progress, TrainingDisplay, print_result
from cluster.errors import UserError
from cluster.html_report import write_report
from cluster.report import plot_run
from cluster.run_folder import CONFIG, DATA, RECORD, RESULT, STATUS, RunFolder
from cluster.telemetry import merged_staleness
from paramserver.messages import KEY_BYTES
from paramserver.partition import Partition, split
from shuffler.decode import Decoder
from shuffler.holdings import Inventory
from shuffler.plan import Plan
from shuffler.processors import processors
from shuffler.reader import RowReader
from shuffler.records import Dataset
from workers.spec import DeviceName

SKIPPED_SHOWN = 5

if TYPE_CHECKING:
    from cluster.controller import Controller
    from cluster.members import Outcome
    from cluster.observe import Sink
    from cluster.ray_backend import RayBackend
    from cluster.ray_nodes import Nodes


@dataclass(frozen=True, kw_only=True)
class Data:
    """What opening the data tells."""

    plan: Plan
    fingerprint: str
    """Of the training split."""
    class_names: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty where the data names none."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What building the model tells."""

    partitions: tuple[Partition, ...]
    weights: npt.NDArray[np.float32]
    """Initial weights, [P]."""


def check_data(config: RunConfig) -> Data:
    """Open both splits, decode a row of each, and lay out the plan.

    Of training rows on nodes' own disks only the manifest is here; each node is asked later.
    """
    _check_split(config, config.data.eval_split, Decoder(spec=config.model.input))
    train: Dataset | Inventory
    if config.data.node_folder is None:
        train = _check_split(config, config.data.train_split, config.decoder())
    else:
        train = Inventory.read(config.data.data, config.data.train_split)
    return Data(
        plan=config.plan(train.num_rows, train.shard_rows),
        fingerprint=train.fingerprint,
        class_names=train.class_names,
    )


def _check_split(config: RunConfig, split_name: str, decoder: Decoder) -> Dataset:
    dataset = Dataset.open(config.data.data, split_name)
    num_classes = config.model.num_classes
    with contextlib.closing(RowReader(dataset, num_classes=num_classes)) as reader:
        first = np.zeros(1, np.int64)
        decoder.decode(reader.take(first), rows=first)
    return dataset


def build_model(config: RunConfig) -> _Model:
    """Initial weights, and how they are cut. This is what imports PyTorch."""
    model = config.model_spec().build_flat("cpu")
    layout = model.layout
    partitions = split(
        num_parameters=layout.num_parameters,
        num_features=layout.num_features,
        num_decayed=layout.decayed,
        num_partitions=config.server.num_partitions(layout.num_parameters),
    )
    return _Model(partitions=partitions, weights=model.weights.numpy())


def train(
    folder: RunFolder,
    data: Data,
    *,
    resume: bool,
    address: str | None,
    dashboard: bool,
    console: Any,
    age_s: float | None = None,
) -> int:
    """Train the run of `folder` to its end; returns the exit status of the process.

    `data` is what `check_data` found for its configuration. The run began `age_s` ago; None says
    that the process is for this run, and began with it.
    """
    age_s = process_age_s() if age_s is None else age_s
    began_at, began_s = time.time() - age_s, time.monotonic() - age_s
    config = folder.config()
    _check_device(config, address)
    with folder.locked():
        check_data_unchanged(folder, data)
        folder.clear_stop()  # of an earlier session
        store = CheckpointStore(folder.checkpoints_uri, config.server.partitions)
        resumed = _find_checkpoint(folder, store, console) if resume else None
        with (
            ThreadPoolExecutor(1) as pool,
            TrainingDisplay(folder.name, console=console) as display,
        ):
            display.update(Progress(elapsed_s=time.time() - began_at, phase="starting Ray"))
            # Importing PyTorch takes as long as half of Ray's start, which mostly waits; before
            # that the two would only take Python's lock from each other.
            building: list[Future[_Model]] = []
            with on_ray(
                address=address,
                dashboard=dashboard,
                meanwhile=lambda: building.append(pool.submit(build_model, config)),
            ) as dashboard_url:
                if dashboard_url:
                    console.print(f"Ray's dashboard: http://{dashboard_url}", style="dim")
                from cluster.controller import Controller

                model = building[0].result()
                nodes = _nodes(folder, config, len(model.partitions), display.update, began_at)
                backend = _backend(folder, data.plan, model, resumed, store, nodes)
                sinks = _sinks(folder, config, model)
                controller = Controller(
                    config=config,
                    plan=data.plan,
                    backend=backend,
                    folder=folder,
                    store=store,
                    show=display.update,
                    say=lambda line: console.print(line, style="yellow", markup=False),
                    sinks=sinks,
                    resumed=resumed,
                    began_s=began_s,
                )
                try:
                    with _stop_on_signals(controller):
                        outcome = controller.run()
                finally:
                    backend.stop()
                    for sink in sinks:
                        sink.close()
        if outcome.finished:
            return _conclude(folder, config, outcome, began_at, console)
        return _stopped(folder, controller.stop_reason or "stopped", outcome, console)


def _check_device(config: RunConfig, address: str | None) -> None:
    """Look for the replicas' device, where they will be on this machine alone."""
    if config.replicas.steps.device == "cpu" or ray_address(address) != "local":
        return
    from workers.device import check_device

    check_device(config.replicas.steps.device)


def _sinks(folder: RunFolder, config: RunConfig, model: _Model) -> list[Sink]:
    """Who is told the figures of the run."""
    from cluster.metrics import PrometheusSink
    from cluster.tensorboard import TensorBoardSink

    steps, policy = config.replicas.steps, config.server.policy
    itemsize = 4 if config.server.network.wire_dtype == "float32" else 2
    prometheus = PrometheusSink(
        run=folder.name,
        push_bytes=model.weights.size * itemsize,
        pull_bytes=model.weights.nbytes,
        steps_per_push=steps.n_push,
        steps_per_pull=steps.n_fetch,
        staleness_bound=policy.staleness_bound,
    )
    return [prometheus, TensorBoardSink(folder.path)]


def _nodes(
    folder: RunFolder,
    config: RunConfig,
    num_partitions: int,
    show: Callable[[Progress], None],
    began_at: float,
) -> Nodes:
    """The nodes of the cluster, once all are there that the run is to wait for."""
    from cluster.ray_nodes import Nodes

    nodes = Nodes(config.placement, config.replicas.gpu_share)
    nodes.await_all(
        config.replicas,
        num_partitions,
        config.data.shufflers,
        lambda phase: show(Progress(elapsed_s=time.time() - began_at, phase=phase)),
    )
    nodes.check_folder(folder.path)
    return nodes


def change(
    folder: RunFolder,
    data: Data,
    *,
    replicas: int | None = None,
    partitions: int | None = None,
    device: DeviceName | None = None,
) -> None:
    """Have the run go on with other numbers of these, or on another device, where given."""
    config = recipes.admit(folder.config())
    members = config.replicas
    if replicas is not None:
        members = dataclasses.replace(members, replicas=replicas)
    if device is not None:
        members = dataclasses.replace(
            members, steps=dataclasses.replace(members.steps, device=device)
        )
    try:
        config = dataclasses.replace(config, replicas=members)
    except ValueError as error:
        raise UserError(f"{folder.path} cannot go on so: {error}") from None
    with folder.locked():
        if partitions not in (None, config.server.partitions):
            config = _cut_anew(folder, config, data, partitions)
        if config != folder.config():
            folder.write_json(CONFIG, to_plain(config))


def _cut_anew(folder: RunFolder, config: RunConfig, data: Data, partitions: int) -> RunConfig:
    """The newest checkpoint for another number of partitions, and the configuration with that."""
    n_push = config.replicas.steps.n_push
    if n_push != 1 or config.policy.record_pushes:
        why = "its pushes are recorded" if config.policy.record_pushes else f"n push is {n_push}"
        raise UserError(
            f"{folder.path} cannot go on with {partitions} partitions, since {why}: leave out "
            "--partitions"
        )
    check_data_unchanged(folder, data)
    new = dataclasses.replace(
        config, server=dataclasses.replace(config.server, partitions=partitions)
    )
    store = CheckpointStore(folder.checkpoints_uri, config.server.partitions)
    checkpoint, _ = store.latest()
    build_model(new)  # where it cannot be cut so, this says so
    if checkpoint is not None:
        from cluster.repartition import repartition
        from cluster.replay import loader
        from workers.recompute import Recomputer

        repartition(
            store,
            checkpoint,
            partitions,
            config=config.update_config(data.plan),
            epochs=config.policy.epochs,
            recomputer=Recomputer(config.model_spec(), loader(config, data.plan)),
        )
    return new


def _backend(
    folder: RunFolder,
    plan: Plan,
    model: _Model,
    resumed: Checkpoint | None,
    store: CheckpointStore,
    nodes: Nodes,
) -> RayBackend:
    from cluster.ray_backend import RayBackend

    config = folder.config()
    return RayBackend(
        config=config,
        plan=plan,
        partitions=model.partitions,
        weights=model.weights,
        key=secrets.token_bytes(KEY_BYTES),
        nodes=nodes,
        num_processors=processors(),
        resumed=resumed,
        store=store,
        record=folder.path / RECORD if config.policy.record_pushes else None,
    )


def check_data_unchanged(folder: RunFolder, found: Data) -> None:
    """A run is resumed on the rows that it began with, or mini-batches would not be the same."""
    if not (folder.path / DATA).exists():
        about = {"train_fingerprint": found.fingerprint, "class_names": list(found.class_names)}
        folder.write_json(DATA, about)
    elif folder.read_json(DATA)["train_fingerprint"] != found.fingerprint:
        data = folder.config().data
        raise UserError(
            f"split {data.train_split!r} of {data.data} has changed since {folder.path} began: "
            "put the dataset back, or train a new run"
        )


def _find_checkpoint(folder: RunFolder, store: CheckpointStore, console: Any) -> Checkpoint | None:
    if (folder.path / RESULT).exists():
        raise UserError(
            f"{folder.path} is finished: its result is in {RESULT}; train a new run, or give "
            "this one more with `downpour train`"
        )
    checkpoint, passed = store.latest()
    for problem in passed:
        console.print(f"{problem}; taking the one before", style="yellow")
    if checkpoint is None:
        console.print("no checkpoint yet: starting from the beginning", style="yellow")
    else:
        console.print(
            f"resuming from checkpoint {checkpoint.number} at {checkpoint.updates:,} updates"
        )
    return checkpoint


def ray_address(given: str | None) -> str:
    """The Ray cluster to run on; `local` is one of our own on this machine."""
    return given or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def on_ray(
    *,
    address: str | None,
    dashboard: bool,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """A Ray cluster to run on: the one at `address` or in RAY_ADDRESS, or one of our own.

    Within another `on_ray` it is that one's, which is left to it. One of our own is on loopback,
    all of it. `environment` is that of the processes started there. `meanwhile` is called when
    Ray has been imported, and before it starts.
    """
    address = ray_address(address)
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # As on a Mac, where clusters are off: what Ray listens on is loopback then.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    meanwhile()
    if ray.is_initialized():
        yield ""
        return
    options: dict[str, Any] = {"include_dashboard": dashboard} if address == "local" else {}
    if environment:
        options["runtime_env"] = {"env_vars": dict(environment)}
    try:
        context = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="downpour",
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray at {address!r} cannot be reached: {error}") from None
    except Exception as error:
        if type(error) is not Exception:  # what Ray raises where its own processes come up too late
            raise
        raise UserError(f"Ray did not start: {error} Try again on a machine less busy") from None
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stop_on_signals(controller: Controller) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a checkpoint and an end; a second one ends at once."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in names}

    def ask(number: int, _: Any) -> None:
        controller.request_stop(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in names:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(folder: RunFolder, reason: str, outcome: Outcome, console: Any) -> int:
    from cluster.controller import ASKED

    status = folder.read_json(STATUS) if (folder.path / STATUS).exists() else {}
    folder.write_json(STATUS, {**status, "state": "stopped", "reason": reason})
    if reason not in (ASKED, *signal.Signals.__members__):
        raise RunFailed(f"{reason}; then go on with `downpour resume {folder.path}`")
    saved = "without a checkpoint of this session"
    if outcome.checkpoint is not None:
        saved = f"after checkpoint {outcome.checkpoint}"
    console.print(f"stopped by {reason} {saved}: go on with `downpour resume {folder.path}`")
    return 0 if reason == ASKED else 128 + signal.Signals[reason]


def _conclude(
    folder: RunFolder, config: RunConfig, outcome: Outcome, began_at: float, console: Any
) -> int:
    result = make_result(folder, config, outcome, began_at)
    folder.write_json(RESULT, result)
    status = folder.read_json(STATUS)
    folder.write_json(STATUS, {**status, "state": "finished", "accuracy": result["accuracy"]})
    plot_run(folder.path)
    write_report(folder.path)
    print_result(result, shown_path(folder.path))
    for line in result["images_skipped"][:SKIPPED_SHOWN]:
        console.print(f"skipped: {line}", style="yellow")
    more = len(result["images_skipped"]) - SKIPPED_SHOWN
    if more > 0:
        console.print(f"skipped: {more} more; {RESULT} lists them all", style="yellow")
    assert outcome.exactly_once, "a mini-batch was lost or applied twice; see result.json"
    return 0


def make_result(
    folder: RunFolder, config: RunConfig, outcome: Outcome, began_at: float
) -> dict[str, Any]:
    """What came out of a finished run, for `result.json`."""
    reports = outcome.reports
    first = [r.first_update_at for r in reports if r.first_update_at is not None]
    last = [r.last_update_at for r in reports if r.last_update_at is not None]
    updates = min(r.version for r in reports)
    session_updates = updates - outcome.updates_before
    training_s = max(last) - min(first) if first else 0.0
    staleness = merged_staleness(reports)
    evaluation = outcome.evaluation
    assert evaluation is not None
    return {
        "run": folder.name,
        "recipe": config.recipe,
        "seed": config.policy.seed,
        "accuracy": evaluation.score.accuracy,
        "best_accuracy": outcome.best_accuracy,
        "evaluation_loss": evaluation.score.loss,
        "evaluated_examples": evaluation.score.num_examples,
        "updates": updates,
        "examples": min(r.examples for r in reports),
        "epochs": config.policy.epochs,
        "replicas": config.replicas.replicas,
        "concurrent_steps": config.replicas.steps.concurrent_steps,
        "batch_size": config.data.batch_size,
        "partitions": len(reports),
        "updates_per_s": round(session_updates / training_s, 1) if training_s else None,
        "time_to_first_update_s": round(min(first) - began_at, 2) if first else None,
        "time_to_all_replicas_s": (
            round(outcome.all_replicas_at - began_at, 2) if outcome.all_replicas_at else None
        ),
        "training_s": round(training_s, 2),
        "wall_s": round(time.time() - began_at, 2),
        "elapsed_s": round(outcome.elapsed_s, 2),
        "staleness": {
            **staleness.summary(),
            "histogram": [[i, int(n)] for i, n in enumerate(staleness.counts) if n],
        },
        "batches_applied": min(r.batches_applied for r in reports),
        "batches_duplicate": sum(r.pushes_duplicate for r in reports),
        "batches_refused": outcome.refused,
        "pushes_dropped": sum(r.pushes_dropped for r in reports),
        "images_skipped": [outcome.skipped[row] for row in sorted(outcome.skipped)],
        "exactly_once": outcome.exactly_once,
        "quarantined": list(outcome.quarantined),
        "restarts": dict(outcome.restarts),
        "process_restarts": sum(outcome.restarts.values()),
    }


def process_age_s() -> float:
    """Seconds since this process was started, where the system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def shown_path(path: Path) -> str:
    """A path as short as it can be from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
