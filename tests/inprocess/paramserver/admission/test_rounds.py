"""Synchronous rounds in the whole system: torch's SGD on their mini-batches, drops, deaths."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from downpour.cluster.config.derive import model_spec, update_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.training.inputs import loader
from downpour.cluster.training.repartition import repartition
from downpour.models.flat import FlatModel
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.combiner import Place
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.vectors import Arrival
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.workers.recompute import Recomputer
from tests.helpers import tiny
from tests.helpers.runs import Run, assert_replays_to_the_bit, killed_stopped_and_resumed
from tests.helpers.thread_backend import Faults, ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def synchronous(config: RunConfig, pushes: int | None = None, **network: Any) -> RunConfig:
    server = dataclasses.replace(
        config.server,
        policy=StalenessPolicy(staleness_policy="synchronous", round_pushes=pushes),
        network=NetworkConfig(**network),
    )
    return dataclasses.replace(config, server=server)


class Rounds:
    """Which mini-batches each partition's rounds took, by the version of the round's weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: dict[int, dict[int, list[tuple[int, int]]]] = {}
        apply_all = PartitionState.apply_all

        def noted(
            state: PartitionState, arrivals: Sequence[Arrival], into: Place | None = None
        ) -> list[Outcome]:
            ((push, _, _),) = arrivals  # with permits, pushes are applied one at a time
            start = state.weights_version
            (outcome,) = apply_all(state, arrivals, into)
            if outcome is Outcome.APPLIED:
                of = self.taken.setdefault(state.partition.index, {})
                of.setdefault(start, []).append((push.epoch, push.batches[0]))
            return [outcome]

        monkeypatch.setattr(PartitionState, "apply_all", noted)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("transport", ["shared", "network"])
def test_without_backup_it_is_torchs_sgd_on_mini_batches_as_large_as_a_round(
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    partitions: int,
    transport: str,
) -> None:
    """Eight slots with mini-batches of 16, against a loop with mini-batches of 128."""
    rounds = Rounds(monkeypatch)
    config = tiny.config(data, replicas=4, concurrent_steps=2, partitions=partitions, epochs=2)
    arguments = {**config.model.arguments, "batch_norm": False}
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, arguments=arguments)
    )
    run = Run(tmp_path / "run", synchronous(config, transport=transport))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    total = 2 * run.plan.num_batches
    for report in outcome.reports:
        assert report.dropped == report.duplicates == 0
        assert {len(counts) for counts in report.staleness.values()} == {1}  # never stale
        assert report.version == total
    first = {start: set(of) for start, of in rounds.taken[0].items()}
    assert all({s: set(of) for s, of in r.items()} == first for r in rounds.taken.values())
    sizes = [len(rounds.taken[0][start]) for start in sorted(first)]
    assert sizes == [8] * (total // 8) + [total % 8] * (total % 8 > 0)

    model = FlatModel(model_spec(run.config).build())
    rate = config.server.schedule.learning_rate
    optimizer = torch.optim.SGD(model.module.parameters(), lr=rate, momentum=0.9)
    reader = RowReader(Dataset.open(data, "train"))
    model.module.train()
    for start in sorted(first):
        parts = []
        for epoch, batch in sorted(first[start]):
            parts.append(decode(reader.take(run.plan.rows(epoch, batch)), tiny.IMAGE))
        inputs = torch.cat([torch.from_numpy(i) for i, _ in parts])
        labels = torch.cat([torch.from_numpy(labels) for _, labels in parts])
        model.zero_gradient()
        functional.cross_entropy(model.module(inputs), labels).backward()
        optimizer.step()
    torch.testing.assert_close(run.weights, model.weights, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("pushes", "partitions", "network"),
    [(5, 1, {}), (5, 3, {}), (6, 2, {"transport": "network", "wire": "bfloat16"})],
)
def test_with_backup_workers_what_is_late_is_computed_again(
    tmp_path: Path, data: str, pushes: int, partitions: int, network: dict[str, Any]
) -> None:
    config = tiny.config(data, replicas=4, concurrent_steps=2, partitions=partitions)
    run = Run(tmp_path / "run", synchronous(config, pushes, **network))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert sum(r.dropped for r in outcome.reports) > 0
    for report in outcome.reports:
        assert {len(counts) for counts in report.staleness.values()} == {1}
        assert report.version == 2 * run.plan.num_batches


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pushes", [5, None])
@pytest.mark.parametrize("transport", ["shared", "network"])
def test_deaths_and_lost_connections_hold_nobody_up(
    tmp_path: Path, data: str, pushes: int | None, transport: str
) -> None:
    config = tiny.config(data, epochs=4, checkpoint_every_s=0.05)
    run = Run(tmp_path / "run", synchronous(config, pushes, transport=transport))
    faults = Faults(
        (4, ThreadBackend.kill_process, 1),
        (9, ThreadBackend.cut_connections, 1),
        (14, ThreadBackend.kill_partition, 0),
        (19, ThreadBackend.kill_process, 0),
        (24, ThreadBackend.kill_partition, 2),
    )
    outcome = run.go(faults)
    assert not faults.left
    run.assert_exactly_once(outcome)


@pytest.mark.timeout(120)
def test_a_run_stopped_in_the_middle_of_a_round_replays_to_the_bit(
    tmp_path: Path, data: str
) -> None:
    config = synchronous(tiny.config(data, epochs=3), 5)
    outcome = killed_stopped_and_resumed(tmp_path / "run", config, deaths={8: 1}, stop_at=22)
    assert_replays_to_the_bit(tmp_path / "run", outcome)


@pytest.mark.timeout(120)
def test_a_run_goes_on_with_another_number_of_partitions(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", synchronous(tiny.config(data, epochs=3), 5))

    def stop(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id == 14:
            run.controller.request_stop("SIGTERM")

    run.go(stop)
    checkpoint, _ = run.store.latest()
    assert checkpoint is not None
    config = run.config
    repartition(
        run.store,
        checkpoint,
        2,
        config=update_config(config, run.plan),
        epochs=3,
        recomputer=Recomputer(model_spec(config), loader(config, run.plan)),
    )
    server = dataclasses.replace(config.server, partitions=2)
    again = Run(tmp_path / "run", dataclasses.replace(config, server=server), resume=True)
    again.assert_exactly_once(again.go())


@pytest.mark.timeout(120)
def test_fewer_slots_than_a_round_has_pushes_still_fill_it(tmp_path: Path, data: str) -> None:
    """One replica alone during the warm start: a slot steps more than once on the same weights."""
    config = tiny.config(data, replicas=4, concurrent_steps=2)
    replicas = dataclasses.replace(config.replicas, warm_start_epochs=1.0)
    run = Run(tmp_path / "run", synchronous(dataclasses.replace(config, replicas=replicas)))
    run.assert_exactly_once(run.go())
