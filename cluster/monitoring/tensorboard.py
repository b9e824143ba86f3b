"""A run's curves as TensorBoard events, in the run's folder: `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.monitoring.observation import Observation
from downpour.cluster.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

    from downpour.workers.replica.replicas import WindowReport

FOLDER = "tensorboard"
FLUSH_S = 10
CURVES = {
    "loss": "training/loss",
    "learning_rate": "training/learning rate",
    "updates_per_s": "speed/updates a second",
    "staleness_mean": "staleness/mean",
    "staleness_p99": "staleness/99th percentile",
    "replicas_alive": "cluster/replicas",
    "duplicates": "cluster/duplicates",
    "refused": "cluster/refused mini-batches",
    "accuracy": "evaluation/accuracy",
    "evaluation_loss": "evaluation/loss",
    "moving_accuracy": "evaluation/accuracy with the server's averages",
    "bn_gap": "batch normalization/gap in accuracy",
}
"""Where a value of metrics.jsonl is drawn."""


class TensorBoardSink:
    """Writes curves against updates, to a file that begins with the first of them."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._writer: SummaryWriter | None = None

    def trained(self, report: WindowReport) -> None:
        """See `Sink`."""

    def observed(self, observation: Observation) -> None:
        """See `Sink`."""
        self._write(observation.values)
        for report in observation.reports:
            name = f"batch normalization/drift of partition {report.index}"
            self._write({name: report.drift, "updates": observation.values["updates"]})

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._write(values)

    def saved(self, checkpoint: Checkpoint) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        updates = values["updates"]
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # An earlier session may have written beyond the checkpoint that this one goes on from.
            # That is not shown.
            self._writer = SummaryWriter(
                str(self._folder), purge_step=updates, flush_secs=FLUSH_S, write_to_disk=True
            )
        for key, value in values.items():
            name = CURVES.get(key, key if "/" in key else None)
            if name is not None and value is not None:
                self._writer.add_scalar(name, value, updates)
