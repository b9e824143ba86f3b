"""Ray's own bootstrap and autoscaler take the cluster files; the clouds are fakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from downpour.cluster.config.placement import PlacementConfig, Role, demand
from tests.helpers.cluster_files import (
    AWS,
    GCP,
    read,
)

pytestmark = pytest.mark.usefixtures("as_a_user_in_the_root")


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
