"""Whole runs on threads: a configuration to its end, with faults, recorded, resumed, replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from downpour.cluster.config.derive import make_plan
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.controller import Controller
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.protocol.instructions import RunOutcome
from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.cluster.replay.replay import Taken
from downpour.cluster.replay.run import Replayed, replay_run
from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.run.provenance import write_about
from downpour.cluster.training.inputs import check_data, check_data_unchanged
from downpour.paramserver.partition.applied_set import APPLIED
from downpour.shuffler.dataset.own import open_split
from tests.helpers.thread_backend import ThreadBackend


class Run:
    """One run of a configuration on threads, from the beginning or from its last checkpoint."""

    def __init__(self, folder: Path, config: RunConfig, *, resume: bool = False) -> None:
        self.config = config
        self.folder = RunFolder.open(folder) if resume else RunFolder.create(folder, config)
        self.store = CheckpointStore(self.folder.checkpoints_uri)
        self.resumed = self.store.latest()[0] if resume else None
        dataset = open_split(config.data.data, config.data.train_split, config.model.columns)
        self.plan = make_plan(config, dataset.num_rows)
        self.backend = ThreadBackend(config, self.plan, resumed=self.resumed, store=self.store)
        self.shown: list[Progress] = []
        self.telemetry = Telemetry(
            config=config, plan=self.plan, folder=self.folder, show=self.shown.append
        )
        self.controller = Controller(
            config=config,
            plan=self.plan,
            backend=self.backend,
            folder=self.folder,
            store=self.store,
            listener=self.telemetry,
            resumed=self.resumed,
        )

    def go(
        self, on_window: Callable[[ThreadBackend, int, Lease], None] | None = None
    ) -> RunOutcome:
        self.backend.on_window = on_window
        try:
            return self.controller.run()
        finally:
            self.controller.state.check()
            self.flags = [self.backend.flags_of(i) for i in range(self.backend.num_partitions)]
            parts = [
                p._server.call(lambda state: state.current.weights.clone())
                for p in self.backend.partitions
            ]
            self.weights = torch.cat(parts)
            self.backend.stop()

    def assert_exactly_once(self, outcome: RunOutcome) -> None:
        """From the applied sets, and not from anything that the controller says."""
        total = self.config.policy.epochs * self.plan.num_batches
        assert outcome.finished
        assert outcome.exactly_once
        for flags, report in zip(self.flags, outcome.reports, strict=True):
            assert flags.shape == (self.config.policy.epochs, self.plan.num_batches)
            assert (flags == APPLIED).all()
            assert report.batches_applied == total
            assert report.examples == self.config.policy.epochs * self.plan.num_rows


def recorded(folder: Path, config: RunConfig, *, resume: bool = False) -> Run:
    """A run that records its pushes, and checkpoints often."""
    policy = dataclasses.replace(config.policy, record_pushes=True, checkpoint_every_s=0.05)
    run = Run(folder, dataclasses.replace(config, policy=policy), resume=resume)
    run.backend.record_into(folder / "record")
    check_data_unchanged(run.folder, check_data(run.config))
    write_about(folder / "record", threads=1)
    return run


def killed_stopped_and_resumed(
    folder: Path, config: RunConfig, *, deaths: Mapping[int, int], stop_at: int
) -> RunOutcome:
    """A recorded run whose partitions died, that was stopped and, resumed, came to its end.

    `deaths` are partitions by the lease from which on they are killed; `stop_at` is a lease, too.
    """
    run, killed = recorded(folder, config), list[int]()

    def fault(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        for number, partition in deaths.items():
            if lease.id >= number and number not in killed:
                backend.kill_partition(partition)
                killed.append(number)
        if lease.id >= stop_at:
            run.controller.request_stop("SIGTERM")

    run.go(fault)
    assert killed == list(deaths)
    again = recorded(folder, config, resume=True)
    outcome = again.go()
    again.assert_exactly_once(outcome)
    return outcome


def replay(folder: Path, taken: Taken = lambda *_: None) -> Replayed:
    return replay_run(RunFolder.open(folder), lambda done, total: None, lambda line: None, taken)


def assert_replays_to_the_bit(folder: Path, outcome: RunOutcome) -> None:
    found = replay(folder)
    assert found.differing == ()
    assert found.versions == tuple(r.version for r in outcome.reports)
