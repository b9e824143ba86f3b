"""Nothing is unpickled that this user has not sealed: a run's folder may come from anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run import sealed
from downpour.cluster.run.folder import CONFIG, RunFolder
from downpour.models import by_value
from downpour.models.errors import RegistryError
from tests.helpers import tiny

ran: list[str] = []


def run_something() -> None:
    """What an attacker's pickle would call."""
    ran.append("ran")


class Attack:
    def __reduce__(self) -> Any:
        return run_something, ()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    ran.clear()
    return path


def config(pickled: bytes) -> RunConfig:
    made = tiny.config("/data")
    name = by_value.name_of("net", pickled)
    model = dataclasses.replace(made.model, model=name, arguments={}, carried={name: pickled})
    return dataclasses.replace(made, model=model)


def test_a_user_reads_what_this_user_wrote(tmp_path: Path, home: Path) -> None:
    made = config(pickle.dumps(len))
    folder = RunFolder.create(tmp_path / "run", made)
    assert RunFolder.open(folder.path).config() == made
    assert (folder.path / sealed.CODE).stat().st_mode & 0o777 == 0o600
    assert (home / ".downpour" / "seal.key").stat().st_mode & 0o777 == 0o600
    assert "carried" not in json.loads((folder.path / CONFIG).read_text())["model"]
    folder.discard_if_unused()
    assert not folder.path.exists()


def test_a_strangers_folder_runs_nothing_until_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run", config(pickle.dumps(Attack())))
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("HOME", str(other))
    for _ in range(2):  # without a key, and with one of the other's own
        found = RunFolder.open(folder.path).config()
        with pytest.raises(RegistryError, match=r"does not bear the seal of this user.*trust"):
            model_spec(found).build()
        assert ran == []
        RunFolder.create(tmp_path / f"mine{_}", config(pickle.dumps(len)))
    assert sealed.trust(folder.path) == list(config(pickle.dumps(Attack())).model.carried)
    with pytest.raises(RegistryError):  # it gives None, which is no factory
        model_spec(RunFolder.open(folder.path).config()).build()
    assert ran == ["ran"]


def test_changed_code_is_not_run(tmp_path: Path) -> None:
    made = config(pickle.dumps(len))
    folder = RunFolder.create(tmp_path / "run", made)
    attack = config(pickle.dumps(Attack()))
    other = RunFolder.create(tmp_path / "other", attack)
    forged = other.read_json(sealed.CODE) | {"seal": folder.read_json(sealed.CODE)["seal"]}
    os.chmod(folder.path / sealed.CODE, 0o600)
    (folder.path / sealed.CODE).write_text(json.dumps(forged))
    (reason,) = sealed.read(folder.path).values()
    assert isinstance(reason, str)
    assert "does not bear the seal" in reason


def test_another_pythons_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run", config(pickle.dumps(len)))
    monkeypatch.setattr(sealed, "_python", lambda: "3.99")
    (reason,) = sealed.read(folder.path).values()
    assert "and this is 3.99: use that one" in str(reason)


def test_a_key_that_cannot_be_kept_or_is_shared_is_a_line(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".downpour").mkdir()
    (home / ".downpour" / "seal.key").write_bytes(bytes(32))
    os.chmod(home / ".downpour" / "seal.key", 0o644)
    with pytest.raises(UserError, match="is not a key of this user's alone"):
        RunFolder.create(tmp_path / "run", config(pickle.dumps(len)))
    monkeypatch.setenv("HOME", str(tmp_path / "none" / "none"))
    with pytest.raises(UserError, match="cannot be kept in"):
        RunFolder.create(tmp_path / "run", config(pickle.dumps(len)))
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_a_folder_without_code_cannot_be_trusted(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", tiny.config("data"))
    with pytest.raises(UserError, match="holds no code to trust"):
        sealed.trust(tmp_path / "run")
