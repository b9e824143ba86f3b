"""Processes of replicas that die, lose their connections, come and go: real ones, on threads."""

import dataclasses
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.controller.protocol.backend import ProcessLost, RunFailed
from downpour.cluster.run.folder import RunFolder
from tests.helpers import tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("failures", [0, 2])
def test_the_other_processes_are_started_once_the_first_is_up(
    tmp_path: Path, data: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", tiny.config(data, replicas=4))
    backend, start = run.backend, run.backend.start_process
    started: list[tuple[int, bool]] = []

    def start_process(index: int) -> Future[Any]:
        started.append((index, backend.actors[0] is not None))
        if len(started) <= failures:
            failed: Future[Any] = Future()
            failed.set_exception(ProcessLost("it died before it was up"))
            return failed
        return start(index)

    monkeypatch.setattr(backend, "start_process", start_process)
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert len(backend.processes) > 1
    first = [(0, False)] * (1 + failures)
    assert started == [*first, *((i, True) for i in range(1, len(backend.processes)))]
    assert outcome.restarts.get("replicas", 0) == failures


def test_a_process_that_dies_costs_only_its_unfinished_mini_batches(
    tmp_path: Path, data: str
) -> None:
    killed: list[int] = []

    def kill_some(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 11, 17):
            backend.kill_process(replica % 2)
            killed.append(lease.id)

    run = Run(tmp_path / "run", tiny.config(data, epochs=3))
    outcome = run.go(kill_some)
    assert killed == [5, 11, 17]
    assert outcome.restarts["replicas"] >= 1
    run.assert_exactly_once(outcome)


def test_a_process_that_loses_its_connections_is_connected_again(tmp_path: Path, data: str) -> None:
    def cut(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 14):
            backend.cut_connections(lease.id % 2)

    run = Run(tmp_path / "run", tiny.config(data, epochs=3))
    outcome = run.go(cut)
    run.assert_exactly_once(outcome)
    assert outcome.restarts == {}
    assert "connecting again" in (run.folder.path / "events.jsonl").read_text()


def test_replicas_come_and_go_while_the_run_trains(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downpour.cluster.controller.members.partitions.REPORT_EVERY_S", 0.02)
    run = Run(tmp_path / "run", tiny.config(data, replicas=2, epochs=12))
    seen: set[int] = set()

    def scale(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        seen.add(replica)
        if lease.id == 3:
            run.folder.ask_for_replicas(5)
        if seen >= {2, 3, 4} and run.controller.state.replicas_wanted == 5:
            run.folder.ask_for_replicas(1)

    outcome = run.go(scale)
    run.assert_exactly_once(outcome)
    assert seen == {0, 1, 2, 3, 4}
    assert len(run.backend.processes) == 5
    events = (run.folder.path / "events.jsonl").read_text()
    assert "from 2 replicas to 5" in events
    assert "from 5 replicas to 1" in events
    assert events.count("is let go") == 4
    assert run.shown[-1].replicas_wanted == 1


def test_a_word_that_others_could_have_left_does_not_count(tmp_path: Path, data: str) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny.config(data))
    folder.ask_for_replicas(3)
    assert folder.replicas_asked_for() == 3
    assert folder.replicas_asked_for() is None
    folder.ask_for_replicas(3)
    (folder.path / "control.json").chmod(0o620)
    assert folder.replicas_asked_for() is None
    for text in ("{", "[]", '{"replicas": "3"}', '{"replicas": 0}', '{"replicas": true}'):
        (folder.path / "control.json").write_text(text)
        (folder.path / "control.json").chmod(0o600)
        assert folder.replicas_asked_for() is None


def test_processes_that_keep_dying_end_the_run_with_a_remedy(tmp_path: Path, data: str) -> None:
    config = tiny.config(data)
    config = dataclasses.replace(
        config, replicas=dataclasses.replace(config.replicas, max_restarts=2)
    )

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        backend.kill_process(replica % 2)

    run = Run(tmp_path / "run", config)
    with pytest.raises(RunFailed, match=r"replaced 2 times within an hour.*downpour resume"):
        run.go(kill)
