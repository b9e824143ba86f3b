"""A run's curves as TensorBoard events, in the run's folder: `tensorboard --logdir runs`.

The records are tensorboardX's. The file is not: its writer is a thread, which a full disk ends, and
whoever writes waits for it then.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.monitoring.observation import Observation
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.paramserver import durable

if TYPE_CHECKING:
    from downpour.workers.replica.replicas import WindowReport

FOLDER = "tensorboard"
FORMAT = "brain.Event:2"
_NUMBERS = itertools.count()
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
    "r2": "evaluation/R2",
    "rmse": "evaluation/RMSE",
    "mae": "evaluation/MAE",
    "f1": "evaluation/F1",
    "miou": "evaluation/mean IoU",
    "macro_f1": "evaluation/mean F1 of classes",
    "exact": "evaluation/rows without a mistake",
    "pixel_accuracy": "evaluation/pixels that are right",
    "moving_r2": "evaluation/R2 with the server's averages",
    "moving_f1": "evaluation/F1 with the server's averages",
    "moving_miou": "evaluation/mean IoU with the server's averages",
    "evaluation_loss": "evaluation/loss",
    "moving_accuracy": "evaluation/accuracy with the server's averages",
    "bn_gap": "batch normalization/gap in accuracy",
}
"""Where a value of metrics.jsonl is drawn."""


class TensorBoardSink:
    """Writes curves against updates, to a file that begins with the first of them."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._path: Path | None = None

    def trained(self, report: WindowReport) -> None:
        """See `Sink`."""

    def observed(self, observation: Observation) -> None:
        """See `Sink`."""
        drifts = {
            f"batch normalization/drift of partition {report.index}": report.drift
            for report in observation.reports
        }
        self._write({**observation.values, **drifts})

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._write(values)

    def saved(self, checkpoint: Checkpoint) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""

    def _write(self, values: Mapping[str, Any]) -> None:
        """Add values to the file, all or none.

        Raises:
            OSError: they cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        updates, path = values["updates"], self._path
        about = {"step": updates, "wall_time": time.time()}
        events = []
        if path is None:
            self._folder.mkdir(exist_ok=True)
            began = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
            path = self._folder / f"events.out.tfevents.{began}"
            # An earlier session may have written beyond the checkpoint that this one goes on from.
            # That is not shown.
            begin = SessionLog(status=SessionLog.START)
            events += [Event(file_version=FORMAT, **about), Event(session_log=begin, **about)]
        for key, value in values.items():
            name = CURVES.get(key, key if "/" in key else None)
            if name is not None and value is not None:
                events.append(Event(summary=scalar(name, value), **about))
        durable.append(path, b"".join(_record(event.SerializeToString()) for event in events))
        self._path = path


def _record(data: bytes) -> bytes:
    """Return an event as a TFRecord: length, its checksum, data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        )
    )
