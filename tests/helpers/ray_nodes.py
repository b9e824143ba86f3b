"""A Ray that several tests run their commands on: nodes on this machine, held by a process.

Run as a module it is that process: it starts the nodes that it is told of, prints their address,
answers each line of its input with where actors are, and ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.helpers import commands

ROLE = "downpour"
"""The label whose value says what a node is for."""
STORE_BYTES = 2**28
"""Of each node: less than what a node asks for by itself."""


class RayNodes:
    """Nodes that are up: their address, and the process that they are descendants of."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.address: str = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", '"')):
                return json.loads(line)
        raise AssertionError(f"the process of Ray's nodes ended: {self._process.poll()}")

    def roles_of_actors(self) -> dict[str, list[str]]:
        """By the class of an actor that lives, which nodes its actors are on: their roles."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, list[str]] = self._read()
        return found

    def drain(self, role: str) -> str:
        """Tell Ray that one of the nodes of a role is to leave within two minutes; gives its id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"drain {role}\n")
        self._process.stdin.flush()
        found: str = self._read()
        return found

    def kill(self, role: str) -> None:
        """Kill (kill -9) every process of the nodes of a role, as if they had lost their power."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"kill {role}\n")
        self._process.stdin.flush()
        self._read()

    def processes(self, title: str) -> set[int]:
        """Processes of actors on these nodes whose title has this in it."""
        family = commands.descendants(self.pid)
        return {p for p, c in family.items() if c.startswith("ray::") and title in c}


@contextlib.contextmanager
def ray_nodes(nodes: Sequence[dict[str, str]], *, head_cpus: int) -> Iterator[RayNodes]:
    """A head with so many processors, and a node with one processor for each of these labels."""
    with commands.folder_for_ray() as short:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps({"head": head_cpus, "nodes": list(nodes)})],
            cwd=commands.ROOT,
            env={**os.environ, **OPEN, "RAY_TMPDIR": short},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield RayNodes(process)
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(commands.DEADLINE_S)


OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What commands that connect to such nodes need in their environment."""


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Have the commands that are started meanwhile be ones that can connect to such nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OPEN.items():
            patch.setenv(name, value)
        yield


def _hold(head: int, nodes: Sequence[dict[str, str]]) -> None:
    import ray
    from ray.cluster_utils import Cluster

    head_node = {
        "num_cpus": head,
        "object_store_memory": STORE_BYTES,
        "dashboard_port": commands.free_port(),  # another Ray may have the usual one
    }
    cluster = Cluster(initialize_head=True, head_node_args=head_node)
    added = [
        (labels, cluster.add_node(num_cpus=1, labels=labels, object_store_memory=STORE_BYTES))
        for labels in nodes
    ]
    _print(cluster.address)
    for line in sys.stdin:
        if not ray.is_initialized():
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        order, _, role = line.strip().partition(" ")
        if order == "kill":
            killed = [node for labels, node in added if labels.get(ROLE) == role]
            _print("".join(map(_kill, killed)))
        else:
            _print(_drain(cluster.address, role) if order == "drain" else _roles_of_actors())
    ray.shutdown()
    cluster.shutdown()


def _kill(node: Any) -> str:
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for pid in {pid for top in pids for pid in (*commands.descendants(top), top)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return str(node.unique_id)


def _drain(address: str, role: str) -> str:
    import ray

    of_role = [n["NodeID"] for n in ray.nodes() if n["Labels"].get(ROLE, "") == role]
    node = min(of_role)
    ray_command = os.path.join(os.path.dirname(sys.executable), "ray")
    subprocess.run(
        [
            *(ray_command, "drain-node", "--address", address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", "120"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return node


def _roles_of_actors() -> dict[str, list[str]]:
    import ray
    from ray.util.state import list_actors

    roles = {node["NodeID"]: node["Labels"].get(ROLE, "") for node in ray.nodes()}
    found: dict[str, set[str]] = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True):
        found.setdefault(actor.class_name, set()).add(roles[actor.node_id])
    return {name: sorted(where) for name, where in found.items()}


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _hold(**json.loads(sys.argv[1]))
