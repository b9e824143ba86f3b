"""A run's folder: made once, held by one process, written whole."""

import dataclasses
import json
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import EVENTS, RunFolder
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from tests.helpers.small_files import files_of_at_most


def test_a_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    for name in recipes.RECIPES:
        config = recipes.find(name)
        folder = RunFolder.create(tmp_path / name, config)
        data = str(Path(config.data.data).absolute())
        assert RunFolder.open(folder.path).config() == apply(config, {"data": data})


def test_a_folder_of_a_run_is_not_taken_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    with pytest.raises(UserError, match=r"holds a run of recipe mnist-bn: go on with"):
        RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    with pytest.raises(UserError, match=r"recipe mnist-bn, not of mnist: go on with"):
        RunFolder.create(tmp_path / "a", recipes.find("mnist"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.create(tmp_path, recipes.find("mnist"))
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.open(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        RunFolder.create(blocked / "run", recipes.find("mnist"))
    assert str(blocked) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_a_line(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist"))
    saved = json.loads((folder.path / "config.json").read_text())
    saved["colour"] = "blue"
    (folder.path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="has colour, which this version does not know"):
        folder.config()
    (folder.path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        folder.config()


def test_bundled_data_of_another_installation_is_this_ones(tmp_path: Path) -> None:
    config = recipes.find("mnist")
    gone = "/tmp/ray/session_1/py_modules_files/_ray_pkg_1/downpour/data/mnist-binary"
    for there, here in ((gone, BUNDLED_MNIST), ("/mnt/data/mnist-binar", "/mnt/data/mnist-binar")):
        data = dataclasses.replace(config.data, data=there)
        name = here.replace("/", "-")
        folder = RunFolder.create(tmp_path / name, dataclasses.replace(config, data=data))
        assert folder.config() == dataclasses.replace(
            config, data=dataclasses.replace(config.data, data=here)
        )


def test_a_line_that_did_not_fit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    folder.append_event("first")
    size = (folder.path / EVENTS).stat().st_size
    with files_of_at_most(size + 10), pytest.raises(OSError, match=r"No space|too large"):
        folder.append_event("cut off")
    assert (folder.path / EVENTS).stat().st_size == size
    folder.append_event("second")
    lines = (folder.path / EVENTS).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "second"]


@pytest.mark.parametrize("tail", [b'{"time": 1, "eve', bytes(9000), b"", b'{"a": "\xc3'])
def test_what_a_death_left_of_a_line_is_cut_off_by_the_next(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    for whole in (False, True):
        if whole:
            folder.append_event("first")
        with (folder.path / EVENTS).open("ab") as file:
            file.write(tail)
        folder.append_event("second")
        lines = (folder.path / EVENTS).read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "second"
        assert all("event" in json.loads(line) for line in lines)
