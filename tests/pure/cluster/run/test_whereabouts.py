"""A run's relative paths lead to the same files from any folder."""

import json
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.run.folder import DATA, RunFolder
from downpour.cluster.run.whereabouts import found_again


def test_where_a_relative_path_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run began, then here, then around the run; where it began if it is nowhere."""
    here, began = tmp_path / "here", tmp_path / "began"
    run = tmp_path / "around" / "runs" / "one"
    for folder in (here, began, run):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)

    def found(noted: Path | None = began) -> str:
        return found_again("data/pets", run, None if noted is None else str(noted))

    assert found() == str(began / "data/pets")
    assert found(None) == str(here / "data/pets")
    for place in (tmp_path / "around", here, began):
        (place / "data/pets").mkdir(parents=True)
        assert found() == str(place / "data/pets")
    assert found(None) == str(here / "data/pets")
    assert found(tmp_path / "gone") == str(here / "data/pets")


@pytest.mark.parametrize("path", ["/data/pets", "s3://bucket/pets", "file:///data/pets"])
def test_other_paths_are_what_they_are(path: str, tmp_path: Path) -> None:
    assert found_again(path, tmp_path, str(tmp_path)) == path


def test_a_run_is_read_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    given = {"data": "pets", "checkpoints": "kept"}
    run = RunFolder.create(tmp_path / "runs" / "a", apply(recipes.find("mnist"), given))
    run.write_json(DATA, {"train_fingerprint": "", "folder": str(tmp_path)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = RunFolder.open(Path("../runs/a"))
    assert folder.config().data.data == str(tmp_path / "pets")
    assert folder.checkpoints_uri == (tmp_path / "kept" / "a").as_uri()
    assert json.loads((folder.path / "config.json").read_text())["data"]["data"] == "pets"
