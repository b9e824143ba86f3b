"""Whole runs on threads whose partitions have followers, and die."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.hangs.patience import LIMITS, Limit, Wait
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.replay.run import replay_run
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.run.provenance import write_about
from downpour.cluster.training.inputs import check_data, check_data_unchanged
from downpour.paramserver.partition import record
from downpour.paramserver.rules.policy import PolicyName, StalenessPolicy
from downpour.paramserver.transport.names import TransportName, WireName
from tests.helpers import commands, tiny
from tests.helpers.partition_pairs import freeze
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downpour.cluster.controller.failures.account.SPARES_AFTER_S", 0.0)
    monkeypatch.setattr("downpour.cluster.controller.members.partitions.REPORT_EVERY_S", 0.02)


def config(
    data: str, transport: TransportName = "auto", wire: WireName = "float32", **about: Any
) -> RunConfig:
    plain = tiny.config(data, **about)
    network = dataclasses.replace(plain.server.network, transport=transport, wire=wire)
    server = dataclasses.replace(plain.server, hot_standby=True, network=network)
    return dataclasses.replace(plain, server=server)


def events(run: Run) -> list[str]:
    path = run.folder.path / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


class Followed:
    """Windows wait until each partition has its follower: no run is over before, however fast.

    Those that were granted before a partition was lost do not wait for its next follower: they are
    run again anyway.
    """

    def __init__(self, run: Run) -> None:
        self.backend, self.partitions = run.backend, run.controller.state.partitions
        run.backend.hold = self

    def __call__(self) -> None:
        lives = self._lives()
        commands.wait_for(lambda: self.ready or self._lives() != lives, "followers")

    def _lives(self) -> list[int]:
        return [member.incarnation for member in self.partitions.members]

    @property
    def ready(self) -> bool:
        """Whether every partition's follower can take its place, by the partition's word, too."""
        known = self.partitions.followers
        return self.partitions.all_up and all(
            known.can_take_over(index) and actor._server.has_follower
            for index, actor in enumerate(self.backend.partitions)
        )


class Kills(Followed):
    """Ends a partition whenever its follower could take its place, so many times.

    Only once the last death has been noticed: with two at once, nobody would be left.
    """

    def __init__(self, run: Run, times: int) -> None:
        super().__init__(run)
        self.left, self.times = times, times
        self.restarts = run.controller.state.failures.policy.restarts

    def kill(self, backend: ThreadBackend, replica: int, lease: Lease) -> None:
        noticed = self.restarts["partition"] == self.times - self.left
        if self.left and noticed and self.ready and lease.id % 3 == 0:
            index = self.left % backend.num_partitions
            self.left -= 1
            backend.kill_partition(index)


@pytest.mark.parametrize(
    ("transport", "wire"),
    [("auto", "float32"), pytest.param("network", "int8", marks=pytest.mark.soak)],
)
def test_a_partition_that_dies_over_and_over_loses_no_update(
    tmp_path: Path, data: str, transport: TransportName, wire: WireName
) -> None:
    """No checkpoint is ever needed, and the whole of it is computed again from the record."""
    wanted = config(
        data, transport, wire, epochs=5, partitions=2, record_pushes=True, checkpoint_every_s=1000
    )
    run = Run(tmp_path / "run", wanted)
    run.backend.record_into(tmp_path / "run" / "record")
    check_data_unchanged(run.folder, check_data(wanted))
    write_about(tmp_path / "run" / "record", threads=1)
    kills = Kills(run, times=3)
    outcome = run.go(kills.kill)
    run.assert_exactly_once(outcome)
    assert kills.left == 0
    assert outcome.restarts["partition"] == 3
    assert run.backend.partition_starts == [1, 1]  # never from a checkpoint
    assert run.backend.followers_made >= 2 + 3
    told = events(run)
    assert sum("its follower takes its place" in line for line in told) == 3
    assert run_again(told) == {"0 mini-batches are run again"}
    assert all(r.version == 5 * run.plan.num_batches for r in outcome.reports)

    branches = [record.read(p) for p in record.files(tmp_path / "run" / "record")]
    assert sum(b.counts for b in branches) == 2 + 3
    found = replay_run(RunFolder.open(tmp_path / "run"), lambda *_: None, lambda _: None)
    assert found.differing == ()
    assert found.versions == (5 * run.plan.num_batches,) * 2


def run_again(told: list[str]) -> set[str]:
    """What is told of mini-batches that are run again; of deaths close together, in one line."""
    return {line for line in told if line.endswith("mini-batches are run again")}


@pytest.mark.parametrize("name", ["bounded", "synchronous"])
def test_permits_and_rounds_go_on_with_the_follower(
    tmp_path: Path, data: str, name: PolicyName
) -> None:
    plain = config(data, epochs=5, partitions=2, checkpoint_every_s=1000)
    policy = StalenessPolicy(staleness_policy=name, staleness_bound=5)
    server = dataclasses.replace(plain.server, policy=policy)
    run = Run(tmp_path / "run", dataclasses.replace(plain, server=server))
    kills = Kills(run, times=2)
    run.assert_exactly_once(run.go(kills.kill))
    assert kills.left == 0
    assert run.backend.partition_starts == [1, 1]
    assert run_again(events(run)) == {"0 mini-batches are run again"}


@pytest.mark.parametrize(
    ("transport", "why"), [("auto", "nothing"), ("network", "its primary has been silent")]
)
def test_a_primary_that_is_out_of_reach_only_is_fenced_off(
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    transport: TransportName,
    why: str,
) -> None:
    """It lives on, with every connection that it has, while its follower takes its place.

    A follower that has come over the network notices that it is silent.
    """
    impatient = Limit(first_s=1.5, least_s=1.5) if transport == "auto" else LIMITS["report"]
    monkeypatch.setitem(cast(dict[Wait, Limit], LIMITS), "report", impatient)
    run = Run(
        tmp_path / "run", config(data, transport, epochs=6, partitions=2, checkpoint_every_s=1000)
    )
    followed = Followed(run)
    thaws: list[Any] = []

    def hang(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if not thaws and followed.ready:
            thaws.append(freeze(backend.partitions[1]._server))
        elif thaws and backend.corpses_of_partitions:
            thaws[0].set()

    outcome = run.go(hang)
    run.assert_exactly_once(outcome)
    assert outcome.restarts["partition"] == 1
    assert run.backend.partition_starts == [1, 1]
    (told,) = [line for line in events(run) if f"partition 1 does not answer ({why}" in line]
    assert "its follower takes its place" in told


@pytest.mark.parametrize("transport", ["auto", pytest.param("network", marks=pytest.mark.soak)])
def test_followers_that_die_or_hang_are_replaced_and_cost_no_update(
    tmp_path: Path, data: str, transport: TransportName
) -> None:
    run = Run(tmp_path / "run", config(data, transport, epochs=8, checkpoint_every_s=1000))
    followed = Followed(run)
    lost = run.controller.state.failures.policy.restarts
    done: list[str] = []
    thaws: list[Any] = []

    def harm(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if thaws and backend.corpses_of_partitions[1:]:
            thaws[0].set()
        follower = backend.followers[0]
        if follower is None or not followed.ready:
            return
        if lease.id > 12 and not done:
            done.append("died")
            follower.stop()
        elif lease.id > 40 and len(done) == lost["follower"] == 1:
            done.append("hangs")
            backend.partitions[0]._server._replication.role.link._deadline_s = 0.2
            thaws.append(freeze(follower._server))

    outcome = run.go(harm)
    run.assert_exactly_once(outcome)
    assert done == ["died", "hangs"]
    assert outcome.restarts == {"follower": 2}
    why = "goes on without it" if transport == "auto" else "has lost it"
    assert sum(why in line for line in events(run)) == 2


def test_where_both_are_gone_it_starts_from_its_checkpoint(tmp_path: Path, data: str) -> None:
    run = Run(tmp_path / "run", config(data, epochs=5, checkpoint_every_s=0.05))
    followed = Followed(run)
    killed: list[int] = []

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        follower = backend.followers[1]
        if not killed and follower is not None and followed.ready:
            killed.append(lease.id)
            follower.stop()
            backend.kill_partition(1)

    outcome = run.go(kill)
    run.assert_exactly_once(outcome)
    assert run.backend.partition_starts == [1, 2, 1]
    told = events(run)
    assert any("partition 1 died: its follower takes its place" in line for line in told)
    assert any("partition 1 starts again from" in line for line in told)


def test_what_a_standby_cannot_do_is_a_line(data: str) -> None:
    plain = config(data)
    policy = StalenessPolicy(staleness_policy="compensate", staleness_bound=100)
    with pytest.raises(ValueError, match="hot standby is on, and staleness policy is compensate"):
        dataclasses.replace(plain.server, policy=policy)
