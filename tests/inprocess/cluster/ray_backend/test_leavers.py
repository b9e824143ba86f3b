"""Which actors are taken to be on nodes that are to leave; Ray is played."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import state
from ray.exceptions import GetTimeoutError

from downpour.cluster.config.placement import Node
from downpour.cluster.ray_backend import leavers
from downpour.cluster.ray_backend.leavers import Ends, Leavers


def actor(name: str, fast_s: float = 0.0) -> Any:
    """A handle as Ray's, on a node whose clock is fast by so much."""
    call = SimpleNamespace(remote=lambda function: function(None) + fast_s)
    return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name), __ray_call__=call)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has Ray know of nodes that leave, of those that are alive, and of actors on nodes."""

    def played(going: dict[str, float | None], nodes: str, on: dict[str, str]) -> Leavers | None:
        monkeypatch.setattr(leavers, "leaving", lambda: going)
        alive = [Node(id=name, address="10.0.0.1") for name in nodes]
        monkeypatch.setattr(leavers, "alive", lambda: alive)
        actors = {name: {"Address": {"NodeID": node}} for name, node in on.items()}
        monkeypatch.setattr(state, "actors", lambda: actors)
        monkeypatch.setattr(leavers.ray, "get", lambda value, *, timeout: value)
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
    left_s = found.remaining_s(Ends())
    assert left_s == pytest.approx(late - time.time(), abs=10.0), "nobody is on b"


@pytest.mark.parametrize("fast_s", [-180.0, 180.0])
def test_a_node_whose_clock_is_another_says_by_it_when_it_leaves(play: Any, fast_s: float) -> None:
    """As `ray drain-node` on that node makes the time of it."""
    found = play({"a": time.time() + fast_s + 120.0}, "ad", {"x": "a"})
    assert found is not None
    found.among([actor("x", fast_s)])
    assert found.remaining_s(Ends()) == pytest.approx(120.0, abs=10.0)


def test_a_clock_that_is_set_during_a_notice_changes_nothing(play: Any) -> None:
    now, end = 50.0, time.time() + 120.0
    ends = Ends(lambda: now)
    for passed_s, fast_s in ((0.0, 0.0), (5.0, 180.0), (20.0, -180.0), (500.0, 0.0)):
        now = 50.0 + passed_s
        found = play({"a": end}, "ad", {"x": "a"})
        assert found is not None
        found.among([actor("x", fast_s)])
        left_s = found.remaining_s(ends)
        assert left_s == pytest.approx(max(0.0, 120.0 - passed_s), abs=10.0)


def test_a_node_on_which_nobody_answers_leaves_by_the_drivers_clock(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(value: object, *, timeout: float) -> None:
        raise GetTimeoutError

    found = play({"a": time.time() + 120.0}, "ad", {"x": "a"})
    assert found is not None
    found.among([actor("x", 180.0)])
    monkeypatch.setattr(leavers.ray, "get", late)
    assert found.remaining_s(Ends()) == pytest.approx(120.0, abs=10.0)


def test_a_node_that_does_not_say_when(play: Any) -> None:
    found = play({"a": None}, "ad", {"x": "a"})
    assert found is not None
    assert found.among([actor("x")]) == (0,)
    assert found.remaining_s(Ends()) is None


def test_what_is_beside_the_driver_ends_with_it(play: Any) -> None:
    found = play({"d": time.time() + 30.0, "a": None}, "abd", {"x": "d", "y": "a"})
    assert found is not None
    assert found.has_driver
    assert found.among([actor("x"), actor("y")]) == (1,)
    assert found.remaining_s(Ends()) is not None


@pytest.mark.parametrize("nodes", ["d", "ad"])
def test_without_another_place_nobody_moves(play: Any, nodes: str) -> None:
    found = play(dict.fromkeys(nodes, 0.0), nodes, dict.fromkeys("xy", "a"))
    assert found is not None
    assert found.has_driver
    assert found.among([actor("x"), actor("y")]) == ()
