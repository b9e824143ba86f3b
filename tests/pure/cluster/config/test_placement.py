"""Which node gets which actor."""

from __future__ import annotations

import pytest

from downpour.cluster.config.placement import (
    Node,
    NoPlace,
    PlacementConfig,
    Role,
    candidates,
    check_gpu_room,
    demand,
    disk_of,
    disks,
    gpu_room,
    spread,
    standby_node,
    with_gpus,
)

HEAD = Node(id="h", address="10.0.0.1", cpus=0)
SERVER = Node(id="s", address="10.0.0.2", cpus=4, labels={"downpour": "partitions"})
BIG = Node(id="b", address="10.0.0.3", cpus=2, labels={"downpour": "replicas"}, resources={"gold"})
SMALL = Node(id="a", address="10.0.0.4", cpus=1, labels={"downpour": "replicas"})
NODES = (SMALL, BIG, SERVER, HEAD)


def ids(role: Role, config: PlacementConfig | None = None, nodes: tuple[Node, ...] = NODES) -> str:
    return "".join(n.id for n in candidates(role, config or PlacementConfig(), nodes, "h"))


def test_by_themselves_actors_go_where_the_labels_say() -> None:
    assert ids("partitions") == "s"
    assert ids("shufflers") == "h"  # nobody is labelled for them: beside the driver
    assert ids("replicas") == "ba"
    assert ids("evaluator") == "h"


def test_without_labels_replicas_are_on_every_node_that_computes() -> None:
    plain = (HEAD, Node(id="x", address="10.0.0.9", cpus=1))
    assert ids("replicas", nodes=plain) == "x"
    assert ids("partitions", nodes=plain) == "h"


def test_shards_are_looked_for_on_the_shufflers_nodes_or_on_all_that_compute() -> None:
    def found(*nodes: Node, config: PlacementConfig | None = None) -> str:
        return "".join(n.id for n in disks(config or PlacementConfig(), nodes, "h"))

    assert found(*NODES) == "sba"
    reader = Node(id="r", address="10.0.0.8", cpus=1, labels={"downpour": "shufflers"})
    assert found(*NODES, reader) == "r"
    assert found(*NODES, reader, config=PlacementConfig(shufflers_on="driver")) == "h"
    assert found(*NODES, config=PlacementConfig(shufflers_on="gold")) == "b"


def test_a_nodes_folder_is_its_labels_or_its_addresses() -> None:
    named = Node(id="n", address="10.0.0.7", labels={"downpour-node": "seven"})
    assert disk_of("/disk/{node}/data", named) == "/disk/seven/data"
    assert disk_of("/disk/{node}/data", HEAD) == "/disk/10.0.0.1/data"
    assert disk_of("/disk/data", named) == "/disk/data"


@pytest.mark.parametrize(
    ("text", "found"), [("any", "sba"), ("driver", "h"), ("gold", "b"), ("downpour=replicas", "ba")]
)
def test_a_place_may_be_named(text: str, found: str) -> None:
    assert ids("partitions", PlacementConfig(partitions_on=text)) == found


def test_a_place_that_no_node_has_is_named_with_those_that_there_are() -> None:
    with pytest.raises(NoPlace, match=r"label downpour=gpu.*downpour=partitions, downpour=replic"):
        ids("replicas", PlacementConfig(replicas_on="downpour=gpu"))
    with pytest.raises(NoPlace, match=r"resource silver: there are nodes with gold; .*--replicas-"):
        ids("replicas", PlacementConfig(replicas_on="silver"))


@pytest.mark.parametrize("text", ["", "a=b=c", "=x", "two words", "label="])
def test_a_place_that_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give auto, any, driver"):
        PlacementConfig(shufflers_on=text)


