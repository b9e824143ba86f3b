"""Which node of the cluster each actor runs on. Pure decisions: nothing here talks to Ray.

    partitions  nodes labelled `downpour=partitions`, in turn; without any, the driver's node
    shufflers   nodes labelled `downpour=shufflers`, in turn; without any, the driver's node
    replicas    nodes labelled `downpour=replicas`, as many processes as processors; without any,
                every node
    evaluator   the driver's node

That is what `auto` means. The configuration may name another label, a custom resource, `driver` or
`any` for each role. If a node dies, what ran there is placed on the nodes that are left.
Replicas that compute on GPUs run wherever Ray finds each process its share of a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from downpour.cluster.errors import UserError

Role = Literal["partitions", "shufflers", "replicas", "evaluator"]
LABEL = "downpour"
"""The label by which nodes say what they are for."""
NODE_LABEL = "downpour-node"
"""The label by which a node says what `{node}` stands for in `--node-folder`."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Where the actors run in a cluster of several nodes.

    Each place is `auto`, `any`, `driver`, a label as `key=value`, or the name of a resource.
    """

    partitions_on: str = "auto"
    """Nodes for partitions: auto, any, driver, a label key=value, or a resource's name."""
    shufflers_on: str = "auto"
    """Nodes for shufflers, in the same words."""
    replicas_on: str = "auto"
    """Nodes for replicas, in the same words."""
    evaluator_on: str = "auto"
    """Node for the evaluator, in the same words."""
    wait_for_nodes_s: float = 0.0
    """Seconds to wait for nodes that are to come; an autoscaler is asked for them."""

    def __post_init__(self) -> None:
        for role in ("partitions", "shufflers", "replicas", "evaluator"):
            Place.parse(role, getattr(self, f"{role}_on"))
        if self.wait_for_nodes_s < 0:
            raise ValueError(f"wait for nodes is {self.wait_for_nodes_s} s: give 0 seconds or more")

    def place(self, role: Role) -> Place:
        """Where actors of this role may run."""
        return Place.parse(role, getattr(self, f"{role}_on"))


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a node must have: a label, a resource, or just what `where` says."""

    where: Literal["auto", "any", "driver", "marked"]
    label: tuple[str, str] | None = None
    resource: str | None = None

    @classmethod
    def parse(cls, role: str, text: str) -> Place:
        """Read a place.

        Raises:
            ValueError: the text has none of the forms.
        """
        if text in ("auto", "any", "driver"):
            return cls(where=text)  # type: ignore[arg-type]
        key, equals, value = text.partition("=")
        if equals and _NAME.fullmatch(key) and _NAME.fullmatch(value):
            return cls(where="marked", label=(key, value))
        if not equals and _NAME.fullmatch(text):
            return cls(where="marked", resource=text)
        raise ValueError(
            f"{role} on is {text!r}: give auto, any, driver, a label as key=value, or the name of "
            "a custom resource"
        )

    def __str__(self) -> str:
        """As a user would say it."""
        if self.label:
            return f"label {self.label[0]}={self.label[1]}"
        return f"resource {self.resource}" if self.resource else self.where


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    cpus: float = 0.0
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Collection[str] = ()


class NoPlace(UserError):
    """No node is what the configuration asks for."""


def candidates(
    role: Role, config: PlacementConfig, nodes: Sequence[Node], driver: str
) -> list[Node]:
    """The nodes that actors of `role` may run on, in a fixed order.

    Args:
        role: of the actors.
        config: of the run.
        nodes: that are alive.
        driver: id of the driver's node.

    Raises:
        NoPlace: there is none.
    """
    place = config.place(role)
    ordered = sorted(nodes, key=lambda node: (node.address, node.id))
    if place.where == "auto":
        marked = [node for node in ordered if node.labels.get(LABEL) == role]
        if marked:
            return marked
        place = Place(where="any" if role == "replicas" else "driver")
    if place.where == "driver":
        found = [node for node in ordered if node.id == driver]
    elif place.where == "any":
        # A head node that was started with no processors is not for computing.
        found = [node for node in ordered if node.cpus >= 1] or ordered
    elif place.label:
        key, value = place.label
        found = [node for node in ordered if node.labels.get(key) == value]
    else:
        found = [node for node in ordered if place.resource in node.resources]
    if not found:
        raise NoPlace(
            f"no node for {role} has {place}: there {_have(place, ordered)}; give another "
            f"--{role}-on, or time for nodes to come with --wait-for-nodes-s"
        )
    return found


def standby_node(
    config: PlacementConfig, nodes: Sequence[Node], driver: str, primary: str, index: int
) -> Node:
    """The node for the follower of partition `index`, which is on the node with the id `primary`.

    Another node for partitions if there is one, or else the driver's, which sees the run's folder,
    or else any with a processor. Only if there is no other node it is the same one.
    """
    try:
        for_partitions = candidates("partitions", config, nodes, driver)
    except NoPlace:
        for_partitions = []
    ordered = sorted(nodes, key=lambda node: (node.address, node.id))
    at_driver = [node for node in ordered if node.id == driver]
    for some in (for_partitions, at_driver, [node for node in ordered if node.cpus >= 1], ordered):
        others = [node for node in some if node.id != primary]
        if others:
            return others[index % len(others)]
    return ordered[0]


def with_gpus(config: PlacementConfig, nodes: Sequence[Node], driver: str) -> list[Node]:
    """The nodes whose GPUs replicas may compute on; `auto` takes all that have one.

    Raises:
        NoPlace: there is none.
    """
    place = config.place("replicas")
    if place.where == "auto":
        config = dataclasses.replace(config, replicas_on="any")
    found = [node for node in candidates("replicas", config, nodes, driver) if node.gpus > 0]
    if not found:
        having = "" if place.where in ("auto", "any") else f" with {place}"
        raise NoPlace(
            f"replica device is cuda, and no node{having} has a GPU that Ray knows of: give "
            "--replica-device cpu, another --replicas-on, or time for nodes to come with "
            "--wait-for-nodes-s"
        )
    return found


def gpu_room(nodes: Sequence[Node], share: float) -> int:
    """Processes that the GPUs of these nodes have room for, each with such a share of one."""
    return sum(int(node.gpus) * int(1 / share + 1e-9) for node in nodes)


def check_gpu_room(num_processes: int, nodes: Sequence[Node], share: float) -> None:
    """Check that the GPUs have room for so many processes of replicas.

    Raises:
        NoPlace: they have not.
    """
    room = gpu_room(nodes, share)
    if num_processes > room:
        raise NoPlace(
            f"{num_processes} processes of replicas with {share:g} of a GPU each, and there is "
            f"room for {room}: give more --replicas-per-process (none spreads replicas over what "
            "there is), or smaller --gpus-per-process"
        )


def disks(config: PlacementConfig, nodes: Sequence[Node], driver: str) -> list[Node]:
    """The nodes on whose disks to look for shards: those for shufflers; without labels, any.

    Raises:
        NoPlace: there is none.
    """
    marked = any(node.labels.get(LABEL) == "shufflers" for node in nodes)
    if config.place("shufflers").where == "auto" and not marked:
        config = dataclasses.replace(config, shufflers_on="any")
    return candidates("shufflers", config, nodes, driver)


def disk_of(folder: str, node: Node) -> str:
    """The folder of a node: `{node}` is the value of its label, or its address."""
    return folder.replace("{node}", node.labels.get(NODE_LABEL, node.address))


def spread(nodes: Sequence[Node], index: int, *, by_cpu: bool) -> Node:
    """The node of actor `index`: in turn over the nodes, each as often as it has processors.

    Without `by_cpu` every node counts the same.
    """
    if not by_cpu:
        return nodes[index % len(nodes)]
    turns = max(int(node.cpus) for node in nodes)
    slots = [node for turn in range(turns) for node in nodes if node.cpus > turn] or list(nodes)
    return slots[index % len(slots)]


def num_cpus(nodes: Sequence[Node]) -> int:
    """Processors of these nodes in all, at least 1."""
    return max(1, int(sum(node.cpus for node in nodes)))


def demand(
    config: PlacementConfig, counts: Mapping[Role, int], *, on_gpus: bool = False
) -> list[tuple[Place, int]]:
    """Processors to ask an autoscaler for, by what their node must have.

    Each of the replicas `on_gpus` also asks for a share of a GPU, which says enough of its node.
    """
    wanted = []
    for role, count in counts.items():
        place = config.place(role)
        if place.where == "auto" and role == "replicas" and on_gpus:
            place = Place(where="any")
        if place.where == "auto" and role != "evaluator":
            place = Place(where="marked", label=(LABEL, role))
        if place.where != "driver" and (place.where, role) != ("auto", "evaluator"):
            wanted.append((place, count))
    return wanted


def _have(place: Place, nodes: Sequence[Node]) -> str:
    if place.label:
        key = place.label[0]
        values = sorted({node.labels[key] for node in nodes if key in node.labels})
        if not values:
            return f"is no node with a label {key}"
        return f"are nodes with {', '.join(f'{key}={value}' for value in values)}"
    own = sorted({name for node in nodes for name in node.resources if not _is_builtin(name)})
    return f"are nodes with {', '.join(own)}" if own else "are no nodes with custom resources"


def _is_builtin(resource: str) -> bool:
    return resource in ("CPU", "GPU", "memory", "object_store_memory") or resource.startswith(
        ("node:", "accelerator_type:")
    )
