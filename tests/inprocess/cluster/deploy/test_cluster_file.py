"""`downpour check`: our files pass, and a mistake is named with its remedy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from downpour.cluster.deploy.cluster_file import problems
from tests.helpers.cluster_files import (
    AWS,
    GCP,
    ONPREM,
    RAYCLUSTER,
    RAYJOB,
    read,
)

pytestmark = pytest.mark.usefixtures("as_a_user_in_the_root")


@pytest.mark.parametrize("path", [AWS, GCP, ONPREM, RAYCLUSTER, RAYJOB], ids=lambda p: p.name)
def test_our_files_have_no_problems(path: Path) -> None:
    own_to_fill_in = ["provider.project_id: put your project's id here"] if path == GCP else []
    assert problems(path) == own_to_fill_in


Change = Callable[[dict[str, Any]], None]


def drop_token(config: dict[str, Any]) -> None:
    del config["file_mounts"]["~/.ray/auth_token"]


def open_dashboard(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"]
    commands[1] = commands[1].replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")


def no_mode(config: dict[str, Any]) -> None:
    commands = config["worker_start_ray_commands"]
    commands[1] = commands[1].replace("RAY_AUTH_MODE=token", "")


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        (AWS, drop_token, r'file_mounts: the token .* add "~/.ray/auth_token"'),
        (AWS, open_dashboard, r"--dashboard-host=0\.0\.0\.0 opens .* leave it at 127\.0\.0\.1"),
        (AWS, no_mode, r"worker_start_ray_commands: .*RAY_AUTH_MODE=token"),
        (
            AWS,
            lambda c: c["setup_commands"].append("pip install ray[default]==2.9.0"),
            r"ray 2\.9\.0, and the pin is 2\.60\.0",
        ),
        (AWS, lambda c: c["setup_commands"].pop(1), "pinned dependencies are not installed"),
        (
            AWS,
            lambda c: c["available_node_types"].pop("partitions"),
            r"label downpour=partitions may",
        ),
        (
            AWS,
            lambda c: c["available_node_types"]["shufflers"].pop("labels"),
            r"shufflers: no label downpour.*give it one of",
        ),
        (
            AWS,
            lambda c: c["file_mounts"].update({"~/x": "./absent"}),
            r"\./absent .* does not exist",
        ),
        (AWS, lambda c: c.pop("head_setup_commands"), "the head needs boto3"),
        (
            AWS,
            lambda c: c.pop("worker_start_ray_commands"),
            "worker_start_ray_commands: no `ray start`",
        ),
        (AWS, lambda c: c.update(max_worker=3), r"the file: .*max_worker"),
        (AWS, lambda c: c.update(head_node_type="big"), "head_node_type"),
        (
            AWS,
            lambda c: c.update(docker={"image": "rayproject/ray:2.9.0", "container_name": "c"}),
            r"take rayproject/ray:2\.60\.0",
        ),
        (
            AWS,
            lambda c: c["available_node_types"]["replicas_spot"].update(min_workers=99),
            "max_workers",
        ),
        (
            ONPREM,
            lambda c: c["provider"].update(head_ip="10.1.1.1"),
            r"--node-ip-address is 192\.168\.1\.10, and provider\.head_ip 10\.1\.1\.1",
        ),
        (ONPREM, lambda c: c["provider"].update(worker_ips=["node7"]), "node7 is not an address"),
        (
            ONPREM,
            lambda c: c["provider"].update(worker_ips=["192.168.1.11"]),
            r"192\.168\.1\.12 has a role",
        ),
        (ONPREM, lambda c: c["provider"].pop("head_ip"), "head_ip"),
        (RAYCLUSTER, lambda c: c["spec"].pop("authOptions"), "authOptions: without mode: token"),
        (RAYCLUSTER, lambda c: c["spec"].update(rayVersion="2.9.0"), r"rayVersion is 2\.9\.0"),
        (RAYCLUSTER, lambda c: c["spec"]["workerGroupSpecs"].pop(), "downpour: replicas may have"),
        (RAYJOB, lambda c: c["spec"].pop("entrypoint"), "entrypoint: no command"),
        (RAYJOB, lambda c: c.update(apiVersion="ray.io/v1alpha1"), "RayJob needs ray.io/v1"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    path: Path, change: Change, said: str, tmp_path: Path
) -> None:
    config = copy.deepcopy(read(path))
    change(config)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(config))
    found = problems(wrong)
    assert any(re.search(said, line) for line in found), found
    assert all("\n" not in line for line in found)
