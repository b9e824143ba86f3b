"""The cluster files that come with Downpour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from downpour.cluster.config.paths import ROOT

PROVIDERS = ROOT / "cluster" / "deploy" / "providers"
AWS, GCP, ONPREM = ROOT / "ray_cluster.yaml", PROVIDERS / "gcp.yaml", PROVIDERS / "onprem.yaml"
RAYCLUSTER = PROVIDERS / "kuberay" / "raycluster.yaml"
RAYJOB = PROVIDERS / "kuberay" / "rayjob.yaml"
LAUNCHED = {"aws": AWS, "gcp": GCP, "local": ONPREM}


def read(path: Path) -> dict[str, Any]:
    """The cluster in a file."""
    (config,) = [
        d
        for d in yaml.safe_load_all(path.read_text())
        if d["kind" if "kind" in d else "provider"] != "PersistentVolumeClaim"
    ]
    return dict(config)
