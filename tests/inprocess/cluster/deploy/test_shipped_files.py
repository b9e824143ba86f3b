"""The cluster files agree with each other and with the pins."""

from __future__ import annotations

import re
import shlex

from downpour.cluster.deploy.cluster_file import flags, starts
from downpour.cluster.deploy.pins import pinned
from tests.helpers.cluster_files import (
    AWS,
    GCP,
    LAUNCHED,
    ONPREM,
    PROVIDERS,
    RAYCLUSTER,
    RAYJOB,
    read,
)


def test_setup_and_start_commands_are_equal() -> None:
    aws, gcp, onprem = read(AWS), read(GCP), read(ONPREM)
    assert aws["setup_commands"] == gcp["setup_commands"] == onprem["setup_commands"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert aws[key] == gcp[key]
        here = dict(starts(onprem))[key]
        there = dict(starts(aws))[key]
        own = {"node-ip-address", "labels", "num-cpus", "block"}
        assert {k: v for k, v in flags(here).items() if k not in own} == flags(there)
        assert exported(here) - exported(there) <= {"RAY_enable_autoscaler_v2=0"}
        assert exported(there) <= exported(here)
    assert aws["file_mounts"] == gcp["file_mounts"] == onprem["file_mounts"]


def exported(command: str) -> set[str]:
    """What a start command exports to Ray."""
    (listed,) = re.findall(r"export ([^;]*);", command)
    return set(shlex.split(listed))


def test_the_image_is_built_by_the_setup_command() -> None:
    dockerfile = (PROVIDERS / "kuberay" / "Dockerfile").read_text()
    command = " ".join(dockerfile.replace("\\\n", " ").split())
    install = read(AWS)["setup_commands"][1]
    pip = re.search(r"~/downpour/env/bin/pip install .*requirements\.lock", install)
    assert pip is not None
    for step in (
        " ".join(pip[0].split(" && ")[0].split()),
        "python3 -m venv --clear ~/downpour/env",
    ):
        assert step in command


def test_kubernetes_starts_ray_with_the_same_options() -> None:
    spec = read(RAYCLUSTER)["spec"]
    head = flags(dict(starts(read(AWS)))["head_start_ray_commands"])
    worker = flags(dict(starts(read(AWS)))["worker_start_ray_commands"])
    params = spec["headGroupSpec"]["rayStartParams"]
    # The operator's own: where the head is, its address, and its autoscaler.
    ignored = {"head", "autoscaling-config", "dashboard-host"}
    assert {k: v for k, v in head.items() if k not in ignored} == {
        k: v for k, v in params.items() if k not in {"dashboard-host", "num-cpus"}
    }
    for group in spec["workerGroupSpecs"]:
        assert group["rayStartParams"] == {k: v for k, v in worker.items() if k != "address"}
        environment = {
            e["name"]: e["value"] for e in group["template"]["spec"]["containers"][0]["env"]
        }
        assert environment == {"RAY_USAGE_STATS_ENABLED": "0"}
    assert read(RAYJOB)["spec"]["rayClusterSpec"] == spec


def test_the_image_and_the_clients_are_those_of_the_pins() -> None:
    text = "".join(p.read_text() for p in [*LAUNCHED.values(), RAYCLUSTER, RAYJOB])
    text += (PROVIDERS / "kuberay" / "Dockerfile").read_text()
    pins = dict(pinned())
    for package, version in re.findall(r"install[^\n]* ([a-z0-9-]+)==([\d.]+)", text):
        assert pins[package] == version
    assert set(re.findall(r"rayproject/ray:([\d.]+)", text)) == {pins["ray"]}


def test_only_ssh_comes_in_from_outside() -> None:
    rules = read(AWS)["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    for path in LAUNCHED.values():
        assert (
            flags(dict(starts(read(path)))["head_start_ray_commands"])["dashboard-host"]
            == "127.0.0.1"
        )
