"""An actor that cannot start says why at each call."""

import sys
from pathlib import Path

import pytest

from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.errors import UserError
from downpour.cluster.ray_backend import parent_death
from downpour.cluster.ray_backend.orphans import Attendance
from downpour.models.lookup import import_named

THEIRS = """
def rate(name):
    return {}[name]
"""


class Counting:
    """Counts what it is told."""

    def __init__(self, start: object) -> None:
        self._count = start() if callable(start) else start

    def __repr__(self) -> str:
        return f"Counting {self._count}"

    def add(self, number: int, *, twice: bool = False) -> int:
        """Adds."""
        self._count += (1 + twice) * number
        return self._count


@pytest.fixture(autouse=True)
def _stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent_death, "end_with_parent", lambda: None)


def test_an_actor_that_starts_is_as_it_was() -> None:
    made = parent_death.ending_with_parent(Counting)
    assert (made.__name__, made.add.__doc__) == ("Counting", "Adds.")
    actor = made(3)
    assert actor.add(2, twice=True) == 7
    assert repr(actor) == "Counting 7"


def test_the_users_error_is_told_with_its_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "their_rates.py"
    path.write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = import_named("their_rates")
    monkeypatch.delitem(sys.modules, "their_rates")
    actor = parent_death.ending_with_parent(Counting)(lambda: theirs.rate("cosine"))
    assert repr(actor) == "Counting"
    with pytest.raises(RunFailed, match=rf"KeyError: 'cosine' \({path}:3\), where Counting"):
        actor.add(1)


def test_an_error_with_a_remedy_stays_itself() -> None:
    def start() -> int:
        raise UserError("give another")

    actor = parent_death.ending_with_parent(Counting)(start)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^give another$"):
            actor.add(1)


def test_an_actor_works_for_another_driver_once_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[Attendance] = []
    monkeypatch.setattr(parent_death, "end_as_orphan", watched.append)
    actor = parent_death.ending_with_parent(Counting, driver="a")(3)
    assert actor.add(1) == 4
    assert [attendance.driver for attendance in watched] == ["a"]
    actor.attend("b")
    assert [attendance.driver for attendance in watched] == ["b"]
    parent_death.ending_with_parent(Counting)(3)
    assert len(watched) == 1
