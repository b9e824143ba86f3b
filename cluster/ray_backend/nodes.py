"""The nodes of the Ray cluster that this driver is connected to, and how an actor gets onto one.

Which actor goes to which node is decided in `config.placement`; here the decision is carried out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from downpour.cluster.config.placement import (
    Node,
    NoPlace,
    Place,
    PlacementConfig,
    Role,
    candidates,
    check_gpu_room,
    demand,
    disks,
    gpu_room,
    num_cpus,
    spread,
    standby_node,
    with_gpus,
)
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.workers.config import ReplicaConfig

NODES_EVERY_S = 1.0
"""How often nodes are looked for that are to come."""
SEE_DEADLINE_S = 60.0
RESOURCE_SHARE = 0.001
"""Of a custom resource that only marks nodes."""


class Nodes:
    """Places actors of each role. If the cluster has a single node, Ray does."""

    def __init__(self, config: PlacementConfig, gpu_share: float | None = None) -> None:
        """Look at nothing yet.

        Args:
            config: of the run.
            gpu_share: share of a GPU for each process of replicas; None if they need none.
        """
        self._config = config
        self._gpu_share = gpu_share
        self.driver: str = ray.get_runtime_context().get_node_id()

    @property
    def count(self) -> int:
        """How many are alive."""
        return len(alive())

    @property
    def several(self) -> bool:
        """Whether there is a choice."""
        return self.count > 1

    def on(self, role: Role) -> list[Node]:
        """The nodes for a role.

        Raises:
            NoPlace: there is none.
        """
        if role == "replicas" and self._gpu_share is not None:
            return with_gpus(self._config, staying(), self.driver)
        return candidates(role, self._config, staying(), self.driver)

    def disks(self, *, only_staying: bool = False) -> list[Node]:
        """The nodes on whose disks to look for shards; only those that stay, if that is asked.

        Raises:
            NoPlace: there is none.
        """
        return disks(self._config, staying() if only_staying else alive(), self.driver)

    def scheduling(self, role: Role, index: int) -> Any:
        """Ray's scheduling strategy for actor `index` of a role, by the nodes that are alive now.

        If no node is left that the configuration asks for, Ray chooses among all.
        """
        if not self.several:
            return "DEFAULT"
        try:
            node = spread(self.on(role), index, by_cpu=role == "replicas")
        except NoPlace:
            return "SPREAD"
        return NodeAffinitySchedulingStrategy(node.id, soft=False)

    def beside(self, primary: Any, index: int) -> Any:
        """Ray's scheduling strategy for a follower of partition `index`, an actor that is up."""
        if not self.several:
            return "DEFAULT"
        home = node_of(primary) or self.driver
        node = standby_node(self._config, staying(), self.driver, home, index)
        return NodeAffinitySchedulingStrategy(node.id, soft=False)

    def options(self, role: Role, index: int) -> dict[str, Any]:
        """Ray's options for actor `index` of a role: its place, and what it takes there.

        Ray finds the share of a GPU: it knows which are taken, and lets an actor wait until one is
        free.
        """
        if role != "replicas" or self._gpu_share is None:
            return {"scheduling": self.scheduling(role, index)}
        place = self._config.place(role)
        options: dict[str, Any] = {"scheduling": "DEFAULT", "num_gpus": self._gpu_share}
        if place.where == "driver":
            options["scheduling"] = NodeAffinitySchedulingStrategy(self.driver, soft=False)
        if place.label:
            options["label_selector"] = dict([place.label])
        if place.resource:
            options["resources"] = {place.resource: RESOURCE_SHARE}
        return options

    def gpu_places(self) -> int | None:
        """Processes of replicas that the GPUs have room for; None if replicas need none.

        Raises:
            NoPlace: no node has a GPU.
        """
        if self._gpu_share is None:
            return None
        return gpu_room(self.on("replicas"), self._gpu_share)

    def free_gpu_places(self) -> int | None:
        """Processes of replicas that have room on nodes that stay; None if they need no GPU."""
        if self._gpu_share is None:
            return None
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        try:
            nodes = self.on("replicas")
        except NoPlace:
            return 0
        gpus = [float(free.get(node.id, {}).get("GPU", 0.0)) for node in nodes]
        return sum(int(gpu / self._gpu_share + 1e-9) for gpu in gpus)

    def check_room(self, num_processes: int) -> None:
        """Look whether the GPUs have room for so many processes of replicas, if they need any.

        Raises:
            NoPlace: they have not.
        """
        if self._gpu_share is not None:
            check_gpu_room(num_processes, self.on("replicas"), self._gpu_share)

    def processors(self, here: int) -> int:
        """Processors for replicas; `here` are those of this machine, if it is the only one."""
        return num_cpus(self.on("replicas")) if self.several else here

    def await_all(
        self,
        replicas: ReplicaConfig,
        num_partitions: int,
        num_shufflers: int,
        tell: Callable[[str], None],
    ) -> None:
        """Ask an autoscaler for the nodes that the run needs, and wait, if it is configured so.

        Raises:
            RunFailed: the time is up.
            NoPlace: a node is missing, and nothing is to be waited for.
        """
        counts: Mapping[Role, int] = {
            "partitions": num_partitions,
            "shufflers": num_shufflers,
            "replicas": -(-replicas.replicas // (replicas.replicas_per_process or 1)),
        }
        wanted = self._wanted(counts)
        if not self._config.wait_for_nodes_s:
            if self.several:
                for role in (*counts, "evaluator"):
                    self.on(role)
            return
        bundles: list[dict[str, float]] = []
        selectors: list[dict[str, str]] = []
        for place, count, share in wanted:
            resource = {place.resource: RESOURCE_SHARE} if place.resource else {}
            gpu = {"GPU": share} if share else {}
            bundles += [{"CPU": 1.0, **resource, **gpu}] * count
            selectors += [dict([place.label]) if place.label else {}] * count
        request(bundles, selectors)
        give_up_s = time.monotonic() + self._config.wait_for_nodes_s
        while missing := self._missing(counts):
            tell(f"waiting for nodes: {missing}")
            if time.monotonic() > give_up_s:
                request([], [])
                raise RunFailed(
                    f"after {self._config.wait_for_nodes_s:.0f} s there is still {missing}: look "
                    "at `ray status` for why the cluster does not grow, or ask for less"
                )
            time.sleep(NODES_EVERY_S)

    def _wanted(self, counts: Mapping[Role, int]) -> list[tuple[Place, int, float]]:
        """Processors, by what their node must have, with the share of a GPU that each takes."""
        share, found = self._gpu_share or 0.0, []
        for role, count in counts.items():
            of_gpu = share if role == "replicas" else 0.0
            asked = demand(self._config, {role: count}, on_gpus=bool(share))
            found += [(place, number, of_gpu) for place, number in asked]
        return found

    def _missing(self, counts: Mapping[Role, int]) -> str:
        """What is not there yet, in words; empty when all is."""
        nodes, words = alive(), []
        for place, count, share in self._wanted(counts):
            if place.label:
                key, value = place.label
                found = [node for node in nodes if node.labels.get(key) == value]
            elif place.resource:
                found = [node for node in nodes if place.resource in node.resources]
            else:
                found = nodes
            if share:
                have, what = gpu_room(found, share), f"places with {share:g} of a GPU"
            else:
                have, what = sum(int(node.cpus) for node in found), "processors"
            if have < count:
                words.append(f"{have} of {count} {what} with {place}")
        return ", ".join(words)

    def check_folder(self, folder: Path, num_followed: int = 0) -> None:
        """Check that every node that writes to the run's folder sees it.

        Args:
            folder: the run's.
            num_followed: partitions that have followers.

        Raises:
            RunFailed: one does not.
        """
        if not self.several:
            return
        nodes = {node.id: node for role in ("partitions", "evaluator") for node in self.on(role)}
        for index in range(num_followed):
            home = spread(self.on("partitions"), index, by_cpu=False).id
            node = standby_node(self._config, staying(), self.driver, home, index)
            nodes[node.id] = node
        nodes.pop(self.driver, None)
        look: Any = ray.remote(_holds)
        calls = {
            look.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)
            ).remote(str(folder)): node
            for id, node in nodes.items()
        }
        blind = [
            node.address
            for call, node in calls.items()
            if not ray.get(call, timeout=SEE_DEADLINE_S)
        ]
        if blind:
            raise RunFailed(
                f"{', '.join(blind)} cannot write to the run folder {folder}: give --runs a "
                "folder that all nodes share (NFS, EFS, Filestore), or keep partitions and "
                "evaluator beside it with --partitions-on driver --evaluator-on driver"
                + (" --no-hot-standby" if num_followed else "")
            )


