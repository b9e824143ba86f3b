"""Partitions, a shuffler and the evaluator whose node is to leave: real ones, on threads."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from downpour.cluster.controller import stages
from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.members import partitions
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from tests.helpers import tiny
from tests.helpers.runs import recorded, replay
from tests.helpers.thread_backend import ThreadBackend

COMPENSATED = StalenessPolicy(staleness_policy="compensate", staleness_bound=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DEPARTURES_EVERY_S", 0.05)
    monkeypatch.setattr(partitions, "REPORT_EVERY_S", 0.05)


@pytest.mark.parametrize(
    ("transport", "policy", "follower_dies"),
    [
        ("network", StalenessPolicy(), False),
        pytest.param("network", StalenessPolicy(), True, marks=pytest.mark.soak),
        ("network", COMPENSATED, False),
        pytest.param("shared", StalenessPolicy(), False, marks=pytest.mark.soak),
    ],
    ids=["network", "a follower dies", "compensated", "shared"],
)
def test_members_move_with_all_that_they_have(
    tmp_path: Path,
    data: str,
    transport: Literal["shared", "network"],
    policy: StalenessPolicy,
    follower_dies: bool,
) -> None:
    """Nothing is computed twice, and what is replayed is equal to the bit."""
    config = tiny.config(data, epochs=1000)  # it is stopped when all have moved
    network = NetworkConfig(transport=transport)
    server = dataclasses.replace(config.server, network=network, policy=policy)
    before: list[Any] = []
    moved_at: list[int] = []

    def leave(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id >= 12 and not before:
            before.extend([*backend.partitions, backend.shuffler])
            backend.followers_to_kill = {0} if follower_dies else set()
            backend.leaving = Departing(
                partitions=(0, 2), shufflers=1, evaluator=True, remaining_s=300.0
            )
        if before and backend.leaving == Departing(remaining_s=300.0):
            moved_at.append(lease.id)
        if moved_at and lease.id >= moved_at[0] + 12:
            run.controller.request_stop("SIGTERM")

    run = recorded(tmp_path / "run", dataclasses.replace(config, server=server))
    outcome = run.go(leave)
    backend = run.backend
    assert backend.partitions[0] is not before[0]
    assert backend.partitions[1] is before[1]
    assert backend.partitions[2] is not before[2]
    assert backend.shuffler is not before[3]
    assert outcome.restarts == {}
    assert [report.duplicates for report in outcome.reports] == [0, 0, 0], "nothing came twice"
    told = (run.folder.path / "events.jsonl").read_text().splitlines()
    assert any("partition 2 has moved, with all that it had" in line for line in told)
    assert any("its follower is lost" in line for line in told) == follower_dies
    again = [line for line in told if "are run again" in line]
    assert again
    assert all("0 mini-batches are run again" in line for line in again)
    assert replay(tmp_path / "run").differing == ()
