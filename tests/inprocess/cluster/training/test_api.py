"""`downpour.train` and `downpour.resume`: what they make of their arguments; training is played."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

import downpour
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import CONFIG, RESULT, STATUS, RunFolder
from downpour.cluster.training import launch
from downpour.shuffler.errors import DatasetError
from tests.helpers import tiny


class Played:
    """Stands in for `launch.train`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.stopped_by: str | None = None

    def __call__(self, folder: RunFolder, data: Any, **options: Any) -> int:
        self.calls.append({"folder": folder, "data": data, **options})
        if self.error is not None:
            raise self.error
        if self.stopped_by is not None:
            folder.write_json(STATUS, {"state": "stopped", "reason": self.stopped_by})
            return 143
        folder.write_json(RESULT, {"accuracy": 1.0})
        return 0


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(launch, "train", played)
    return played


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny.config(tiny.dataset(tmp_path_factory.mktemp("data")))


def test_each_run_has_a_folder_of_its_own(
    tmp_path: Path, config: RunConfig, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "now")
    folders = [downpour.train(config, runs=tmp_path / "runs") for _ in range(3)]
    assert [folder.name for folder in folders] == ["tiny-now", "tiny-now-2", "tiny-now-3"]
    assert all((folder / RESULT).is_file() for folder in folders)
    assert downpour.train(config, runs=str(tmp_path), name="mine") == tmp_path / "mine"
    assert [call["resume"] for call in played.calls] == [False] * 4
    assert RunFolder.open(tmp_path / "mine").config() == config


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/b", ".", "..", "a\0b"])
def test_a_run_stays_in_the_folder_of_runs(
    tmp_path: Path, config: RunConfig, played: Played, name: str
) -> None:
    with pytest.raises(UserError, match="is not that of one folder"):
        downpour.train(config, runs=tmp_path / "runs", name=name)
    assert list(tmp_path.iterdir()) == []
    assert played.calls == []


def test_a_recipe_may_be_named(tmp_path: Path, played: Played) -> None:
    folder = downpour.train("mnist-bn", runs=tmp_path, name="a", address="ray://x", dashboard=True)
    assert RunFolder.open(folder).config().recipe == "mnist-bn"
    assert played.calls[0]["address"] == "ray://x"
    assert played.calls[0]["dashboard"] is True


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("mnist_bn", "did you mean mnist-bn"),
        ("there.is.none:recipe", "cannot be imported"),
        ({"recipe": "mnist"}, "give a downpour.RunConfig, or the name of a recipe"),
        (None, "config is None: give a downpour.RunConfig"),
        (lambda: None, "call the function, and give what it returns"),
    ],
)
def test_what_is_no_configuration_is_a_line(
    tmp_path: Path, played: Played, wrong: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        downpour.train(wrong, runs=tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    assert played.calls == []


def test_a_model_in_the_script_itself_is_refused(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    with pytest.raises(UserError, match="has no such function: define it before this"):
        downpour.train(tiny.config(config.data.data, model="__main__:net"), runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_refuses_its_values_is_a_line(
    monkeypatch: pytest.MonkeyPatch, played: Played
) -> None:
    module = types.ModuleType("own_api_recipes")
    module.wrong = lambda: downpour.ServerConfig(partitions=0)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "own_api_recipes", module)
    monkeypatch.setattr("downpour.cluster.config.recipes.add_working_directory", lambda: None)
    with pytest.raises(UserError, match="recipe 'own_api_recipes:wrong': partitions is 0: give"):
        downpour.train("own_api_recipes:wrong")


def test_data_that_is_not_there_leaves_no_folder(tmp_path: Path, played: Played) -> None:
    with pytest.raises(DatasetError):
        downpour.train(tiny.config(str(tmp_path / "none")), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_never_began_leaves_no_folder(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    for error in (UserError("Ray did not start"), KeyboardInterrupt()):
        played.error = error
        with pytest.raises(type(error)):
            downpour.train(config, runs=tmp_path, name="a")
        assert not (tmp_path / "a").exists()


def test_a_run_that_was_stopped_is_an_error_that_says_how_to_go_on(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    played.stopped_by = "SIGTERM"
    with pytest.raises(downpour.RunStopped, match=r"SIGTERM.*go on with downpour\.resume\('"):
        downpour.train(config, runs=tmp_path, name="a")
    played.stopped_by = None
    assert downpour.resume(tmp_path / "a", replicas=2) == tmp_path / "a"
    assert played.calls[-1]["resume"] is True
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["replicas"]["replicas"] == 2


def test_what_holds_no_run_cannot_be_resumed(tmp_path: Path, played: Played) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        downpour.resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_resumed_keeps_its_folder(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    RunFolder.create(tmp_path / "a", config)
    played.error = UserError("Ray did not start")
    with pytest.raises(UserError, match="Ray did not start"):
        downpour.resume(tmp_path / "a")
    assert (tmp_path / "a" / CONFIG).is_file()
