"""Which actors are taken to be on nodes that are to leave; Ray is played."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import state

from downpour.cluster.config.placement import Node
from downpour.cluster.ray_backend import leavers
from downpour.cluster.ray_backend.leavers import Leavers


def actor(name: str) -> Any:
    """A handle as Ray's."""
    return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has Ray know of nodes that leave, of those that are alive, and of actors on nodes."""

    def played(going: dict[str, float | None], nodes: str, on: dict[str, str]) -> Leavers | None:
        monkeypatch.setattr(leavers, "leaving", lambda: going)
        alive = [Node(id=name, address="10.0.0.1") for name in nodes]
        monkeypatch.setattr(leavers, "alive", lambda: alive)
        actors = {name: {"Address": {"NodeID": node}} for name, node in on.items()}
        monkeypatch.setattr(state, "actors", lambda: actors)
        return Leavers.look("d")

    return played


def test_nobody_leaves(play: Any) -> None:
    assert play({}, "abd", {"x": "a"}) is None


def test_actors_on_nodes_that_are_to_leave(play: Any) -> None:
    soon, late = time.time() + 30.0, time.time() + 300.0
    found = play({"a": late, "b": soon}, "abcd", {"x": "a", "y": "c", "z": "a"})
    assert found is not None
    assert found.among([actor("x"), None, actor("y"), actor("z"), actor("unknown")]) == (0, 3)
    assert not found.has_driver
    assert found.remaining_s == pytest.approx(late - time.time(), abs=10.0), "nobody is on b"


def test_a_node_that_does_not_say_when(play: Any) -> None:
    found = play({"a": None}, "ad", {"x": "a"})
    assert found is not None
    assert found.among([actor("x")]) == (0,)
    assert found.remaining_s is None


def test_what_is_beside_the_driver_ends_with_it(play: Any) -> None:
    found = play({"d": time.time() + 30.0, "a": None}, "abd", {"x": "d", "y": "a"})
    assert found is not None
    assert found.has_driver
    assert found.among([actor("x"), actor("y")]) == (1,)
    assert found.remaining_s is not None


@pytest.mark.parametrize("nodes", ["d", "ad"])
def test_without_another_place_nobody_moves(play: Any, nodes: str) -> None:
    found = play(dict.fromkeys(nodes, 0.0), nodes, dict.fromkeys("xy", "a"))
    assert found is not None
    assert found.has_driver
    assert found.among([actor("x"), actor("y")]) == ()
