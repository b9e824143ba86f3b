"""Statistics and shuffling under asynchrony: measured on runs of the whole system on threads."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config import recipes
from downpour.cluster.controller.controller import Controller
from downpour.cluster.errors import UserError, run_cli
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.cluster.reproduce.asynchrony import experiment
from downpour.cluster.reproduce.asynchrony.experiment import AVERAGED, ONE, RECOMPUTED, SERVER
from downpour.cluster.reproduce.asynchrony.page import make_report
from downpour.cluster.reproduce.runs import Curve
from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.run.provenance import write_about
from downpour.cluster.training import launch, session
from downpour.cluster.training.inputs import Data, check_data, check_data_unchanged
from downpour.cluster.training.result import make_result
from downpour.shuffler.dataset.encoding import label_values
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from tests.helpers import tiny
from tests.helpers.thread_backend import ThreadBackend

LOOKS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def _train(folder: RunFolder, data: Data, **_: object) -> int:
    """As `launch.train`, on threads."""
    config, store = folder.config(), CheckpointStore(folder.checkpoints_uri)
    check_data_unchanged(folder, data)
    backend = ThreadBackend(config, data.plan, store=store)
    if config.policy.record_pushes:
        backend.record_into(folder.path / "record")
        write_about(folder.path / "record", threads=1)
    controller = Controller(
        config=config,
        plan=data.plan,
        backend=backend,
        folder=folder,
        store=store,
        listener=Telemetry(config=config, plan=data.plan, folder=folder, show=lambda _: None),
    )
    try:
        outcome = controller.run()
    finally:
        backend.stop()
    folder.write_json("result.json", make_result(folder, config, outcome, time.time()))
    return 0


def _trained(path: Path, data: str, replicas: int, steps: int) -> Path:
    """A recorded run that came to its end."""
    config = tiny.config(
        data, replicas=replicas, concurrent_steps=steps, partitions=1, record_pushes=True
    )
    _train(RunFolder.create(path, config), check_data(config))
    return path


def _measure(path: Path, told: list[str] | None = None) -> dict[str, Any]:
    progress = (lambda done, total: None) if told is None else lambda d, t: told.append(f"{d}/{t}")
    return experiment.measure(path, looks=LOOKS, progress=progress, say=lambda line: None)


def test_with_one_replica_its_statistics_are_the_servers(tmp_path: Path, data: str) -> None:
    path = _trained(tmp_path / "run", data, 1, 1)
    told: list[str] = []
    measured = _measure(path, told)
    assert told[-1] == "134/134"
    assert [look["version"] for look in measured["looks"]] == [45, 90, 134]
    for look in measured["looks"]:
        assert look[ONE] == {"0": look[SERVER]}
        assert look[AVERAGED] == look[SERVER]
        assert look[RECOMPUTED]["from_algorithm_2"] == 0.0
        assert look[SERVER]["from_algorithm_2"] > 0
    # What was scored while it trained, on the same weights and the server's statistics.
    assert measured["looks"][-1][SERVER]["accuracy"] == measured["accuracy"]
    told.clear()
    assert _measure(path, told) == json.loads((path / "statistics.json").read_text())
    assert told == []  # not computed again


def test_with_several_each_has_its_own(tmp_path: Path, data: str) -> None:
    measured = _measure(_trained(tmp_path / "run", data, 4, 2))
    assert measured["staleness_mean"] > 1
    last = measured["looks"][-1]
    assert last[SERVER]["accuracy"] == measured["accuracy"]
    assert len(last[ONE]) == 4
    away = {score["from_algorithm_2"] for score in last[ONE].values()}
    assert len(away) == 4
    assert last[SERVER]["from_algorithm_2"] not in away


def test_a_replay_that_is_another_run_is_no_measurement(tmp_path: Path, data: str) -> None:
    path = _trained(tmp_path / "run", data, 1, 1)
    config = json.loads((path / "config.json").read_text())
    config["server"]["statistics"]["decay"] = 0.5  # no gradient depends on it
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="statistics of partition 0 differ"):
        _measure(path)
    assert not (path / "statistics.json").exists()


@pytest.mark.parametrize("by_class", [False, True])
def test_shards(tmp_path: Path, data: str, by_class: bool) -> None:
    def write() -> Path:
        return experiment.write_shards(
            data, tmp_path / "shards", train_split="train", eval_split="test", by_class=by_class
        )

    folder = write()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write() == folder
    assert written == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    before, after = Dataset.open(data, "train"), Dataset.open(str(folder), "train")
    assert after.num_rows == before.num_rows
    assert after.class_names == before.class_names
    assert len(after.shard_rows) == (tiny.CLASSES if by_class else experiment.NUM_SHARDS)
    labels = [
        label_values(RowReader(d).take(np.arange(d.num_rows)).column("label"))
        for d in (before, after)
    ]
    expected = np.sort(labels[0], kind="stable") if by_class else labels[0]
    assert (labels[1] == expected).all()
    assert Dataset.open(str(folder), "test").num_rows == 200


def test_the_command(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, and again: then nothing is trained or measured any more."""
    trained: list[str] = []

    def train(folder: RunFolder, found: Data, **arguments: object) -> int:
        trained.append(folder.name)
        return _train(folder, found, **arguments)

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(session, "on_ray", lambda **_: contextlib.nullcontext(""))
    monkeypatch.setattr(recipes, "find", lambda name: tiny.config(data))
    arguments = ["reproduce", "asynchrony", "--output", str(tmp_path / "out"), "--data", data]
    arguments += ["--seeds", "1", "--looks", "2", "--epochs", "1"]
    assert run_cli(downpour, arguments) == 0, capsys.readouterr().err
    assert len(trained) == len(experiment.FLIGHTS) + len(experiment.SHUFFLES) - 1
    made = json.loads((tmp_path / "out" / "data.json").read_text())
    looks = made["measured"]["flight-50-seed-0"]["looks"]
    assert [look["version"] for look in looks] == [34, 67]
    assert made["configurations"]["within_shard-seed-0"]["data"]["strategy"] == "within_shard"
    assert run_cli(downpour, arguments) == 0, capsys.readouterr().err
    assert len(trained) == len(experiment.FLIGHTS) + len(experiment.SHUFFLES) - 1
    assert run_cli(downpour, [*arguments, "--strategy", "random"]) == 2
    assert "--strategy" in capsys.readouterr().err


