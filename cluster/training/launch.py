"""A session of a run, from its folder to its end.

    train               the whole of a session, with the run's folder locked
      _check_step       tries a user's network and loss
      _open             what the folder says: configuration, checkpoint to go on from
      _train_on_ray     starts Ray; PyTorch is imported and the network built meanwhile
        _resolve        looks at the cluster, and gives every actor its spec
        _control        starts the actors, and lets the controller train
      conclude, stopped what is left of it (`result`)

Not here: decisions while it trains (`cluster.controller`), and how actors are started and reached
(`cluster.ray_backend`).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.paths import ROOT
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.resolve import Facts, RunSpecs, resolve
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.display import TrainingDisplay
from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.run.checkpoint import (
    Checkpoint,
    CheckpointStore,
    going_on,
    partitions_before,
)
from downpour.cluster.run.folder import MEMBERS, RECORD, RESOLVED, RESULT, RunFolder
from downpour.cluster.training.inputs import Data, Model, build_model, check_data_unchanged
from downpour.cluster.training.process import process_age_s, stop_on_signals
from downpour.cluster.training.result import conclude, stopped
from downpour.cluster.training.session import on_ray, ray_address
from downpour.paramserver.messages import KEY_BYTES
from downpour.paramserver.transport.names import BYTES_AN_ELEMENT
from downpour.shuffler.processors import processors

if TYPE_CHECKING:
    from downpour.cluster.controller.protocol.instructions import RunOutcome
    from downpour.cluster.monitoring.observation import Onlooker, Sink
    from downpour.cluster.ray_backend.members import Survivors
    from downpour.cluster.ray_backend.nodes import Nodes

Show = Callable[[Progress], None]
OUTLIVED = "the run's processes have outlived their driver"


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What is known of a session before Ray starts."""

    folder: RunFolder
    config: RunConfig
    data: Data
    num_partitions: int | None
    """Partitions that the run has had so far, or that somebody chose; None if neither."""
    store: CheckpointStore
    resumes: bool
    """Whether it is not the run's first."""
    resumed: Checkpoint | None
    """What it goes on from, if the run's processes have not outlived their driver."""
    began_s: float
    """By the monotonic clock."""
    console: Any
    onlookers: Sequence[Onlooker]

    def phase(self, show: Show, phase: str) -> None:
        """Show what is being waited for."""
        show(Progress(elapsed_s=time.monotonic() - self.began_s, phase=phase))


def train(
    folder: RunFolder,
    data: Data,
    *,
    resume: bool,
    address: str | None,
    dashboard: bool,
    console: Any,
    age_s: float | None = None,
    onlookers: Sequence[Onlooker] = (),
) -> int:
    """Train the run of `folder` to its end, or until somebody stops it.

    Args:
        folder: the run's.
        data: what `check_data` found for the run's configuration.
        resume: whether to go on from the newest checkpoint.
        address: the Ray cluster to run on; None takes RAY_ADDRESS, or starts Ray here.
        dashboard: start Ray's dashboard with a cluster of our own.
        console: a rich console, for progress and messages.
        age_s: seconds ago that the run began; None says that this process is for this run, and
            began with it.
        onlookers: are told what happens, besides the run's own collectors of figures.

    Returns:
        The exit status for the process: 0, or 128 and the number of the signal that stopped it.

    Raises:
        UserError: the run cannot be trained; the text names the value and the remedy.
        RunFailed: the run gave up.
    """
    age_s = process_age_s() if age_s is None else age_s
    began_s = time.monotonic() - age_s
    _check_device(folder.config(), address)
    _check_step(folder.config(), data, console)
    with folder.locked():
        session = _open(folder, data, resume, began_s, console, onlookers)
        with TrainingDisplay(folder.name, console=console) as display:
            outcome, reason = _train_on_ray(session, display.update, address, dashboard)
        if outcome.finished:
            return conclude(folder, session.config, outcome, began_s, console)
        return stopped(folder, reason or "stopped", outcome, console)


