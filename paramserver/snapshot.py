"""Snapshots of a partition: one safetensors file each, plain metadata inside, nothing pickled.

A snapshot is consistent in itself: weights, rule state, BN statistics, version and applied set of
one instant. A set of snapshots of different instants is a consistent checkpoint all the same,
because each brings its own applied set: on resume every partition takes just what it lacks.
Naming, keeping and pruning checkpoints is `cluster`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pyarrow.fs

from paramserver.errors import BadSnapshot
from paramserver.partition import Partition

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a partition's state was at one instant."""

    partition: Partition
    meta: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    def check(self, partition: Partition) -> None:
        """Raise `BadSnapshot` unless this is a snapshot of `partition`."""
        if self.partition != partition:
            raise BadSnapshot(
                f"the snapshot is of {self.partition}, not of {partition}: resume with the model "
                "and the number of partitions that the run began with"
            )


@dataclass(frozen=True, kw_only=True)
class SnapshotFile:
    """A snapshot as written."""

    name: str
    num_bytes: int
    sha256: str
    version: int


def write(filesystem: pyarrow.fs.FileSystem, folder: str, snapshot: Snapshot) -> SnapshotFile:
    """Write a snapshot into `folder` as one file, and say what was written."""
    name = f"partition-{snapshot.partition.index:05d}.safetensors"
    document = {
        "format": FORMAT,
        "partition": asdict(snapshot.partition),
        "meta": snapshot.meta,
    }
    import safetensors.torch

    data = safetensors.torch.save(
        {n: t.contiguous() for n, t in snapshot.tensors.items()},
        metadata={"downpour": json.dumps(document)},
    )
    with filesystem.open_output_stream(f"{folder}/{name}", compression=None) as stream:
        stream.write(data)
    return SnapshotFile(
        name=name,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        version=int(snapshot.meta["version"]),  # type: ignore[call-overload]
    )


def read(filesystem: pyarrow.fs.FileSystem, path: str, sha256: str | None = None) -> Snapshot:
    """The snapshot in the file at `path`, checked against its checksum where one is given."""
    import safetensors.torch

    try:
        with filesystem.open_input_file(path) as stream:
            data = stream.read()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise BadSnapshot(f"{path} cannot be read: {error}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BadSnapshot(
            f"{path} is damaged, its checksum is not the one that was recorded: "
            "use another checkpoint"
        )
    try:
        tensors = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        document = json.loads(header["__metadata__"]["downpour"])
        if document["format"] != FORMAT:
            raise BadSnapshot(
                f"{path} has snapshot format {document['format']}, not {FORMAT}: read it with the "
                "release that wrote it"
            )
        partition, meta = Partition(**document["partition"]), document["meta"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadSnapshot(f"{path} is not a snapshot of a partition: {error}") from None
    return Snapshot(partition=partition, meta=meta, tensors=tensors)
