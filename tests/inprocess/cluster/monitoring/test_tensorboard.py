"""The curves that TensorBoard reads."""

from __future__ import annotations

import struct
from pathlib import Path

from downpour.cluster.monitoring.observation import Observation
from downpour.cluster.monitoring.tensorboard import TensorBoardSink
from tests.helpers.monitoring import VALUES, partition


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    sink = TensorBoardSink(tmp_path)
    sink.observed(Observation(values=VALUES, reports=[partition(0, 100)], replicas={}))
    sink.evaluated({"updates": 120, "accuracy": 0.5, "evaluation_loss": 1.0, "elapsed_s": 1.0})
    sink.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, a record, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
    assert found["training/loss"] == (100, 1.5)
    assert found["evaluation/accuracy"] == (120, 0.5)