def _check_device(config: RunConfig, address: str | None) -> None:
    """Look for the replicas' device, if they will be on this machine alone."""
    if config.replicas.steps.device == "cpu" or ray_address(address) != "local":
        return
    from downpour.workers.step.device import check_device

    check_device(config.replicas.steps.device)


def _check_step(config: RunConfig, data: Data, console: Any) -> None:
    """Try a network or a loss of the user's own on the data, before anything is started."""
    if not model_spec(config).is_ours:
        from downpour.cluster.training.trial import check_step

        if (line := check_step(config, data.plan)) is not None:
            console.print(line, style="yellow", markup=False)


def _open(
    folder: RunFolder,
    data: Data,
    resume: bool,
    began_s: float,
    console: Any,
    onlookers: Sequence[Onlooker],
) -> _Session:
    config = folder.config()
    check_data_unchanged(folder, data)
    for note in data.notes:
        console.print(note, style="yellow", markup=False)
    folder.clear_stop()  # of an earlier session
    if line := data.plan.past_bound_line(config.policy.epochs):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    num_partitions = partitions_before(folder) if resume else config.server.partitions
    store = CheckpointStore(folder.checkpoints_uri, num_partitions)
    return _Session(
        folder=folder,
        config=config,
        data=data,
        num_partitions=num_partitions,
        store=store,
        resumes=resume,
        resumed=_find_checkpoint(folder, store, console) if resume else None,
        began_s=began_s,
        console=console,
        onlookers=onlookers,
    )


def _find_checkpoint(folder: RunFolder, store: CheckpointStore, console: Any) -> Checkpoint | None:
    if (folder.path / RESULT).exists():
        raise UserError(
            f"{folder.path} is finished: its result is in {RESULT}; train a new run with "
            "`downpour train`"
        )
    checkpoint, passed = store.to_resume()
    for problem in passed:
        before = "; taking the one before" if checkpoint else ""
        console.print(f"{problem}{before}", style="yellow")
    return checkpoint


def _train_on_ray(
    session: _Session, show: Show, address: str | None, dashboard: bool
) -> tuple[RunOutcome, str | None]:
    """Start Ray and train; returns what came out, and why it stopped if it did."""
    session.phase(show, "starting Ray")
    # Importing PyTorch takes as long as half of Ray's start, which mostly waits. It begins once Ray
    # is imported: before that the two would only take Python's lock from each other.
    building: list[Future[Model]] = []
    with (
        ThreadPoolExecutor(1) as pool,
        on_ray(
            address=address,
            dashboard=dashboard,
            meanwhile=lambda: building.append(
                pool.submit(build_model, session.config, session.folder.initial)
            ),
            say=lambda line: session.console.print(line, style="yellow", markup=False),
        ) as dashboard_url,
    ):
        if dashboard_url:
            session.console.print(f"Ray's dashboard: http://{dashboard_url}", style="dim")
        model = building[0].result()
        specs, nodes = _resolve(session, model, show)
        return _control(session, model, specs, nodes, show)


def _resolve(session: _Session, model: Model, show: Show) -> tuple[RunSpecs, Nodes]:
    """The specs of all actors, once all nodes are there that the run is to wait for."""
    from downpour.cluster.ray_backend.nodes import Nodes

    config, folder, plan = session.config, session.folder, session.data.plan
    num_partitions = config.server.num_partitions(
        model.num_parameters, processors(), session.num_partitions
    )
    nodes = Nodes(config.placement, config.replicas.gpu_share)
    nodes.await_all(
        config.replicas,
        num_partitions,
        config.data.shufflers,
        lambda phase: session.phase(show, phase),
    )
    nodes.check_folder(folder.path, num_partitions if config.server.hot_standby else 0)
    facts = Facts(
        num_rows=plan.num_rows,
        shard_rows=plan.shard_rows,
        window_batches=plan.window_batches,
        num_parameters=model.num_parameters,
        num_features=model.num_features,
        num_decayed=model.num_decayed,
        num_frozen=model.num_frozen,
        stops=model.stops,
        num_partitions=num_partitions,
        num_nodes=nodes.count,
        num_processors=nodes.processors(processors()),
        gpu_places=nodes.gpu_places(),
        record=str(folder.path / RECORD) if config.policy.record_pushes else None,
    )
    specs = resolve(config, facts)
    nodes.check_room(specs.resolved.processes)
    folder.write_json(RESOLVED, asdict(specs.resolved))
    return specs, nodes


