"""From a configuration to a finished run: starts Ray and the actors, and writes what came out."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.resolve import Facts, RunSpecs, resolve
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.display import TrainingDisplay
from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore, partitions_before
from downpour.cluster.run.folder import RECORD, RESOLVED, RESULT, RunFolder
from downpour.cluster.training.inputs import Data, Model, build_model, check_data_unchanged
from downpour.cluster.training.result import conclude, stopped
from downpour.cluster.training.session import on_ray, ray_address
from downpour.paramserver.messages import KEY_BYTES
from downpour.shuffler.processors import processors

if TYPE_CHECKING:
    from downpour.cluster.controller.controller import Controller
    from downpour.cluster.monitoring.observation import Sink
    from downpour.cluster.ray_backend.backend import RayBackend
    from downpour.cluster.ray_backend.nodes import Nodes


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
        before = partitions_before(folder) if resume else config.server.partitions
        store = CheckpointStore(folder.checkpoints_uri, before)
        resumed = _find_checkpoint(folder, store, console) if resume else None
        with (
            ThreadPoolExecutor(1) as pool,
            TrainingDisplay(folder.name, console=console) as display,
        ):
            display.update(Progress(elapsed_s=time.time() - began_at, phase="starting Ray"))
            # Importing PyTorch takes as long as half of Ray's start, which mostly waits; before
            # that the two would only take Python's lock from each other.
            building: list[Future[Model]] = []
            with on_ray(
                address=address,
                dashboard=dashboard,
                meanwhile=lambda: building.append(pool.submit(build_model, config)),
            ) as dashboard_url:
                if dashboard_url:
                    console.print(f"Ray's dashboard: http://{dashboard_url}", style="dim")
                from downpour.cluster.controller.controller import Controller

                model = building[0].result()
                partitions = config.server.num_partitions(
                    model.num_parameters, processors(), before
                )
                nodes = _nodes(folder, config, partitions, display.update, began_at)
                specs = resolve(config, _facts(folder, config, data, model, partitions, nodes))
                nodes.check_room(specs.resolved.processes)
                folder.write_json(RESOLVED, asdict(specs.resolved))
                backend = _backend(config, specs, model, resumed, store, nodes)
                sinks = _sinks(folder, config, model)
                controller = Controller(
                    config=config,
                    plan=specs.plan,
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
            return conclude(folder, config, outcome, began_at, console)
        return stopped(folder, controller.stop_reason or "stopped", outcome, console)


def _check_device(config: RunConfig, address: str | None) -> None:
    """Look for the replicas' device, where they will be on this machine alone."""
    if config.replicas.steps.device == "cpu" or ray_address(address) != "local":
        return
    from downpour.workers.step.device import check_device

    check_device(config.replicas.steps.device)


def _sinks(folder: RunFolder, config: RunConfig, model: Model) -> list[Sink]:
    """Who is told the figures of the run."""
    from downpour.cluster.monitoring.prometheus import PrometheusSink
    from downpour.cluster.monitoring.tensorboard import TensorBoardSink

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
    from downpour.cluster.ray_backend.nodes import Nodes

    nodes = Nodes(config.placement, config.replicas.gpu_share)
    nodes.await_all(
        config.replicas,
        num_partitions,
        config.data.shufflers,
        lambda phase: show(Progress(elapsed_s=time.time() - began_at, phase=phase)),
    )
    nodes.check_folder(folder.path)
    return nodes


def _facts(
    folder: RunFolder,
    config: RunConfig,
    data: Data,
    model: Model,
    num_partitions: int,
    nodes: Nodes,
) -> Facts:
    """What the data, the network and the cluster are."""
    return Facts(
        num_rows=data.plan.num_rows,
        shard_rows=data.plan.shard_rows,
        num_parameters=model.num_parameters,
        num_features=model.num_features,
        num_decayed=model.num_decayed,
        num_partitions=num_partitions,
        num_nodes=nodes.count,
        num_processors=nodes.processors(processors()),
        gpu_places=nodes.gpu_places(),
        record=str(folder.path / RECORD) if config.policy.record_pushes else None,
    )


def _backend(
    config: RunConfig,
    specs: RunSpecs,
    model: Model,
    resumed: Checkpoint | None,
    store: CheckpointStore,
    nodes: Nodes,
) -> RayBackend:
    from downpour.cluster.ray_backend.backend import RayBackend

    return RayBackend(
        config=config,
        specs=specs,
        weights=model.weights,
        key=secrets.token_bytes(KEY_BYTES),
        nodes=nodes,
        resumed=resumed,
        store=store,
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


def process_age_s() -> float:
    """Seconds since this process was started, where the system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