def test_which_runs() -> None:
    runs = experiment.flight_runs({"epochs": 4, "ramp_epochs": 1.0}, range(2))
    assert list(runs)[:3] == ["flight-1-seed-0", "flight-1-seed-1", "flight-10-seed-0"]
    sizes = {(c.replicas.replicas, c.replicas.steps.concurrent_steps) for c in runs.values()}
    assert sizes == {(1, 1), (10, 1), (10, 5)}
    assert all(c.policy.record_pushes and c.policy.epochs == 4 for c in runs.values())
    assert {c.policy.seed for c in runs.values()} == {0, 1}
    with pytest.raises(UserError, match="--concurrent-steps"):
        experiment.flight_runs({"concurrent_steps": 3}, range(1))


def test_the_numbers_and_the_page(tmp_path: Path) -> None:
    def score(accuracy: float, away: float = 0.5) -> dict[str, float]:
        return {"accuracy": accuracy, "loss": 1.0, "from_algorithm_2": away}

    def run(server: float) -> dict[str, Any]:
        look = {
            "version": 10,
            "epoch": 1.0,
            ONE: {"0": score(0.5), "1": score(0.7)},
            AVERAGED: score(0.8),
            SERVER: score(server),
            RECOMPUTED: score(0.9, 0.0),
        }
        return {"staleness_mean": 3.0, "accuracy": server, "elapsed_s": 1.0, "looks": [look]}

    measured = {
        experiment.flight_run(f, s): run(0.86 + 0.02 * s)
        for f in experiment.FLIGHTS
        for s in (0, 1)
    }
    ends = {
        experiment.shuffle_run(name, s): 0.9 + 0.02 * s
        for name in experiment.SHUFFLES
        for s in (0, 1)
    }
    numbers = experiment.summary(measured, ends, 2)
    one, server = numbers["flights"]["50"][ONE], numbers["flights"]["50"][SERVER]
    assert one["final_accuracy"] == pytest.approx((0.6, 0.0))
    assert (one["mean_gap"], one["worst_gap"]) == pytest.approx((-0.3, -0.4))
    assert server["final_accuracy"] == pytest.approx((0.87, 0.02 / 2**0.5))
    assert numbers["shuffles"]["random"] == pytest.approx((0.91, 0.02 / 2**0.5))
    curves = {
        name: Curve(updates=(1, 2), accuracy=(0.1, ends.get(name, 0.5)), seconds=1.0)
        for name in (*measured, *ends)
    }
    config = dataclasses.replace(tiny.config("x"), recipe="mnist-bn")
    page = make_report(
        tmp_path, dict.fromkeys(curves, config), measured, curves, seeds=2, command="downpour"
    )
    assert "87.00% ± 1.41%" in page.read_text()
    made = json.loads((tmp_path / "data.json").read_text())
    assert made["flights"]["1"]["server"]["mean_gap"] == pytest.approx(-0.03)
    assert (tmp_path / "statistics.png").is_file()
    assert (tmp_path / "shuffling.png").is_file()
