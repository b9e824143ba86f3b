"""Which shuffler is where with shards on nodes' own disks, and who takes over; Ray is played."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import NodeDiedError, RayTaskError

from downpour.cluster.config.placement import Node, PlacementConfig, disks
from downpour.cluster.config.resolve import shuffler_specs
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.ray_backend import members, shufflers
from downpour.cluster.ray_backend.members import Members
from downpour.cluster.ray_backend.shufflers import Shufflers
from downpour.cluster.training.inputs import check_data
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import join
from downpour.shuffler.errors import DatasetError
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest
from downpour.shuffler.plan.plan import Plan
from tests.helpers import tiny

NAMES = ("a", "b", "c")
A, B, C = (name * 56 for name in NAMES)
"""Ids as Ray's are, in hexadecimal."""
ROWS = 2000


class Played:
    """Ray with nodes that may be gone: calls run at once, and what travels is pickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.gone: set[str] = set()
        """Nodes that are not listed any more."""
        self.dying: set[str] = set()
        """Nodes that are listed, and answer no more."""
        self.leaving: set[str] = set()
        self.started: list[str] = []
        self.killed: list[Any] = []

    def nodes(self) -> list[Node]:
        return [
            Node(id=name * 56, address="10.0.0.1", cpus=1, labels={"downpour-node": name})
            for name in NAMES
        ]

    def disks(self, *, only_staying: bool = False) -> list[Node]:
        absent = self.gone | (self.leaving if only_staying else set())
        return disks(PlacementConfig(), [n for n in self.nodes() if n.id not in absent], A)

    def scheduling(self, role: str, index: int) -> Any:
        assert role == "shufflers"
        return SimpleNamespace(node_id=NAMES[index] * 56)

    def remote(self, function: Any) -> Any:
        def options(num_cpus: int, scheduling_strategy: Any) -> Any:
            assert num_cpus == 0
            return SimpleNamespace(
                remote=lambda *given: (scheduling_strategy.node_id, function, _travelled(given))
            )

        return SimpleNamespace(options=options)

    def get(self, call: Any, timeout: float) -> Any:
        assert timeout > 0
        node, function, given = call
        if node in self.dying:
            raise NodeDiedError(f"node {node} died")
        try:
            return function(*given)
        except DatasetError as error:
            raise RayTaskError("survey", "trace", error).as_instanceof_cause() from None

    def start(self, actor: type, calls: int, *given: Any, scheduling: Any) -> Any:
        assert calls == 2
        made = actor(*_travelled(given))
        handle = SimpleNamespace(
            node=scheduling.node_id,
            actor=made,
            deliver=SimpleNamespace(remote=made.deliver),
            ready=SimpleNamespace(remote=made.ready),
        )
        self.started.append(handle.node)
        return handle


def _travelled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    """Six shards on three nodes, one of them on two."""
    tiny.write_split(tmp_path / "source", "train", *tiny.images(ROWS, 1), shards=2)
    tiny.write_split(tmp_path / "source", "test", *tiny.images(100, 2))
    whole = tmp_path / "whole"
    ingest(tmp_path / "source", whole, IngestConfig(rows_per_shard=350))
    assert len(list(whole.glob("train-*"))) == 6
    shutil.copytree(whole, tmp_path / "all")
    for name, numbers in {"a": (0, 3), "b": (1, 4), "c": (2, 4, 5)}.items():
        (tmp_path / name).mkdir()
        for number in numbers:
            shutil.copy(whole / f"train-{number:05d}-of-00006.parquet", tmp_path / name)
    for shard in whole.glob("train-*"):
        shard.unlink()
    played = Played(str(tmp_path / "{node}"))
    monkeypatch.setattr(shufflers.ray, "remote", played.remote)
    monkeypatch.setattr(shufflers.ray, "get", played.get)
    monkeypatch.setattr(members.actors, "start", played.start)
    monkeypatch.setattr(members.actors, "kill", played.killed.append)
    return played


def shufflers_of(config: RunConfig, plan: Plan, played: Any) -> Shufflers:
    return Shufflers(config, shuffler_specs(config, plan), played, Members(None))


def configured(played: Played) -> RunConfig:
    config = tiny.config(str(Path(played.folder).parent / "whole"))
    data = dataclasses.replace(config.data, node_folder=played.folder, batch_size=16)
    return dataclasses.replace(config, data=data)


def paths(batch: pa.RecordBatch) -> pa.Array:
    return batch.column("image").field("path")


def check_rows(shufflers: Shufflers, plan: Any, whole: Path) -> None:
    """An epoch's windows are whole, and as from one place, though some rows come as pixels."""
    decoder = Decoder(spec=tiny.IMAGE)
    alone = RowReader(Dataset.open(whole, "train"))
    for window in plan.window_order(0).tolist():
        batches = tuple(plan.window_batches_order(0, window).tolist())
        delivery = join([part for part, _ in shufflers.deliver(0, batches)])
        expected = alone.take(plan.rows_of(0, batches)[0])
        assert delivery.batch.column("label").equals(expected.column("label"))
        assert paths(delivery.batch).equals(paths(expected))
        assert np.array_equal(
            decoder.decode(delivery.batch).inputs, decoder.decode(expected).inputs
        )
    alone.close()


def test_a_shuffler_on_each_node_that_has_shards(played: Played, tmp_path: Path) -> None:
    data = check_data(configured(played))
    assert data.fingerprint == Dataset.open(tmp_path / "all", "train").fingerprint
    shufflers = shufflers_of(configured(played), data.plan, played)
    assert played.started == [A, B, C]
    check_rows(shufflers, data.plan, tmp_path / "all")
    assert shufflers.replace() == 0
    shufflers.stop()
    assert len(played.killed) == 3


