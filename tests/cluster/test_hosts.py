"""A real cluster of hosts of their own: launched with `ray up`, trained on with `ray job submit`.

`make test-cluster` runs it; see `bed` for what it needs.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster import bed as hosts
from tests.cluster.bed import Bed, Host
from tests.cluster.launched import RUNS, Cluster, about, events, launched, updates, wait_for
from tests.helpers.strangers import asked_without_token, kind_of_refusal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
HEAD, PARTITIONS, SHUFFLERS, REPLICAS = 0, 1, 2, (3, 4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Five hosts; after the tests `ray down` has to leave nothing on them."""
    if reason := hosts.missing():
        pytest.skip(reason)
    with launched(5, {"partitions": PARTITIONS, "shufflers": SHUFFLERS}) as cluster:
        yield cluster
        cluster.down()


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


def test_strangers_are_refused_and_secrets_kept(cluster: Cluster) -> None:
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "open"
    job = "open-doors"
    output = cluster.run(
        *("python", "-m", "downpour", "submit", "--no-wait", "--id", job, "train", "mnist-bn"),
        *("--runs", RUNS, "--name", "open", "--epochs", "75", "--warm-start-epochs", "0"),
        *("--partitions", "2"),
    )
    assert f"job {job} submitted" in output
    try:
        wait_for(lambda: updates(run) > 100, "updates")
        job_api_and_control_plane_refuse(cluster)
        every_port_refuses(cluster)

        # What is written down, and what everybody on a host can read.
        secrets = [(bed.laptop / ".ray" / "auth_token").read_text().strip(), "PRIVATE KEY"]
        written = [path for path in run.rglob("*") if path.is_file()]
        assert written
        texts = {str(path): path.read_bytes() for path in written}
        for host in bed.hosts:
            logs = "cat /tmp/ray/session_*/logs/*.* /tmp/ray/session_*/logs/*/* 2>/dev/null; true"
            texts[f"logs of {host.name}"] = bed.ssh(host, logs).encode(errors="replace")
            texts[f"arguments on {host.name}"] = "\n".join(host.processes()).encode()
        for secret in secrets:
            assert [place for place, text in texts.items() if secret.encode() in text] == []

        # Through the folder, from where nothing else is known of the run.
        assert "training" in cluster.run("python", "-m", "downpour", "watch", "--once", str(run))
        assert "stopped" in cluster.run("python", "-m", "downpour", "stop", str(run))
        assert wait_for(lambda: cluster.status(job) == "SUCCEEDED", "the job's end")
        assert (run / "checkpoints").is_dir()
    finally:
        cluster.end(job)  # or the tests that follow would share the processors with it


def job_api_and_control_plane_refuse(cluster: Cluster) -> None:
    """Neither without the token nor with another one."""
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
        ["python", "-m", "downpour", "submit", "train", "mnist-bn", "--runs", RUNS],
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
    head = cluster.bed.hosts[HEAD].address
    assert asked_without_token(f"{head}:6379") == "UNAUTHENTICATED"


def every_port_refuses(cluster: Cluster) -> None:
    """All that listens beyond loopback; one port of each partition is ours, and no other."""
    ours = []
    for index, host in enumerate(cluster.bed.hosts):
        for port, who in listening(cluster.bed, index).items():
            if "sshd" not in who and kind_of_refusal(host.address, port) == "ours":
                ours.append((index, re.sub(r".*\"(ray::Part).*", r"\1", who)))
    assert ours == [(PARTITIONS, "ray::Part")] * 2


def test_a_recipe_in_a_folder_of_ones_own_is_trained(cluster: Cluster) -> None:
    """The folder's packages have the names of Downpour's, and no host has heard of them."""
    folder = cluster.bed.laptop / "project"
    network = (cluster.checkout / "examples" / "own_model.py").read_text()
    files = {
        "mine.py": "from workers.settings import recipe\n",
        "workers/settings.py": "from models.network import recipe\n",
        "workers/__init__.py": "",
        "models/network.py": network.replace("examples.own_model:", "models.network:"),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    said = cluster.run(
        *("python", "-m", "downpour", "submit", "train", "mine:recipe", "--runs", RUNS),
        *("--name", "own", "--epochs", "1", "--replicas", "2"),
        folder=folder,
    )
    assert f"uploading {folder} (4 files" in said
    result = json.loads((cluster.bed.shared / "runs" / "own" / "result.json").read_text())
    assert result["exactly_once"], said
    assert result["examples"] == 60_000
    config = json.loads((cluster.bed.shared / "runs" / "own" / "config.json").read_text())
    assert "models.network:" in json.dumps(config)


def test_mnist_is_trained_on_although_hosts_are_lost(cluster: Cluster) -> None:
    """A host of replicas is cut off in the middle, and the shuffler's loses its power."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "mnist"
    job = cluster.start("train", "mnist-bn", "--runs", RUNS, "--name", "mnist", "--epochs", "20")
    try:
        wait_for(lambda: updates(run) > 600, "the first updates")
        where = cluster.places()
        assert where["PartitionActor"] == {PARTITIONS}
        assert where["ShufflerActor"] == {SHUFFLERS}
        assert where["ReplicasActor"] == set(REPLICAS)
        assert where["EvaluatorActor"] == {HEAD}
        bed.cut(bed.hosts[REPLICAS[0]])
        before = updates(run)
        wait_for(lambda: updates(run) > before + 600, "updates without the host that was cut off")
        bed.kill(bed.hosts[SHUFFLERS])
        result = cluster.finish(job, run)
    finally:
        cluster.end(job)
    assert result["exactly_once"]
    assert result["examples"] == 20 * 60_000
    assert result["process_restarts"] >= 1
    assert result["accuracy"] > 0.95  # as many steps in flight on a busy machine cost a little


def test_partitions_go_on_elsewhere_when_their_host_is_lost(cluster: Cluster) -> None:
    """Cut off, so that the old ones live on; new ones come beside the driver."""
    bed, run = cluster.bed, cluster.bed.shared / "runs" / "moved"
    job = cluster.start(
        *("train", "mnist-bn", "--runs", RUNS, "--name", "moved", "--epochs", "40"),
        *("--partitions", "2", "--checkpoint-every-s", "2"),
    )
    try:
        wait_for(lambda: updates(run) > 600, "the first updates")
        # Processes tell it at once; Ray's commands take seconds, and the run may be over by then.
        assert partitions_on(bed.hosts[PARTITIONS]) == 2
        bed.cut(bed.hosts[PARTITIONS])
        head = bed.hosts[HEAD]
        wait_for(
            lambda: partitions_on(head) == 2, f"partitions beside the driver: {about(run)}", 180
        )
        result = cluster.finish(job, run)
    finally:
        cluster.end(job)
    again = [event for event in events(run) if "starts again from checkpoint" in event]
    assert {event.split()[1] for event in again} == {"0", "1"}, events(run)
    assert result["exactly_once"]
    assert result["examples"] == 40 * 60_000
    assert result["restarts"]["partition"] >= 2


def partitions_on(host: Host) -> int:
    """How many of a host's processes are partitions."""
    return sum("ray::Part" in line for line in host.processes())
