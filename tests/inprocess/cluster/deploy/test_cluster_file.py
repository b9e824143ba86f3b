"""The cluster files: each passes `downpour check`, and Ray's own bootstrap with clouds that answer
as theirs would; what they share is equal; mistakes are named with their remedy.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from downpour.cluster.config.paths import ROOT
from downpour.cluster.config.placement import PlacementConfig, Role, demand
from downpour.cluster.deploy.cluster_file import flags, problems, starts
from downpour.cluster.deploy.pins import pinned

PROVIDERS = ROOT / "cluster" / "deploy" / "providers"
AWS, GCP, ONPREM = ROOT / "ray_cluster.yaml", PROVIDERS / "gcp.yaml", PROVIDERS / "onprem.yaml"
RAYCLUSTER = PROVIDERS / "kuberay" / "raycluster.yaml"
RAYJOB = PROVIDERS / "kuberay" / "rayjob.yaml"
LAUNCHED = {"aws": AWS, "gcp": GCP, "local": ONPREM}


def read(path: Path) -> dict[str, Any]:
    (config,) = [
        d
        for d in yaml.safe_load_all(path.read_text())
        if d["kind" if "kind" in d else "provider"] != "PersistentVolumeClaim"
    ]
    return dict(config)


@pytest.fixture(autouse=True)
def as_a_user_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with a token, and the working directory that the documentation says."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", [AWS, GCP, ONPREM, RAYCLUSTER, RAYJOB], ids=lambda p: p.name)
def test_our_files_have_no_problems(path: Path) -> None:
    own_to_fill_in = ["provider.project_id: put your project's id here"] if path == GCP else []
    assert problems(path) == own_to_fill_in


# What is shared


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


# Mistakes


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


# Clouds that answer


def test_ray_bootstraps_the_file_for_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is checked against Amazon's own model of it before it is answered."""
    import botocore.client
    import botocore.validate

    types = read(AWS)["available_node_types"].values()
    sizes = [
        {
            "InstanceType": name,
            "VCpuInfo": {"DefaultVCpus": 8},
            "MemoryInfo": {"SizeInMiB": 1 << 14},
        }
        for name in {node_type["node_config"]["InstanceType"] for node_type in types}
    ]
    asked: list[str] = []
    groups: list[dict[str, Any]] = []
    answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "DescribeInstanceTypes": lambda _: {"InstanceTypes": sizes},
        "GetInstanceProfile": lambda _: {
            "InstanceProfile": {
                "Arn": "arn:aws:iam::1:instance-profile/ray",
                "Roles": [{"RoleName": "ray"}],
            }
        },
        "DescribeKeyPairs": lambda _: {"KeyPairs": []},
        "CreateKeyPair": lambda p: {"KeyName": p["KeyName"], "KeyMaterial": "a key"},
        "DescribeSubnets": lambda _: {
            "Subnets": [
                {
                    "SubnetId": "subnet-1",
                    "VpcId": "vpc-1",
                    "State": "available",
                    "MapPublicIpOnLaunch": True,
                    "AvailabilityZone": "us-west-2a",
                }
            ]
        },
        "DescribeSecurityGroups": lambda _: {"SecurityGroups": groups},
        "CreateSecurityGroup": lambda p: (
            groups.append(
                {
                    "GroupId": "sg-1",
                    "GroupName": p["GroupName"],
                    "VpcId": p["VpcId"],
                    "IpPermissions": [],
                }
            )
            or {"GroupId": "sg-1"}
        ),
        "AuthorizeSecurityGroupIngress": lambda p: (
            groups[0]["IpPermissions"].extend(p["IpPermissions"]) or {}
        ),
    }

    def answer(self: Any, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        shape = self.meta.service_model.operation_model(operation).input_shape
        report = botocore.validate.ParamValidator().validate(parameters, shape)
        assert not report.has_errors(), report.generate_report()
        asked.append(operation)
        return answers[operation](parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", answer)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    config = bootstrap(AWS)
    assert "AuthorizeSecurityGroupIngress" in asked
    opened = [p for p in groups[0]["IpPermissions"] if p.get("IpRanges")]
    assert {(p["FromPort"], p["ToPort"]) for p in opened} == {(22, 22)}
    for name, node_type in config["available_node_types"].items():
        node_config = node_type["node_config"]
        assert node_config["SubnetIds"] == ["subnet-1"], name
        assert node_config["SecurityGroupIds"] == ["sg-1"], name
    assert config["head_node"]["IamInstanceProfile"]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["partitions"]["resources"]["memory"] > 0
    check_launches(config)


def check_launches(config: dict[str, Any]) -> None:
    """What would be asked of EC2 for a node of each type is a request that it knows."""
    import boto3
    import botocore.validate

    model = boto3.client("ec2", region_name="us-west-2").meta.service_model
    shape = model.operation_model("RunInstances").input_shape
    for name, node_type in config["available_node_types"].items():
        request = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        request["SubnetId"] = request.pop("SubnetIds")[0]
        report = botocore.validate.ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_ray_bootstraps_the_file_for_google(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Google's own client, which knows its requests, over answers of ours."""
    import ray.autoscaler._private.gcp.config as gcp
    from googleapiclient import discovery

    asked: list[str] = []

    class Http:
        def request(self, uri: str, method: str = "GET", **_: Any) -> tuple[Any, bytes]:
            asked.append(f"{method} {uri}")
            for part, answer in (
                ("getIamPolicy", {"bindings": [], "etag": "e"}),
                ("setIamPolicy", {}),
                (
                    "serviceAccounts",
                    {"email": "ray@x.iam.gserviceaccount.com", "projectId": "your-project"},
                ),
                (
                    "subnetworks",
                    {"items": [{"selfLink": "projects/p/regions/us-west1/subnetworks/d"}]},
                ),
                ("setCommonInstanceMetadata", {"name": "operation"}),
                ("operations", {"status": "DONE"}),
                (
                    "compute/v1/projects",
                    {"name": "your-project", "commonInstanceMetadata": {"items": []}},
                ),
                ("projects", {"projectId": "your-project", "lifecycleState": "ACTIVE"}),
            ):
                if part in uri:
                    response = SimpleNamespace(status=200, reason="OK")
                    return response, json.dumps(answer).encode()
            raise AssertionError(f"nobody asked for {uri}")

    def clients(_: Any) -> tuple[Any, ...]:
        def build(name: str, version: str) -> Any:
            return discovery.build(name, version, http=Http(), static_discovery=True)

        names = (("cloudresourcemanager", "v1"), ("iam", "v1"), ("compute", "v1"))
        return (*(build(*name) for name in names), None)

    monkeypatch.setattr(gcp, "construct_clients_from_provider_config", clients)
    config = bootstrap(GCP)
    assert any("subnetworks" in request for request in asked)
    instance = discovery.build("compute", "v1", http=Http(), static_discovery=True)._schema
    known = set(instance.get("Instance")["properties"])
    for name, node_type in config["available_node_types"].items():
        assert node_type["node_config"]["networkInterfaces"], name
        # Ray takes these two out again, or makes them the instance's, before it asks.
        assert set(node_type["node_config"]) - {"networkConfig"} <= known, name
        assert set(instance.get("Scheduling")["properties"]) >= {
            key for part in node_type["node_config"].get("scheduling", ()) for key in part
        }


@pytest.mark.parametrize("path", [AWS, GCP], ids=lambda p: p.name)
def test_the_cluster_grows_from_nothing_and_falls_back(path: Path) -> None:
    """What Ray's autoscaler launches for a run, by the file's node types and our request."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    assert launches(path, monitor) == {"partitions": 1, "shufflers": 1, "replicas_spot": 2}
    failed = InstanceUpdateEvent(
        instance_type="replicas_spot", new_instance_status=Instance.ALLOCATION_TIMEOUT
    )
    monitor.notify([failed])
    assert launches(path, monitor) == {"partitions": 1, "shufflers": 1, "replicas_on_demand": 2}


@pytest.mark.parametrize("path", [AWS, GCP], ids=lambda p: p.name)
def test_a_run_on_gpus_starts_gpu_nodes_and_no_other_run_does(path: Path) -> None:
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    beside = {"partitions": 1, "shufflers": 1}
    assert launches(path, monitor, 3, gpu_share=1.0) == {**beside, "gpu_spot": 3}
    assert launches(path, monitor, 6, gpu_share=0.5) == {**beside, "gpu_spot": 3}
    failed = InstanceUpdateEvent(
        instance_type="gpu_spot", new_instance_status=Instance.ALLOCATION_TIMEOUT
    )
    monitor.notify([failed])
    assert launches(path, monitor, 1, gpu_share=1.0) == {**beside, "gpu_on_demand": 1}


def launches(
    path: Path, monitor: Any, processes: int = 10, gpu_share: float = 0.0
) -> dict[str, int]:
    """Nodes by type, for two partitions, a shuffler and so many processes of replicas."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    document = read(path)
    assert all(t.get("min_workers", 0) == 0 for t in document["available_node_types"].values())
    config = AutoscalingConfig(document, skip_content_hash=True)
    equals = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")
    bundles: list[Any] = []
    counts: dict[Role, int] = {"partitions": 2, "shufflers": 1, "replicas": processes}
    for place, count in demand(PlacementConfig(), counts, on_gpus=bool(gpu_share)):
        if place.label is None:
            resources = {"CPU": 1.0, "GPU": gpu_share}
            bundles += [ResourceRequestUtil.make(resources)] * count
            continue
        selector = [(place.label[0], equals, [place.label[1]])]
        bundles += [ResourceRequestUtil.make({"CPU": 1.0}, label_selectors=[selector])] * count
    wanted = ClusterResourceConstraint(
        resource_requests=ResourceRequestUtil.group_by_count(bundles)
    )
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            cluster_resource_constraints=[wanted],
            cloud_resource_availabilities=monitor.get_resource_availabilities(),
            recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        )
    )
    assert not reply.infeasible_cluster_resource_constraints
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def bootstrap(path: Path) -> dict[str, Any]:
    """What `ray up` makes of a file before it starts the first node."""
    from ray.autoscaler._private.commands import _bootstrap_config

    made: dict[str, Any] = _bootstrap_config(read(path), no_config_cache=True)
    return made
