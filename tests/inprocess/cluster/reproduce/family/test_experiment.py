"""The reports of sections 4.2.2 and 4.2.3, from runs that are made up; training is the system's."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.errors import UserError
from downpour.cluster.reproduce import ensemble
from downpour.cluster.reproduce.family import experiment as family
from downpour.cluster.reproduce.family import page as family_report
from downpour.cluster.reproduce.runs import Curve, curve_of, train_all
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.serving import inference
from downpour.cluster.training import launch, session
from tests.helpers.tiny import write_split
from tests.helpers.trained import coloured, make_run, small_config

QUIET = Console(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_split(tmp_path / "data", "train", *coloured(320, 1))
    write_split(tmp_path / "data", "test", *coloured(20, 2), shards=1)
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


def test_without_a_baseline_that_learned_there_is_no_goal() -> None:
    stuck = CURVES | {"inception": _curve((10, 0.1), (100, 0.11))}
    told = family.findings(family.figure_3(stuck), chance=0.1)
    assert [agrees for _, _, agrees in told] == [False, False, True, True, True]
    assert "stayed at chance" in told[0][1]
    assert "stayed at chance" in told[1][1]
    collapsed = CURVES | {"inception-x5": _curve((10, 0.3), (100, 0.1))}
    assert family.findings(family.figure_3(collapsed), chance=0.1)[-1][2]
    learned = CURVES | {"inception-x5": _curve((10, 0.1), (100, 0.3))}
    assert not family.findings(family.figure_3(learned), chance=0.1)[-1][2]


def test_some_variants_only(data: Path) -> None:
    runs = family.family({"data": str(data)}, ["bn-x30", "inception-x5"])
    assert list(runs) == ["inception", "bn-x30", "inception-x5"]
    told = family.findings(family.figure_3({name: CURVES[name] for name in runs}), chance=0.1)
    assert [claim for claim, _, _ in told] == [
        "BN-x30 ends highest",
        "Inception at 5 times the rate blows up",
    ]


def test_several_seeds_and_every_step_in_flight_besides(data: Path) -> None:
    given = {"data": str(data), "seed": 5}
    runs = family.family(given, ["bn-x5", "inception-x5"], seeds=2, all_in_flight=["bn-x5"])
    assert {name: run.policy.seed for name, run in runs.items()} == {
        "inception": 5,
        "bn-x5": 5,
        "inception-x5": 5,
        "inception-seed-1": 6,
        "bn-x5-seed-1": 6,
        "bn-x5-all-in-flight": 5,
    }
    steps = {name: run.replicas.steps.in_flight for name, run in runs.items()}
    assert steps["bn-x5-all-in-flight"] == "all"
    assert steps["bn-x5"] == "auto"
    with pytest.raises(UserError, match="give --only bn-x30 too"):
        family.family(given, ["bn-x5"], all_in_flight=["bn-x30"])


def test_a_run_is_compared_with_inceptions_of_its_seed() -> None:
    curves = {
        "inception": _curve((10, 0.3), (100, 0.6)),
        "bn-x5": _curve((10, 0.6), (100, 0.7)),
        "inception-seed-1": _curve((50, 0.3), (200, 0.65)),
        "bn-x5-seed-1": _curve((10, 0.6), (60, 0.7)),
        "inception-seed-2": _curve((50, 0.3), (100, 0.5)),
        "bn-x5-seed-2": _curve((10, 0.4)),
    }
    rows = {row["variant"]: row for row in family.figure_3(curves)}
    assert rows["bn-x5"]["shares"] == [0.1, 0.3, None]
    assert rows["bn-x5"]["share_of_inceptions"] == 0.3
    assert rows["bn-x5"]["steps"] == 60
    assert rows["bn-x5"]["best"] == 0.7
    assert rows["bn-x5"]["bests"] == [0.7, 0.7, 0.4]
    assert rows["inception"]["shares"] == [1, 1, 1]
    assert family.findings(list(rows.values()), chance=0.1) == [
        (
            "BN-x5 needs a fourteenth of the steps (here: at most a tenth)",
            "0.30 of Inception's steps (0.10 to never)",
            False,
        )
    ]


def test_whether_it_had_stopped_getting_better() -> None:
    rising = [(i, i / 1000) for i in range(0, 101, 5)]
    assert family.late_gain(_curve(*rising)) == pytest.approx(0.025)
    flat = [(i, min(i, 50) / 100) for i in range(0, 101, 5)]
    assert family.late_gain(_curve(*flat)) == 0
    assert family.late_gain(_curve((10, 0.1), (100, 0.2))) is None


def test_variants_follow_inceptions_rate_decay_and_weight_loss(data: Path) -> None:
    given = {
        "data": str(data),
        "learning_rate": 0.01,
        "decay_epochs": 0.6,
        "weight_decay": 1e-3,
        "epochs": 3,
    }
    runs = family.family(given)
    server = {name: run.server for name, run in runs.items()}
    assert {name: round(s.schedule.learning_rate, 9) for name, s in server.items()} == {
        "inception": 0.01,
        "bn-baseline": 0.01,
        "bn-x5": 0.05,
        "bn-x30": 0.3,
        "bn-x5-sigmoid": 0.05,
        "inception-x5": 0.05,
        "inception-sigmoid": 0.01,
    }
    modified = {"bn-x5", "bn-x30", "bn-x5-sigmoid"}
    for name, one in server.items():
        assert one.schedule.decay_epochs == pytest.approx(0.1 if name in modified else 0.6)
        assert one.weight_decay == pytest.approx(2e-4 if name in modified else 1e-3)
        assert runs[name].policy.epochs == 3


def test_the_rate_that_inception_learns_best_with(data: Path) -> None:
    given = {"data": str(data), "epochs": 8, "width": 0.0625, "image_size": 28}
    short = family.trials(given, [0.03, 0.01], 2)
    assert [(r, c.server.schedule.learning_rate, c.policy.epochs) for r, c in short.items()] == [
        (0.01, 0.01, 2),
        (0.03, 0.03, 2),
    ]
    assert all(c.model.width == 0.0625 and c.recipe == "inception" for c in short.values())
    curves = {0.01: _curve((5, 0.3)), 0.03: _curve((5, 0.5), (9, 0.4)), 0.1: _curve((5, 0.1))}
    assert family.best_rate(curves, chance=0.1) == 0.03
    with pytest.raises(UserError, match=r"at any of 0\.01, 0\.1 \(highest accuracy 30\.00%\)"):
        family.best_rate({0.01: curves[0.01], 0.1: curves[0.1]}, chance=0.15)
    with pytest.raises(UserError, match="each once"):
        family.trials(given, [0.01, 0.01], 1)


def test_the_report(tmp_path: Path, data: Path) -> None:
    runs = family.family({"data": str(data), "width": 0.0625, "image_size": 28})
    assert list(runs) == list(CURVES)
    assert runs["inception-x5"].server.schedule.learning_rate == pytest.approx(0.0075)
    assert runs["inception-sigmoid"].model.arguments["activation"] == "sigmoid"
    assert all(run.data.eval_split == "test" for run in runs.values())
    tried = {0.0015: _curve((9, 0.4)), 0.0045: _curve((9, 0.3))}
    page = family_report.make_report(
        tmp_path / "report", runs, CURVES, "downpour reproduce inception", tried=tried
    )
    assert "never reached it" not in page.read_text()
    assert "at the edge of what was tried" in page.read_text()
    made = json.loads((tmp_path / "report" / "data.json").read_text())
    assert len(made["figure_3"]) == 7
    assert made["tried_rates"]["0.0045"]["accuracy"] == [0.3]
    assert (tmp_path / "report" / "figure-2.png").is_file()


def test_the_report_of_several_seeds(tmp_path: Path, data: Path) -> None:
    given = {"data": str(data), "width": 0.0625, "image_size": 28}
    runs = family.family(given, ["bn-x5"], seeds=2, all_in_flight=["bn-x5"])
    rising = [(i, i / 1000) for i in range(0, 101, 5)]
    flat = [(i, min(i, 50) / 100) for i in range(0, 101, 5)]
    curves = {name: _curve(*flat) for name in runs}
    page = family_report.make_report(tmp_path, runs, curves, "downpour reproduce inception")
    text = page.read_text()
    assert "Inception had stopped getting better." in text
    assert "medians over up to 2 runs" in text
    assert "1.00 (1.00 to 1.00)" in text
    curves["inception-seed-1"] = _curve(*rising)
    text = family_report.make_report(tmp_path, runs, curves, "…").read_text()
    assert "was still getting better in 1 of 2 runs" in text
    made = json.loads((tmp_path / "data.json").read_text())
    assert set(made["curves"]) == set(runs)


def test_runs_are_begun_gone_on_with_or_left_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        name: small_config(data, seed=i, epochs=1)
        for i, name in enumerate(("done", "half", "new", "nan"))
    }
    done = RunFolder.create(tmp_path / "done", configs["done"])
    done.write_json("result.json", {"elapsed_s": 5.0})
    done.append_metrics({"time": 10.0, "updates": 3, "accuracy": 0.5})
    RunFolder.create(tmp_path / "half", configs["half"])
    trained = []

    def train(folder: RunFolder, _data: object, *, resume: bool, **_: object) -> int:
        trained.append((folder.name, resume))
        if folder.name == "nan":
            raise RunFailed("blew up")
        folder.append_metrics({"time": 20.0, "updates": 7, "accuracy": 0.25})
        folder.write_json("result.json", {"elapsed_s": 1.0})
        return 0

    monkeypatch.setattr(launch, "train", train)
    rays: list[str] = []

    @contextlib.contextmanager
    def on_ray(**_: object) -> Iterator[str]:
        rays.append("started")
        yield ""
        rays.append("stopped")

    monkeypatch.setattr(session, "on_ray", on_ray)
    assert train_all(configs, tmp_path, address=None, console=QUIET) == 0
    assert trained == [("half", True), ("new", False), ("nan", False)]
    assert rays == ["started", "stopped"]
    rays.clear()
    assert curve_of(tmp_path / "done") == Curve(updates=(3,), accuracy=(0.5,), seconds=0.0)
    RunFolder.open(tmp_path / "nan").append_metrics(
        {"time": 30.0, "updates": 1, "accuracy": 0.1, "loss": 2.0}
    )
    failed = curve_of(tmp_path / "nan")
    assert failed.failure == "blew up"
    assert failed.losses == ((1, 2.0),)
    again = RunFolder.open(tmp_path / "half")
    points = ((9, 0.3, 22.0), (12, 0.4, 25.5), (8, 0.35, 90.0), (13, 0.5, 91.0))
    for updates, accuracy, time in points:  # died, and resumed from 8
        again.append_metrics({"time": time, "updates": updates, "accuracy": accuracy})
    curve = curve_of(tmp_path / "half")
    assert (curve.updates, curve.accuracy) == ((7, 8, 13), (0.25, 0.35, 0.5))
    assert curve.seconds == 6.5, "without the pause before it was resumed"
    trained.clear()
    assert train_all(configs, tmp_path, address=None, console=QUIET) == 0
    assert trained == []
    assert rays == []
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
        make_run(paths[-1], small_config(data, seed=i))
    said: list[str] = []
    done: list[tuple[int, int]] = []
    found = ensemble.errors(
        paths,
        crops=[1, 10],
        rows=12,
        show=said.append,
        progress=lambda images, total: done.append((images, total)),
    )
    assert said == ["2 networks, 1 crop", "2 networks, 10 crops"]
    assert done[-1] == (12, 12)
    by_key = {(row["who"], row["crops"]): row for row in found}
    assert by_key["average", 10]["examples"] == 12
    assert by_key["average", 10]["networks"] == 2
    loaded = [inference.load(path) for path in paths]
    for who, crops, networks in (("average", 10, loaded), ("member-1", 1, loaded[1:])):
        score = inference.evaluate(networks, data=None, split=None, crops=crops, rows=12)
        row = by_key[who, crops]
        assert row["top1_error"] == pytest.approx(1 - score["accuracy"])
        assert row["top5_error"] == pytest.approx(1 - score["top5_accuracy"])
        assert row["gain"] == pytest.approx(by_key[who, 1]["top1_error"] - row["top1_error"])
    best = by_key["best", 1]
    assert best["top1_error"] == min(by_key[path.name, 1]["top1_error"] for path in paths)
    error = best["top1_error"]
    assert best["standard_error"] == pytest.approx((error * (1 - error) / 12) ** 0.5)
    page = ensemble.make_report(tmp_path / "report", runs, found, "downpour reproduce ensemble")
    assert "2 networks averaged" in page.read_text()
    assert "random crops of 8% to 100%" in page.read_text()


def test_the_ensemble_is_trained_on_random_crops(data: Path) -> None:
    given: dict[str, object] = {"data": str(data), "width": 0.0625, "image_size": 28}
    runs = ensemble.members(given)
    assert all(run.data.augment.random_crop and run.data.augment.mirror for run in runs.values())
    assert ensemble.unseen_sizes(runs, 144) is None
    without = ensemble.members(given | {"random_crop": False}, 2)
    assert list(without) == ["ensemble-1", "ensemble-2"]
    assert "--no-random-crop" in str(ensemble.unseen_sizes(without, 144))
    assert ensemble.unseen_sizes(without, 10) is None
