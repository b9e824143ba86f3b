"""A run of `mnist-bn` that is over soon, and what its result has to be."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

NUM_BATCHES, NUM_ROWS = 1877, 60_000
"""An epoch's."""
NUM_PUSHES = (NUM_BATCHES // 64) * -(-64 // 5) + -(-(NUM_BATCHES % 64) // 5)
"""An epoch's: 5 mini-batches each; the last of a window of 64 has fewer."""
SMALL = (
    *("--replicas", "4", "--warm-start-epochs", "0", "--ramp-epochs", "0"),
    *("--learning-rate", "0.02", "--window-batches", "64"),
)
"""All four at once from the start, at a rate that 20 steps in flight bear without a warm start, in
windows that are soon over."""


def check_result(result: dict[str, object], *, epochs: int) -> None:
    """Every example once an epoch, by the applied sets and by the counts."""
    assert result["exactly_once"] is True
    assert result["batches_applied"] == epochs * NUM_BATCHES
    assert result["examples"] == epochs * NUM_ROWS
    assert result["updates"] == epochs * NUM_PUSHES
    assert result["refused"] == 0


@dataclass(frozen=True)
class OwnRay:
    """A run that trains on a Ray of its own, which it has started."""

    process: subprocess.Popen[bytes]
    run: Path
    log: Path
    home: Path
    ray: Path
    """Ray's folder."""
