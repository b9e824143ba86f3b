"""The curves that TensorBoard reads."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.monitoring.observation import Observation
from downpour.cluster.monitoring.tensorboard import TensorBoardSink
from tests.helpers.monitoring import VALUES, partition
from tests.helpers.small_files import files_of_at_most


def events(folder: Path) -> list[Any]:
    """The events in the one file of a run's folder; their checksums have to be right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (file,) = (folder / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, a record, its checksum
        length, checked = struct.unpack("<QI", data[:12])
        assert checked == masked_crc32c(data[:8])
        record, data = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[:4]) == (masked_crc32c(record),)
        found.append(Event.FromString(record))
        data = data[4:]
    return found


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.observed(Observation(values=VALUES, reports=[partition(0, 100)], replicas={}))
    sink.evaluated({"updates": 120, "accuracy": 0.5, "evaluation_loss": 1.0, "elapsed_s": 1.0})
    sink.close()
    read = events(tmp_path)
    assert read[0].file_version == "brain.Event:2"
    assert read[1].step == 100, "what an earlier session wrote beyond it is not shown"
    found = {v.tag: (event.step, v.simple_value) for event in read for v in event.summary.value}
    assert found["training/loss"] == (100, 1.5)
    assert found["evaluation/accuracy"] == (120, 0.5)


def test_a_full_disk_costs_the_curves_of_its_time_and_keeps_nobody(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    scored = {"accuracy": 0.5, "evaluation_loss": 1.0, "elapsed_s": 1.0}
    sink.evaluated({"updates": 1, **scored})
    (file,) = (tmp_path / "tensorboard").iterdir()
    for _ in range(50):
        with files_of_at_most(file.stat().st_size + 20), pytest.raises(OSError, match=r"\w"):
            sink.evaluated({"updates": 2, **scored})
    sink.evaluated({"updates": 3, **scored})
    sink.close()
    assert {event.step for event in events(tmp_path)} == {1, 3}
