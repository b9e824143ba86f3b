"""A real cluster of hosts of their own: launched with `ray up`, trained on with `ray job submit`.

`make test-cluster` runs it; see `bed` for what it needs.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster import bed as hosts
from tests.cluster.bed import Bed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
PORT = 18265
FILE = "onprem.yaml"
RUNS = f"{hosts.SHARED}/runs"
GRPC_REFUSALS = ("UNAUTHENTICATED", "UNIMPLEMENTED")
"""What Ray's own ports say: to a stranger, and where the question is another service's."""
HEAD, PARTITIONS, SHUFFLERS, REPLICAS = 0, 1, 2, (3, 4)


class Cluster:
    """A bed with Ray up on it, and the laptop's way there."""

    def __init__(self, bed: Bed, checkout: Path) -> None:
        self.bed = bed
        self.checkout = checkout
        self.environment = bed.environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{PORT}"}

    def run(self, *command: str, timeout_s: float = 300.0, check: bool = True) -> str:
        """A command of the laptop's user, in the checkout; gives what it printed."""
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def start(self, *arguments: str) -> str:
        """Submit `downpour ...` as a job by Ray's own command, and do not wait; gives its id."""
        submit = ("ray", "job", "submit", "--no-wait", "--working-dir", ".", "--")
        output = self.run(*submit, "python", "-m", "cluster", *arguments)
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

    def finish(self, job: str, run: Path, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait for a job to succeed; gives its run's result."""
        ended = ("SUCCEEDED", "FAILED", "STOPPED")
        status = wait_for(lambda: (s := self.status(job)) in ended and s, f"job {job}", timeout_s)
        assert status == "SUCCEEDED", self.run("ray", "job", "logs", job)
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
        return result

    def nodes(self) -> list[dict[str, Any]]:
        """Ray's nodes, by its own command."""
        output = self.run("ray", "list", "nodes", "--format", "json", "--detail")
        listed: list[dict[str, Any]] = json.loads(output[output.index("[{") :])
        return listed

    def actors(self) -> list[dict[str, Any]]:
        """Ray's living actors."""
        query = ("ray", "list", "actors", "--format", "json", "--filter", "state=ALIVE", "--detail")
        output = self.run(*query)
        listed: list[dict[str, Any]] = json.loads(output[output.index("[{") :])
        return listed


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    """The first true value of `condition`."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if value := condition():
            return value
        time.sleep(0.5)  # how often to look
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Five hosts from nothing: `ray up` with the SSH provider's file, and a tunnel to its head."""
    if reason := hosts.missing():
        pytest.skip(reason)
    with Bed(5) as bed:
        checkout = hosts.checkout(bed.laptop / "checkout")
        cluster = Cluster(bed, checkout)
        cluster.run("ray", "get-auth-token", "--generate")
        template = (checkout / "cluster" / "providers" / FILE).read_text()
        roles = {"partitions": PARTITIONS, "shufflers": SHUFFLERS}
        (checkout / FILE).write_text(bed.cluster_file(template, roles))
        cluster.run("python", "-m", "cluster", "check", FILE)
        cluster.run("ray", "up", "--yes", FILE)
        tunnel = ("ray", "dashboard", FILE, "--port", str(PORT))
        log = bed.folder / "tunnel.log"
        with hosts.background(*tunnel, cwd=checkout, env=cluster.environment, log=log):
            wait_for(lambda: "[" in cluster.run("ray", "list", "nodes", check=False), "the tunnel")
            wait_for(lambda: len(alive(cluster)) == len(bed.hosts), "every host", 180)
            yield cluster
        down(cluster)


def alive(cluster: Cluster) -> set[str]:
    """Addresses of the nodes that Ray takes for alive."""
    try:
        return {node["node_ip"] for node in cluster.nodes() if node["state"] == "ALIVE"}
    except (ValueError, AssertionError):
        return set()


def down(cluster: Cluster) -> None:
    """`ray down` leaves nothing of Ray on any host."""
    for host in cluster.bed.hosts:
        cluster.bed.mend(host)
    cluster.run("ray", "down", "--yes", FILE)

    def left() -> list[str]:
        return [
            f"{host.name}: {line}"
            for host in cluster.bed.hosts
            for line in host.processes()
            if "ray" in line and "sshd" not in line
        ]

    try:
        wait_for(lambda: not left(), "Ray to be gone from every host", 150)
    except AssertionError:
        raise AssertionError(f"left after `ray down`: {left()}") from None


def updates(run: Path) -> int:
    """Updates so far."""
    try:
        return int(json.loads((run / "status.json").read_text())["updates"])
    except (OSError, ValueError, KeyError):
        return 0


def listening(bed: Bed, index: int) -> dict[int, str]:
    """Ports that a host's processes listen on beyond loopback, with the process's name."""
    output = bed.ssh(bed.hosts[index], "ss -ltnpH")
    found = {}
    for line in output.splitlines():
        fields = line.split(maxsplit=5)
        address, _, port = fields[3].rpartition(":")
        if address.strip("[]") not in ("127.0.0.1", "::1"):
            found[int(port)] = fields[5] if len(fields) > 5 else ""
    return found


def refuses(address: str, port: int) -> bool:
    """Whether a stranger who talks to a port of ours is hung up on without a useful word."""
    for word in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04N.", os.urandom(512), b""):
        with socket.create_connection((address, port), timeout=15) as stranger:
            stranger.sendall(word)
            if not word:
                stranger.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while piece := stranger.recv(4096):
                    answer += piece
            except (ConnectionResetError, TimeoutError):
                pass
            if len(answer) > 64:  # an alert of TLS is 7 bytes
                return False
    return True


def asked_without_token(address: str) -> str:
    """What Ray's control plane says to somebody who asks for the nodes without a token."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            ask(b"", timeout=10)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "let in"


def test_strangers_are_refused_and_secrets_kept(cluster: Cluster) -> None:
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "open"
    submit = ("downpour", "submit", "--no-wait", "--id", "open-doors")
    output = cluster.run(
        *("python", "-m", "cluster", *submit[1:], "train", "mnist-bn"),
        *("--runs", RUNS, "--name", "open", "--epochs", "75", "--warm-start-epochs", "0"),
    )
    assert "job open-doors submitted" in output
    wait_for(lambda: updates(run) > 500, "updates")

    # The job API and Ray's control plane.
    stranger = cluster.bed.folder / "stranger"
    stranger.mkdir()
    nobody = {**cluster.environment, "HOME": str(stranger)}
    for mode in ("token", "disabled"):
        done = subprocess.run(
            ["ray", "job", "submit", "--working-dir", ".", "--", "id"],
            cwd=stranger,
            env={**nobody, "RAY_AUTH_MODE": mode},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert re.search("token|401", done.stdout + done.stderr), done.stderr[-2000:]
        assert "submitted successfully" not in done.stdout
    (stranger / ".ray").mkdir()
    (stranger / ".ray" / "auth_token").write_text("f" * 64)
    refused = subprocess.run(
        ["python", "-m", "cluster", "submit", "train", "mnist-bn", "--runs", RUNS],
        cwd=cluster.checkout,
        env=nobody,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2, refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "auth_token" in refused.stderr
    assert asked_without_token(f"{bed.hosts[HEAD].address}:6379") == "UNAUTHENTICATED"

    # What listens beyond loopback. Each of Ray's processes has a port of Ray's own; partitions
    # have one more, and nobody else of ours does.
    num_ours = 0
    for index, host in enumerate(bed.hosts):
        by_process: dict[str, list[int]] = {}
        for port, who in listening(bed, index).items():
            found = re.search(r'"(ray::[^"]*)",pid=(\d+)', who)
            if found is not None:
                by_process.setdefault(" ".join(found.groups()), []).append(port)
        for who, ports in by_process.items():
            said = {port: asked_without_token(f"{host.address}:{port}") for port in ports}
            assert "let in" not in said.values(), (host.name, who, said)
            ours = [port for port, word in said.items() if word not in GRPC_REFUSALS]
            if "Part" not in who:
                continue
            assert len(ours) == 1, (host.name, who, said)
            assert index == PARTITIONS
            assert refuses(host.address, ours[0]), (host.name, who, ours)
            num_ours += 1
        if index in REPLICAS:
            assert all(len(p) == 1 for who, p in by_process.items() if "Repl" in who), by_process
    assert num_ours == 2

    # What is written down, and what everybody on a host can read.
    secrets = [(bed.laptop / ".ray" / "auth_token").read_text().strip(), "PRIVATE KEY"]
    written = [path for path in run.rglob("*") if path.is_file()]
    assert written
    texts = {str(path): path.read_bytes() for path in written}
    for host in bed.hosts:
        texts[f"logs of {host.name}"] = bed.ssh(
            host, "cat /tmp/ray/session_*/logs/*.* /tmp/ray/session_*/logs/*/* 2>/dev/null; true"
        ).encode(errors="replace")
        texts[f"arguments on {host.name}"] = "\n".join(host.processes()).encode()
    for secret in secrets:
        assert [place for place, text in texts.items() if secret.encode() in text] == []

    # Through the folder, from where nothing else is known of the run.
    assert "training" in cluster.run("python", "-m", "cluster", "watch", "--once", str(run))
    assert "stopped" in cluster.run("python", "-m", "cluster", "stop", str(run))
    assert wait_for(lambda: cluster.status("open-doors") == "SUCCEEDED", "the job's end")
    assert (run / "checkpoints").is_dir()


def test_mnist_is_trained_on_although_hosts_are_lost(cluster: Cluster) -> None:
    """A host of replicas is cut off in the middle, and the shuffler's loses its power."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "mnist"
    job = cluster.start("train", "mnist-bn", "--runs", RUNS, "--name", "mnist", "--epochs", "20")
    wait_for(lambda: updates(run) > 3000, "the first updates")
    by_node = {node["node_id"]: node["node_ip"] for node in cluster.nodes()}
    where: dict[str, set[str]] = {}
    for actor in cluster.actors():
        where.setdefault(actor["class_name"], set()).add(by_node[actor["node_id"]])
    address = [host.address for host in bed.hosts]
    assert where["PartitionActor"] == {address[PARTITIONS]}
    assert where["ShufflerActor"] == {address[SHUFFLERS]}
    assert where["ReplicasActor"] == {address[index] for index in REPLICAS}
    assert where["EvaluatorActor"] == {address[HEAD]}
    bed.cut(bed.hosts[REPLICAS[0]])
    before = updates(run)
    wait_for(lambda: updates(run) > before + 3000, "updates without the host that was cut off")
    bed.kill(bed.hosts[SHUFFLERS])
    result = cluster.finish(job, run)
    assert result["exactly_once"]
    assert result["examples"] == 20 * 60_000
    assert result["process_restarts"] >= 1
    assert result["accuracy"] > 0.975
