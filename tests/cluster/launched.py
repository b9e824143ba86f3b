"""A cluster on a bed of hosts: launched with `ray up`, reached through a tunnel, taken down again.

What tests and measurements of a real cluster share.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.cluster import bed as hosts
from tests.cluster.bed import Bed

PORT = 18265
"""Of the tunnel, on the laptop."""
FILE = "onprem.yaml"
RUNS = f"{hosts.SHARED}/runs"


class Cluster:
    """A bed with Ray up on it, and the laptop's way there."""

    def __init__(self, bed: Bed, checkout: Path) -> None:
        self.bed = bed
        self.checkout = checkout
        self.installed = bed.laptop / "installed"
        """Has Downpour as its installation has it: the package alone."""
        self.installed.mkdir()
        (self.installed / "downpour").symlink_to(checkout / "downpour")
        self.environment = bed.environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{PORT}"}

    def run(
        self,
        *command: str,
        timeout_s: float = 300.0,
        check: bool = True,
        folder: Path | None = None,
    ) -> str:
        """A command of the laptop's user, in the checkout or a `folder` of their own.

        Gives what it printed.
        """
        done = subprocess.run(
            command,
            cwd=folder or self.checkout,
            env=self.environment | {"PYTHONPATH": str(self.installed)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def start(self, *arguments: str, module: str = "downpour") -> str:
        """Submit `downpour ...`, or another main module, as a job by Ray's own command.

        Does not wait; gives its id.
        """
        submit = ("ray", "job", "submit", "--no-wait", "--working-dir", ".", "--")
        output = self.run(*submit, "python", "-m", module, *arguments)
        found = re.search(r"raysubmit_\w+", output)
        assert found is not None, output
        return found[0]

    def status(self, job: str) -> str:
        """RUNNING, SUCCEEDED, ..."""
        output = self.run("ray", "job", "status", job)
        for word in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING"):
            if word in output or word.lower() in output:
                return word
        raise AssertionError(output)

    def end(self, job: str) -> None:
        """Stop a job, whatever it is at, and wait until it has stopped."""
        self.run("ray", "job", "stop", job, check=False)
        ended = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for(lambda: self.status(job) in ended, f"the end of job {job}")

    def finish(self, job: str, run: Path, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait for a job to succeed; gives its run's result."""
        ended = ("SUCCEEDED", "FAILED", "STOPPED")
        try:
            status = wait_for(lambda: (s := self.status(job)) in ended and s, job, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {about(run)}") from None
        assert status == "SUCCEEDED", self.run("ray", "job", "logs", job)
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
        return result

    def nodes(self) -> list[dict[str, Any]]:
        """Ray's nodes, by its own command."""
        output = self.run("ray", "list", "nodes", "--format", "json", "--detail")
        listed: list[dict[str, Any]] = json.loads(output[output.index("[{") :])
        return listed

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray takes for alive."""
        try:
            return {node["node_ip"] for node in self.nodes() if node["state"] == "ALIVE"}
        except (ValueError, AssertionError):
            return set()

    def actors(self) -> list[dict[str, Any]]:
        """Ray's living actors."""
        query = ("ray", "list", "actors", "--format", "json", "--filter", "state=ALIVE", "--detail")
        output = self.run(*query)
        listed: list[dict[str, Any]] = json.loads(output[output.index("[{") :])
        return listed

    def places(self) -> dict[str, set[int]]:
        """On which hosts living actors are, by their class and the host's index."""
        index = {host.address: host.index for host in self.bed.hosts}
        where = {node["node_id"]: index[node["node_ip"]] for node in self.nodes()}
        found: dict[str, set[int]] = {}
        for actor in self.actors():
            found.setdefault(actor["class_name"], set()).add(where[actor["node_id"]])
        return found

    def down(self) -> None:
        """`ray down`; it leaves nothing of Ray on any host."""
        for host in self.bed.hosts:
            self.bed.mend(host)
        self.run("ray", "down", "--yes", FILE)

        def left() -> list[str]:
            return [
                f"{host.name}: {line}"
                for host in self.bed.hosts
                for line in host.processes()
                if "ray" in line and "sshd" not in line
            ]

        try:
            wait_for(lambda: not left(), "Ray to be gone from every host", 150)
        except AssertionError:
            logs = [
                f"{host.name}: {path.read_text()[-2000:]}"
                for host in self.bed.hosts
                for path in [host.home / "downpour" / "ray.log"]
                if path.exists()
            ]
            raise AssertionError(f"left after `ray down`: {left()}, {logs}") from None


@contextlib.contextmanager
def launched(num_hosts: int, workers: Mapping[str, int]) -> Iterator[Cluster]:
    """Hosts from nothing: `ray up` with the SSH provider's file, and a tunnel to its head.

    `workers` gives the roles `partitions` and `shufflers` to hosts by index; 0 is the head, and
    the others run replicas. At the end the hosts lose their power, whatever runs there.
    """
    with Bed(num_hosts) as bed:
        cluster = Cluster(bed, hosts.checkout(bed.laptop / "checkout"))
        cluster.run("ray", "get-auth-token", "--generate")
        template = (cluster.checkout / "cluster" / "deploy" / "providers" / FILE).read_text()
        (cluster.checkout / FILE).write_text(bed.cluster_file(template, workers))
        cluster.run("python", "-m", "downpour", "check", FILE)
        cluster.run("ray", "up", "--yes", FILE)
        tunnel = ("ray", "dashboard", FILE, "--port", str(PORT))
        log = bed.folder / "tunnel.log"
        with hosts.background(*tunnel, cwd=cluster.checkout, env=cluster.environment, log=log):
            wait_for(lambda: len(cluster.alive()) == num_hosts, "every host", 240)
            yield cluster


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    """The first true value of `condition`."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if value := condition():
            return value
        time.sleep(0.5)  # how often to look
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


def updates(run: Path) -> int:
    """Updates so far."""
    try:
        return int(json.loads((run / "status.json").read_text())["updates"])
    except (OSError, ValueError, KeyError):
        return 0


def events(run: Path) -> list[str]:
    """What was lost in a run, and what was done."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [str(json.loads(line)["event"]) for line in lines if line.endswith("}")]


def has(told: list[str], what: str) -> int:
    """How many lines have this in them."""
    return sum(what in line for line in told)


def about(run: Path) -> str:
    """Where a run stands, for whoever has waited for it in vain."""
    return f"{updates(run):,} updates; {events(run)}"
