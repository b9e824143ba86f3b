"""The versions that requirements.lock pins, and whether an image fits them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from downpour.cluster.config.paths import PACKAGE

LOCK = "requirements.lock"


ROLES = ("partitions", "shufflers", "replicas")


_VERSION = re.compile(r"\d+(?:\.\d+)+")


def requirements(line: str) -> Iterator[tuple[str, str]]:
    """Yield the packages and versions that a line of a requirements file or a command pins."""
    yield from re.findall(r"([A-Za-z][A-Za-z0-9_-]*)(?:\[[a-z,]*\])?==([0-9][0-9A-Za-z.]*)", line)


def pinned() -> Iterator[tuple[str, str]]:
    """Yield the packages and versions that requirements.lock pins."""
    yield from requirements((PACKAGE / LOCK).read_text())


def image_problem(image: str) -> str | None:
    """Return what is wrong with the tag of one of Ray's images; None for others and if it fits."""
    name, _, tag = image.partition(":")
    version, own = _VERSION.match(tag), importlib.metadata.version("ray")
    if name.startswith("rayproject/") and (version is None or version[0] != own):
        return f"{image} is not of Ray {own}, which is pinned; take {name}:{own}-py312-cpu"
    return None
