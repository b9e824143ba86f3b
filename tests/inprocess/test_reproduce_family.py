"""The reports of sections 4.2.2 and 4.2.3, from runs that are made up; training is the system's."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster import launch
from cluster.backend import RunFailed
from cluster.errors import UserError
from cluster.reproduce import ensemble, family
from cluster.reproduce.runs import Curve, curve_of, train_all
from cluster.run_folder import RunFolder
from tests.inprocess.test_inference import _config, _make_run, _pixels
from tests.inprocess.tiny import write_split

QUIET = Console(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_split(tmp_path / "data", "train", *_pixels(320, 1))
    write_split(tmp_path / "data", "test", *_pixels(20, 2), shards=1)
    return tmp_path / "data"


def _curve(*points: tuple[int, float], failure: str | None = None) -> Curve:
    updates, accuracy = zip(*points, strict=True)
    return Curve(updates=updates, accuracy=accuracy, seconds=1.0, failure=failure)


CURVES = {
    "inception": _curve((10, 0.3), (100, 0.6)),
    "bn-baseline": _curve((10, 0.5), (40, 0.61)),
    "bn-x5": _curve((10, 0.6), (100, 0.7)),
    "bn-x30": _curve((10, 0.4), (20, 0.75)),
    "bn-x5-sigmoid": _curve((10, 0.2), (100, 0.55)),
    "inception-x5": _curve((10, 0.1), failure="blew up"),
    "inception-sigmoid": _curve((10, 0.1), (100, 0.1)),
}


def test_figure_3_by_hand() -> None:
    rows = {row["variant"]: row for row in family.figure_3(CURVES)}
    assert rows["inception"]["steps"] == 100
    assert rows["bn-baseline"]["share_of_inceptions"] == 0.4
    assert rows["bn-x5"]["steps"] == 10
    assert rows["bn-x30"]["best"] == 0.75
    assert rows["bn-x5-sigmoid"]["steps"] is None
    assert rows["bn-x5"]["paper_share"] == pytest.approx(2.1 / 31)
    told = family.findings(list(rows.values()), chance=0.1)
    assert [agrees for _, _, agrees in told] == [True] * 5
    worse = CURVES | {"bn-x30": _curve((10, 0.4)), "inception-sigmoid": _curve((10, 0.5))}
    told = family.findings(family.figure_3(worse), chance=0.1)
    assert [agrees for _, _, agrees in told] == [True, True, False, False, True]


def test_the_report(tmp_path: Path, data: Path) -> None:
    runs = family.family({"data": str(data), "width": 0.0625, "image_size": 28})
    assert list(runs) == list(CURVES)
    assert runs["inception-x5"].server.schedule.learning_rate == pytest.approx(0.0075)
    assert runs["inception-sigmoid"].model.arguments["activation"] == "sigmoid"
    assert all(run.data.eval_split == "test" for run in runs.values())
    page = family.make_report(tmp_path / "report", runs, CURVES, "downpour reproduce inception")
    assert "never reached it" not in page.read_text()
    made = json.loads((tmp_path / "report" / "data.json").read_text())
    assert len(made["figure_3"]) == 7
    assert (tmp_path / "report" / "figure-2.png").is_file()


def test_runs_are_begun_gone_on_with_or_left_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        name: _config(data, seed=i, epochs=1)
        for i, name in enumerate(("done", "half", "new", "nan"))
    }
    done = RunFolder.create(tmp_path / "done", configs["done"])
    done.write_json("result.json", {"elapsed_s": 5.0})
    done.append_metrics({"updates": 3, "accuracy": 0.5})
    RunFolder.create(tmp_path / "half", configs["half"])
    trained = []

    def train(folder: RunFolder, _data: object, *, resume: bool, **_: object) -> int:
        trained.append((folder.name, resume))
        if folder.name == "nan":
            raise RunFailed("blew up")
        folder.append_metrics({"updates": 7, "accuracy": 0.25})
        folder.write_json("result.json", {"elapsed_s": 1.0})
        return 0

    monkeypatch.setattr(launch, "train", train)
    assert train_all(configs, tmp_path, address=None, console=QUIET) == 0
    assert trained == [("half", True), ("new", False), ("nan", False)]
    assert curve_of(tmp_path / "done") == Curve(updates=(3,), accuracy=(0.5,), seconds=5.0)
    RunFolder.open(tmp_path / "nan").append_metrics({"updates": 1, "accuracy": 0.1})
    assert curve_of(tmp_path / "nan").failure == "blew up"
    trained.clear()
    assert train_all(configs, tmp_path, address=None, console=QUIET) == 0
    assert trained == []
    with pytest.raises(UserError, match="a run with other options"):
        train_all({"done": configs["new"]}, tmp_path, address=None, console=QUIET)
    monkeypatch.setattr(launch, "train", lambda *_args, **_options: 143)
    assert train_all({"later": configs["new"]}, tmp_path, address=None, console=QUIET) == 143


def test_the_ensemble(tmp_path: Path, data: Path) -> None:
    runs = ensemble.members({"data": str(data), "width": 0.0625, "image_size": 28})
    assert len(runs) == 6
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"member-{i}")
        _make_run(paths[-1], _config(data, seed=i))
    said: list[str] = []
    found = ensemble.errors(paths, crops=[1, 10], rows=12, show=said.append)
    by_key = {(row["who"], row["crops"]): row for row in found}
    assert by_key[("six networks", 10)]["examples"] == 12
    assert by_key[("six networks", 10)]["networks"] == 2
    alone = [by_key[(path.name, 1)]["top1_error"] for path in paths]
    assert by_key[("one network", 1)]["top1_error"] == min(alone)
    page = ensemble.make_report(tmp_path / "report", runs, found, "downpour reproduce ensemble")
    assert "six networks" in page.read_text()
