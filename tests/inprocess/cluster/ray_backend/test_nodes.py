"""Room on nodes that stay; Ray is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import state

from downpour.cluster.config.placement import Node, PlacementConfig
from downpour.cluster.ray_backend import nodes
from downpour.cluster.ray_backend.nodes import Nodes, staying


def id_of(name: str) -> str:
    """As Ray's, in hexadecimal."""
    return name * 56


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four nodes with two GPUs each; both of the first are taken."""
    context = SimpleNamespace(get_node_id=lambda: id_of("a"))
    monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda: context)
    there = [Node(id=id_of(name), address=name, cpus=1, gpus=2) for name in "abcd"]
    monkeypatch.setattr(nodes, "alive", lambda: there)
    going: dict[str, float | None] = {}
    monkeypatch.setattr(nodes, "leaving", lambda: going)
    free = {"a": {"CPU": 1.0}, "b": {"GPU": 0.5}, "c": {"GPU": 1.75}, "d": {"GPU": 2.0}}
    by_id = {id_of(name): resources for name, resources in free.items()}
    monkeypatch.setattr(state, "available_resources_per_node", lambda: by_id)
    return SimpleNamespace(going=going)


def test_processes_that_gpus_of_other_nodes_have_room_for(cluster: Any) -> None:
    found = Nodes(PlacementConfig(), gpu_share=0.5)
    assert found.free_gpu_places() == 0 + 1 + 3 + 4
    cluster.going[id_of("d")] = None
    assert found.free_gpu_places() == 4
    assert Nodes(PlacementConfig()).free_gpu_places() is None


def test_no_node_that_stays_is_what_replicas_ask_for(cluster: Any) -> None:
    assert Nodes(PlacementConfig(replicas_on="k=v"), gpu_share=0.5).free_gpu_places() == 0


def test_nothing_is_placed_on_nodes_that_are_to_leave_unless_all_are(cluster: Any) -> None:
    cluster.going.update({id_of("b"): None, id_of("c"): 1.0})
    assert [node.address for node in staying()] == ["a", "d"]
    on_any = Nodes(PlacementConfig(partitions_on="any"))
    placed = [on_any.scheduling("partitions", index).node_id for index in (0, 1, 2)]
    assert placed == [id_of(name) for name in "ada"]
    cluster.going.update(dict.fromkeys(map(id_of, "ad")))
    assert [node.address for node in staying()] == list("abcd")
