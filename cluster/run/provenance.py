"""What the last bits of a recorded run depend on besides its record."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from downpour.cluster.run.folder import ABOUT_RECORD
from downpour.paramserver import durable


def write_about(folder: Path, *, threads: int) -> None:
    """Note what the bits of a recorded run depend on besides the record."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"threads": threads, **surroundings()}) + "\n"
    with durable.replacing(folder / ABOUT_RECORD) as partial:
        Path(partial).write_text(text)


def surroundings() -> dict[str, str]:
    """What the last bits of a sum may depend on: version of PyTorch, machine, processor."""
    from importlib import metadata

    model = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {"torch": metadata.version("torch"), "machine": platform.machine(), "processor": model}