def _control(
    session: _Session, model: Model, specs: RunSpecs, nodes: Nodes, show: Show
) -> tuple[RunOutcome, str | None]:
    """Start the actors and train; returns what came out, and why it stopped if it did."""
    from downpour.cluster.controller.controller import Controller
    from downpour.cluster.monitoring.observation import Handle
    from downpour.cluster.monitoring.telemetry import Telemetry
    from downpour.cluster.ray_backend.backend import RayBackend
    from downpour.cluster.ray_backend.members import Members

    members = Members(*_notes(session, specs))
    survivors = members.take_over(len(specs.partitions))
    resumed = _where_it_stands(session, survivors)
    try:
        backend = RayBackend(
            config=session.config,
            specs=specs,
            weights=model.weights,
            statistics=model.statistics,
            key=secrets.token_bytes(KEY_BYTES),
            nodes=nodes,
            resumed=resumed,
            store=session.store,
            members=members,
            survivors=survivors,
        )
    except BaseException:
        members.end()
        raise
    sinks = _sinks(session, model)
    telemetry = Telemetry(
        config=session.config,
        plan=specs.plan,
        folder=session.folder,
        show=show,
        say=lambda line: session.console.print(line, style="yellow", markup=False),
        sinks=sinks,
    )
    controller = Controller(
        config=session.config,
        plan=specs.plan,
        backend=backend,
        folder=session.folder,
        store=session.store,
        listener=telemetry,
        resumed=resumed,
        followers_before=() if survivors is None else survivors.followers,
        began_s=session.began_s,
    )
    handle = Handle(
        folder=session.folder.path,
        config=session.config,
        finish=controller.request_end,
        tell=telemetry.tell,
    )
    try:
        sinks.extend(onlooker(handle) for onlooker in session.onlookers)
        with stop_on_signals(controller.request_stop):
            outcome = controller.run()
    finally:
        backend.stop()
        for sink in sinks:
            sink.close()
    return outcome, controller.stop_reason


def _where_it_stands(session: _Session, survivors: Survivors | None) -> Checkpoint | None:
    """Say what the run goes on from, and return it; None if it begins."""
    resumed, console = session.resumed, session.console
    if survivors is not None:
        resumed = going_on(
            resumed,
            session.folder.status(),
            version=survivors.papers.version,
            metric=session.config.model.the_task.metric,
        )
        console.print(f"{OUTLIVED}: going on at {resumed.updates:,} updates")
    elif resumed is not None:
        console.print(f"resuming from checkpoint {resumed.number} at {resumed.updates:,} updates")
    elif session.resumes:
        console.print("no checkpoint yet: starting from the beginning", style="yellow")
    return resumed


def _notes(session: _Session, specs: RunSpecs) -> tuple[Path | None, str]:
    """Where the run's processes are noted for another driver, and what they are made from."""
    if not session.config.server.hot_standby:
        return None, ""
    made_from = {
        "code": str(ROOT),
        "config": to_plain(session.config),
        "resolved": asdict(specs.resolved),
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode())
    return session.folder.path / MEMBERS, digest.hexdigest()


def _sinks(session: _Session, model: Model) -> list[Sink]:
    """Who is told the figures of the run."""
    from downpour.cluster.monitoring.prometheus import PrometheusSink
    from downpour.cluster.monitoring.tensorboard import TensorBoardSink

    server, steps = session.config.server, session.config.replicas.steps
    pushed, pulled = BYTES_AN_ELEMENT[server.network.wire]
    prometheus = PrometheusSink(
        run=session.folder.name,
        push_bytes=round(pushed * model.weights.size),
        pull_bytes=round(pulled * model.weights.size),
        steps_per_push=steps.n_push,
        steps_per_pull=steps.n_fetch,
        staleness_bound=server.policy.staleness_bound,
    )
    return [prometheus, TensorBoardSink(session.folder.path)]