def leaving() -> dict[str, float | None]:
    """Nodes that are to leave (preempted, scaled down, drained by somebody), by id, and when.

    Unix time; None if Ray has not been told.
    """
    from ray._private.state import state  # Ray has no public name for it; Ray Train uses this one

    return {id: at_ms / 1000 or None for id, at_ms in state.get_draining_nodes().items()}


def node_of(actor: Any) -> str | None:
    """Id of the node that an actor is on; None if Ray does not know it."""
    from ray._private.state import actors

    about = actors().get(actor._actor_id.hex())
    return about["Address"]["NodeID"] if about else None


def staying() -> list[Node]:
    """The nodes that are alive and are to stay; those that are alive, if all are to leave."""
    nodes, going = alive(), leaving()
    return [node for node in nodes if node.id not in going] or nodes


def alive() -> list[Node]:
    """The nodes that are alive, by what Ray knows."""
    cluster: Any = ray  # this has no types
    return [
        Node(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
            labels=entry.get("Labels") or {},
            resources=frozenset(entry["Resources"]),
        )
        for entry in cluster.nodes()
        if entry["Alive"]
    ]


def request(bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None:
    """Ask the autoscaler, if there is one, for nodes for these bundles; none gives them back."""
    from ray.autoscaler.sdk import request_resources

    if bundles:
        request_resources(bundles=bundles, bundle_label_selectors=selectors)
    else:
        request_resources(bundles=[])


def _holds(folder: str) -> bool:
    """Whether a run's folder is on this machine, too, and can be written to."""
    import os

    return os.path.isfile(os.path.join(folder, "config.json")) and os.access(folder, os.W_OK)
