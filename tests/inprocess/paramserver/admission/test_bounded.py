"""Bounded staleness in the whole system: real partitions, sockets and threads, and deaths."""

import dataclasses
from pathlib import Path

import pytest

from downpour.cluster.config.run import RunConfig
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import Faults, ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def bounded(config: RunConfig, bound: int, **network: object) -> RunConfig:
    server = dataclasses.replace(
        config.server,
        policy=StalenessPolicy(staleness_policy="bounded", staleness_bound=bound),
        network=NetworkConfig(**network),  # type: ignore[arg-type]
    )
    return dataclasses.replace(config, server=server)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("bound", "replicas", "partitions", "steps", "network"),
    [
        (0, 3, 2, {}, {}),
        (3, 4, 3, {}, {}),
        (4, 4, 1, {"n_push": 3, "n_fetch": 3}, {}),
        (3, 4, 2, {}, {"transport": "network"}),
        (3, 4, 2, {}, {"transport": "network", "wire": "bfloat16"}),
    ],
)
def test_nothing_is_staler_than_the_bound_and_nothing_is_dropped(
    tmp_path: Path,
    data: str,
    bound: int,
    replicas: int,
    partitions: int,
    steps: dict[str, int],
    network: dict[str, object],
) -> None:
    config = tiny.config(data, replicas=replicas, partitions=partitions, **steps)
    run = Run(tmp_path / "run", bounded(config, bound, **network))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    for report in outcome.reports:
        assert report.dropped == report.duplicates == report.malformed == 0
        staleness = [len(counts) - 1 for counts in report.staleness.values()]
        assert max(staleness) <= bound
        assert sum(map(sum, report.staleness.values())) == report.version


@pytest.mark.timeout(60)
def test_deaths_and_lost_connections_hold_nobody_up(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", bounded(tiny.config(data, epochs=3), 2))
    faults = Faults(
        (4, ThreadBackend.kill_process, 0),
        (10, ThreadBackend.cut_connections, 1),
        (16, ThreadBackend.kill_partition, 1),
    )
    outcome = run.go(faults)
    assert not faults.left
    assert outcome.finished
    assert outcome.exactly_once
    for report in outcome.reports:
        assert report.dropped == 0
        assert max(len(counts) - 1 for counts in report.staleness.values()) <= 2
