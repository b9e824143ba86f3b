"""The processes of a run, by name: what the next driver takes over, and what it ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from downpour.cluster.errors import UserError
from downpour.cluster.ray_backend import members
from downpour.cluster.ray_backend.members import Members, Survivors
from downpour.paramserver.spec import Papers


class Kind:
    """An actor's class."""


class Handle:
    """An actor, as a driver holds it."""

    def __init__(self, name: str | None, version: int) -> None:
        self.name, self.version = name, version
        self.drivers: list[str] = []
        self.attend = SimpleNamespace(remote=self.drivers.append)
        self.begin_session = SimpleNamespace(remote=lambda: self)


class Cluster:
    """What a Ray cluster knows, in place of `ray`."""

    def __init__(self) -> None:
        self.driver = "01"
        self.living: dict[str, Handle] = {}
        self.over: set[str] = set()
        self.hang: set[str] = set()
        self.noted: Path | None = None

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_job_id=lambda: self.driver)

    def get_actor(self, name: str, namespace: str) -> Handle:
        assert namespace == members.NAMESPACE
        if name not in self.living:
            raise ValueError(f"no actor {name}")
        return self.living[name]

    def get(self, calls: list[Handle], timeout: float) -> list[Papers]:
        assert timeout > 0
        if any(call.name in self.hang for call in calls):
            raise TimeoutError
        return [
            Papers(version=call.version, key=b"k", credentials=None, client_credentials=None)
            for call in calls
        ]

    def start(self, actor: type, calls: int, *given: Any, scheduling: Any, **options: Any) -> Any:
        name = options.get("name")
        if name is None:
            assert not options
            return Handle(None, 0)
        assert (options["lifetime"], options["driver"]) == ("detached", self.driver)
        assert self.noted is not None
        assert name in json.loads(self.noted.read_text())["actors"], "started before it is noted"
        self.living[name] = Handle(name, given[0] if given else 0)
        return self.living[name]

    def kill(self, actor: Handle | None) -> None:
        if actor is not None and actor.name is not None:
            self.living.pop(actor.name, None)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    played = Cluster()
    played.noted = tmp_path / "members.json"
    monkeypatch.setattr(members, "ray", played)
    monkeypatch.setattr(members.actors, "start", played.start)
    monkeypatch.setattr(members.actors, "kill", played.kill)
    monkeypatch.setattr(members, "is_over", played.over.__contains__)
    return played


def of(cluster: Cluster, about: str = "the same") -> Members:
    return Members(cluster.noted, about)


def begun(cluster: Cluster) -> Members:
    """A session of two partitions, with a spare that became replicas; its driver is dead."""
    session = of(cluster)
    for index, version in enumerate((7, 5)):
        made = session.start(Kind, 1, version, scheduling=None)
        session.has_role(members.partition_role(index), made)
    for role in ("evaluator", "spare of Kind"):
        session.has_role(role, session.start(Kind, 1, scheduling=None))
    session.has_role(members.process_role((0, 2)), made := list(cluster.living.values())[-1])
    assert made.version == 0
    session.will_follow(1, 3)
    session.start(Kind, 1, scheduling=None)  # the follower
    cluster.over.add(cluster.driver)
    cluster.driver = "02"
    return session


def taken_over(cluster: Cluster, about: str = "the same") -> Survivors | None:
    return of(cluster, about).take_over(2)


def test_the_next_driver_takes_over_what_has_a_role_and_ends_the_rest(cluster: Cluster) -> None:
    begun(cluster)
    before = set(cluster.living)
    session = of(cluster)
    found = session.take_over(2)
    assert found is not None
    assert [partition.version for partition in found.partitions] == [7, 5]
    assert found.papers.version == 5
    assert found.followers == [0, 3]
    assert set(found.others) == {"evaluator", "replicas 0, 2"}
    assert len(before) == 5
    assert len(cluster.living) == 4
    assert all(actor.drivers == ["02"] for actor in cluster.living.values())
    # And so does the driver after that one.
    session.kill(found.others["evaluator"])
    cluster.over.add("02")
    cluster.driver = "03"
    again = taken_over(cluster)
    assert again is not None
    assert set(again.others) == {"replicas 0, 2"}
    assert again.followers == [0, 3]


@pytest.mark.parametrize("what", ["dead", "hangs", "replaced"])
def test_without_every_partition_all_are_ended(cluster: Cluster, what: str) -> None:
    session = begun(cluster)
    second = next(name for name, actor in cluster.living.items() if actor.version == 5)
    if what == "dead":
        del cluster.living[second]
    elif what == "hangs":
        cluster.hang.add(second)
    else:  # the driver died before the other one was up
        session.kill(cluster.living[second])
    assert taken_over(cluster) is None
    assert not cluster.living


def test_processes_of_another_configuration_are_ended(cluster: Cluster) -> None:
    begun(cluster)
    assert taken_over(cluster, "another") is None
    assert not cluster.living


def test_a_driver_that_lives_is_not_robbed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "OVER_DEADLINE_S", 0.0)
    begun(cluster)
    cluster.over.clear()
    with pytest.raises(UserError, match=r"job 01 of this Ray cluster, is still connected: end its"):
        taken_over(cluster)
    assert len(cluster.living) == 5
    assert not any(actor.drivers for actor in cluster.living.values())


def test_a_session_that_ends_leaves_nothing(cluster: Cluster) -> None:
    session = begun(cluster)
    session.end()
    assert not cluster.living
    assert taken_over(cluster) is None


def test_without_a_place_for_notes_actors_end_with_their_driver(
    cluster: Cluster, tmp_path: Path
) -> None:
    session = Members(None)
    made = session.start(Kind, 1, scheduling=None)
    session.has_role("evaluator", made)
    session.kill(made)
    assert session.take_over(0) is None
    session.forget()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_notes_and_not_the_run(cluster: Cluster, tmp_path: Path) -> None:
    session = begun(cluster)
    (tmp_path / ".members.json.partial").mkdir()  # so that nothing can be written there
    session.kill(next(iter(cluster.living.values())))
    assert taken_over(cluster) is None
    assert not cluster.living
