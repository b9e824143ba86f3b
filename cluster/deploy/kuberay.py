"""Checks manifests of KubeRay; see `cluster_file`, which does the same for `ray up`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from downpour.cluster.config.placement import LABEL
from downpour.cluster.deploy.pins import ROLES, image_problem

API = "ray.io/v1"


def kuberay_problems(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the Ray objects in a manifest, a line each."""
    found: list[str] = []
    known = False
    for document in documents:
        spec = document.get("spec") or {}
        match document.get("kind"):
            case "RayCluster":
                known = True
                found += [*_version(document), *_cluster(spec, "spec")]
            case "RayJob":
                known = True
                found += _version(document)
                if not spec.get("entrypoint"):
                    found.append("spec.entrypoint: no command; give `python -m downpour train ...`")
                if "rayClusterSpec" in spec:
                    found += _cluster(spec["rayClusterSpec"], "spec.rayClusterSpec")
                elif "clusterSelector" not in spec:
                    found.append("spec: neither rayClusterSpec nor clusterSelector; give one")
    if not known:
        found.append(
            "neither a RayCluster nor a RayJob in the file; `downpour cluster-files FOLDER` writes "
            "examples of both"
        )
    return found


def _version(document: Mapping[str, Any]) -> Iterator[str]:
    if document.get("apiVersion") != API:
        yield f"apiVersion is {document.get('apiVersion')}: {document['kind']} needs {API}"


def _cluster(spec: Mapping[str, Any], place: str) -> Iterator[str]:
    own = importlib.metadata.version("ray")
    if spec.get("rayVersion") != own:
        yield f"{place}.rayVersion is {spec.get('rayVersion')}, and the pin is {own}"
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield f"{place}.authOptions: without mode: token anybody may run jobs; set it"
    groups = spec.get("workerGroupSpecs") or []
    for group in [spec.get("headGroupSpec") or {}, *groups]:
        pod = (group.get("template") or {}).get("spec") or {}
        for container in pod.get("containers") or ():
            if wrong := image_problem(container.get("image", "")):
                yield f"{place}: {container.get('name')}: {wrong}"
    labelled = {(group.get("labels") or {}).get(LABEL): group for group in groups}
    for role in ROLES:
        if not (labelled.get(role) or {}).get("maxReplicas"):
            yield (
                f"{place}.workerGroupSpecs: no group with the label {LABEL}: {role} may have a "
                "replica; label one, or raise its maxReplicas"
            )