def test_with_the_data_in_one_place_each_has_a_share(played: Played, tmp_path: Path) -> None:
    config = configured(played)
    data = dataclasses.replace(
        config.data, data=str(tmp_path / "all"), node_folder=None, shufflers=3
    )
    config = dataclasses.replace(config, data=data)
    plan = check_data(config).plan
    shufflers = shufflers_of(config, plan, played)
    assert played.started == [A, B, C]
    check_rows(shufflers, plan, tmp_path / "all")
    lost = [actor for _, actor in shufflers.deliver(0, (0,))][1:]
    for actor in lost:
        shufflers.lost(actor)
    assert shufflers.replace() == 2
    assert played.started == [A, B, C, B, C]
    assert played.killed == lost
    check_rows(shufflers, plan, tmp_path / "all")


def test_a_process_that_dies_is_replaced_where_it_was(played: Played, tmp_path: Path) -> None:
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    (_, first), (_, second), _ = shufflers.deliver(0, (0,))
    shufflers.lost(second)
    shufflers.lost(second)  # each of its windows tells of it
    assert shufflers.replace() == 1
    assert played.started == [A, B, C, B]
    assert played.killed == [second]
    assert shufflers.deliver(0, (0,))[0][1] is first
    check_rows(shufflers, plan, tmp_path / "all")
    shufflers.lost(second)  # news of the one that is gone already
    assert shufflers.replace() == 0


def test_another_node_takes_over_what_it_has_too(played: Played, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "all" / "train-00001-of-00006.parquet", tmp_path / "a")
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    lost = next(actor for _, actor in shufflers.deliver(0, (0,)) if actor.node == B)
    shufflers.lost(lost)
    played.dying.add(B)
    assert shufflers.replace() == 1
    assert {actor.node for _, actor in shufflers.deliver(0, (0,))} == {A, C}
    check_rows(shufflers, plan, tmp_path / "all")


@pytest.mark.parametrize("how", ["gone", "dying"])
def test_a_shard_that_went_with_its_node_is_named(played: Played, how: str) -> None:
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    getattr(played, how).add(A)
    shufflers.lost(shufflers.deliver(0, (0,))[0][1])
    with pytest.raises(RunFailed, match=r"^shard train-00000-of-00006.parquet and 1 more of 6 is"):
        shufflers.replace()


def test_shufflers_on_a_node_that_is_to_leave_move_once_others_are_up(
    played: Played, tmp_path: Path
) -> None:
    shutil.copy(tmp_path / "all" / "train-00001-of-00006.parquet", tmp_path / "a")
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    before = shufflers.actors
    played.leaving = {B}
    assert shufflers.move([actor for actor in before if actor.node == B])
    assert shufflers.actors == before, "the others are not up yet"
    num_new = shufflers.arrived()
    assert num_new == len(set(map(id, shufflers.actors)) - set(map(id, before))) > 0
    assert {actor.node for actor in shufflers.actors} == {A, C}
    check_rows(shufflers, plan, tmp_path / "all")
    assert not played.killed
    assert shufflers.some_leave
    busy = next(actor for actor in before if actor.node == B)
    shufflers.end_leaving([busy])
    assert busy not in played.killed
    shufflers.end_leaving([])
    assert busy in played.killed
    assert not shufflers.some_leave
    assert not [actor for actor in shufflers.actors if actor in played.killed]


def test_shufflers_stay_if_no_other_node_has_their_shards(played: Played, tmp_path: Path) -> None:
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    before = shufflers.actors
    played.leaving = {A}
    with pytest.raises(RunFailed, match=r"^shard train-00000-of-00006.parquet"):
        shufflers.move([before[0]])
    assert shufflers.arrived() == 0
    assert shufflers.actors == before
    shufflers.lost(before[0])
    assert shufflers.replace() == 1, "where its shards are, though that node is to leave"
    check_rows(shufflers, plan, tmp_path / "all")


def test_shufflers_that_are_lost_while_they_move_are_replaced_elsewhere(
    played: Played, tmp_path: Path
) -> None:
    shutil.copy(tmp_path / "all" / "train-00001-of-00006.parquet", tmp_path / "a")
    plan = check_data(configured(played)).plan
    shufflers = shufflers_of(configured(played), plan, played)
    leaving = next(actor for actor in shufflers.actors if actor.node == B)
    played.leaving = {B}
    shufflers.move([leaving])
    shufflers.lost(leaving)
    assert shufflers.replace() == 1
    assert shufflers.arrived() == 0, "of those that were to come, none does"
    assert {actor.node for actor in shufflers.actors} == {A, C}
    check_rows(shufflers, plan, tmp_path / "all")


def test_what_is_wrong_on_a_node_names_the_node(played: Played, tmp_path: Path) -> None:
    shard = tmp_path / "c" / "train-00005-of-00006.parquet"
    shard.write_bytes(shard.read_bytes()[:-4])
    plan = check_data(configured(played)).plan
    with pytest.raises(RunFailed, match=r"^node 10.0.0.1: .*00005-of-00006.parquet in .*/c has"):
        shufflers_of(configured(played), plan, played)


def test_a_folder_that_depends_on_where_one_stands_is_refused(played: Played) -> None:
    config = configured(played)
    with pytest.raises(ValueError, match="node folder is 'here': give a path from the root"):
        dataclasses.replace(config.data, node_folder="here")
