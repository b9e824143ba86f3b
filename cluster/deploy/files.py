"""The cluster files that come with Downpour, and a copy of them in a folder of the user's.

Here: which files those are and how they are written. Not here: whether they are right
(`cluster_file`, `kuberay`).
"""

from __future__ import annotations

from pathlib import Path

from downpour.cluster.config.paths import PACKAGE
from downpour.cluster.deploy.pins import LOCK
from downpour.cluster.errors import UserError

CLUSTER_FILE = "ray_cluster.yaml"
DASHBOARD, ALERTS = "grafana_dashboard.json", "alerts.yaml"

_DEPLOY = PACKAGE / "cluster" / "deploy"
_MONITORING = PACKAGE / "cluster" / "monitoring"
_MOVED = {"cluster/deploy/providers": "providers", f"cluster/monitoring/{DASHBOARD}": DASHBOARD}
"""Paths that the files name, as a checkout has them and as the copy has them."""


def cluster_files() -> dict[str, Path]:
    """The path of each file in the copy, and where this installation keeps it."""
    files = {
        CLUSTER_FILE: _DEPLOY / "aws.yaml",
        LOCK: PACKAGE / LOCK,
        DASHBOARD: _MONITORING / DASHBOARD,
        ALERTS: _MONITORING / ALERTS,
    }
    providers = _DEPLOY / "providers"
    for path in sorted(providers.rglob("*")):
        if path.is_file():
            files[f"providers/{path.relative_to(providers)}"] = path
    return files


def write_cluster_files(folder: Path) -> list[Path]:
    """Write the cluster files to `folder`, which need not exist; return their paths.

    A file that is there already with the same text is left alone.

    Raises:
        UserError: a file is there with another text, which may be the user's work; or the folder
            cannot be written. Nothing is written in the first case.
    """
    texts = {folder / name: _text(source) for name, source in cluster_files().items()}
    try:
        changed = [p for p, text in texts.items() if p.exists() and p.read_text() != text]
        if changed:
            raise UserError(
                f"{changed[0]} exists and differs: give another folder, or move that file away"
            )
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a file there is not text"
        raise UserError(
            f"{folder} cannot take the cluster files ({reason}): give another folder"
        ) from None
    return list(texts)


def _text(source: Path) -> str:
    text = source.read_text()
    for before, after in _MOVED.items():
        text = text.replace(before, after)
    return text