def test_processes_are_spread_by_processors_and_others_in_turn() -> None:
    nodes = [BIG, SMALL]
    assert [spread(nodes, i, by_cpu=True).id for i in range(4)] == ["b", "a", "b", "b"]
    assert [spread(nodes, i, by_cpu=False).id for i in range(3)] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("primary", "nodes", "found"),
    [
        ("s", NODES, "hh"),  # no other node is for partitions: beside the driver
        ("h", (HEAD, SMALL, BIG), "ba"),  # in turn over those that compute
        ("s", (*NODES, Node(id="t", address="10.0.0.5", labels={"downpour": "partitions"})), "tt"),
        ("h", (HEAD,), "hh"),  # there is no other
        ("s", (SERVER, Node(id="x", address="10.0.0.6")), "xx"),
    ],
)
def test_a_follower_is_on_another_node_than_its_partition(
    primary: str, nodes: tuple[Node, ...], found: str
) -> None:
    config = PlacementConfig()
    ids = [standby_node(config, nodes, "h", primary, index).id for index in range(2)]
    assert "".join(ids) == found


def test_an_autoscaler_is_asked_for_what_is_not_beside_the_driver() -> None:
    config = PlacementConfig(shufflers_on="driver", replicas_on="any")
    wanted = demand(config, {"partitions": 2, "shufflers": 1, "replicas": 10, "evaluator": 1})
    assert [(str(place), count) for place, count in wanted] == [
        ("label downpour=partitions", 2),
        ("any", 10),
    ]


ONE_GPU = Node(id="1", address="10.0.0.5", cpus=8, gpus=1, labels={"downpour": "gpu"})
FOUR_GPUS = Node(id="4", address="10.0.0.6", cpus=64, gpus=4, labels={"downpour": "replicas"})


def gpu_ids(config: PlacementConfig, *nodes: Node) -> str:
    return "".join(n.id for n in with_gpus(config, nodes, "h"))


def test_replicas_on_gpus_go_where_there_are_some() -> None:
    nodes = (*NODES, FOUR_GPUS, ONE_GPU)
    assert gpu_ids(PlacementConfig(), *nodes) == "14", "whatever the label says"
    assert gpu_ids(PlacementConfig(replicas_on="downpour=gpu"), *nodes) == "1"
    assert ids("replicas", nodes=nodes) == "ba4", "on processors, labels say it"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("auto", "replica device is cuda, and no node has a GPU .*: give --replica-device cpu"),
        ("downpour=replicas", "no node with label downpour=replicas has a GPU"),
        ("downpour=gpu", "no node for replicas has label downpour=gpu"),
    ],
)
def test_without_gpus_that_is_a_line(place: str, words: str) -> None:
    with pytest.raises(NoPlace, match=words) as caught:
        gpu_ids(PlacementConfig(replicas_on=place), *NODES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("share", "room"), [(1.0, 5), (0.6, 5), (0.5, 10), (1 / 3, 15), (0.3, 15), (0.25, 20)]
)
def test_a_gpu_is_shared_by_as_many_processes_as_it_has_room_for(share: float, room: int) -> None:
    assert gpu_room([ONE_GPU, FOUR_GPUS], share) == room
    check_gpu_room(room, [ONE_GPU, FOUR_GPUS], share)
    words = rf"{room + 1} processes .* room for {room}: give more --replicas-per-process"
    with pytest.raises(NoPlace, match=words):
        check_gpu_room(room + 1, [ONE_GPU, FOUR_GPUS], share)


def test_a_gpu_says_enough_of_the_nodes_that_an_autoscaler_is_asked_for() -> None:
    counts: dict[Role, int] = {"partitions": 2, "replicas": 3}
    wanted = demand(PlacementConfig(), counts, on_gpus=True)
    assert [(str(place), count) for place, count in wanted] == [
        ("label downpour=partitions", 2),
        ("any", 3),
    ]
    named = demand(PlacementConfig(replicas_on="downpour=gpu"), {"replicas": 3}, on_gpus=True)
    assert [(str(place), count) for place, count in named] == [("label downpour=gpu", 3)]
