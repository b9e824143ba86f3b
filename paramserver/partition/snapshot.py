"""Snapshots of a partition: one safetensors file each, plain metadata inside, nothing pickled.

A snapshot is consistent in itself: weights, rule state, BN statistics, version and applied set of
one instant. Snapshots of different instants still make a consistent checkpoint, because each brings
its own applied set: on resume every partition takes just what it lacks. `cluster` names, keeps and
prunes checkpoints. What a snapshot holds is `persistence`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow.fs

from downpour.paramserver import durable
from downpour.paramserver.errors import BadSnapshot
from downpour.paramserver.partition.ranges import Partition

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file: its readers refuse a longer one."""
_DTYPES = {"float32": "F32", "float64": "F64", "uint8": "U8"}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A partition's state at one instant."""

    partition: Partition
    meta: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    def check(self, partition: Partition) -> None:
        """Make sure that this is a snapshot of `partition`.

        Raises:
            BadSnapshot: It is of another model or another cut of it.
        """
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
    """Write a snapshot as one file, a block at a time, straight from the tensors' memory.

    The library's own writer would copy everything twice with Python's lock held, while the
    partition serves pushes. The file is on the disk, under its name, when this returns.

    Args:
        filesystem: Where to write.
        folder: A folder there.
        snapshot: What to write.

    Returns:
        Name, size and checksum of what was written.

    Raises:
        OSError: It cannot be written.
    """
    name = f"partition-{snapshot.partition.index:05d}.safetensors"
    digest, num_bytes = hashlib.sha256(), 0
    with filesystem.open_output_stream(f"{folder}/{name}", compression=None) as stream:
        for block in blocks(snapshot):
            digest.update(block)
            stream.write(block)
            num_bytes += len(block)
    durable.sync_on(filesystem, f"{folder}/{name}")
    durable.sync_on(filesystem, folder)
    return SnapshotFile(
        name=name,
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        version=int(snapshot.meta["version"]),  # type: ignore[call-overload]
    )


def blocks(snapshot: Snapshot) -> Iterator[memoryview]:
    """Yield the bytes of a snapshot's file, at most `BLOCK_BYTES` at a time."""
    document = {
        "format": FORMAT,
        "partition": asdict(snapshot.partition),
        "meta": snapshot.meta,
    }
    return _blocks(snapshot.tensors, {"downpour": json.dumps(document)})


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file, at most `BLOCK_BYTES` at a time."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    arrays: dict[str, npt.NDArray[Any]] = {}
    # The widest first, so that every tensor is aligned: the header's length is a multiple of 8.
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        array = tensors[name].contiguous().numpy()
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        arrays[name] = array
    text = json.dumps(header).encode()
    if len(text) > MAX_HEADER_BYTES - 8:
        raise OSError(f"the snapshot's header is {len(text):,} bytes: no reader would take it")
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        if array.nbytes:
            view = memoryview(array.reshape(-1)).cast("B")  # type: ignore[arg-type]
            for start in range(0, len(view), BLOCK_BYTES):
                yield view[start : start + BLOCK_BYTES]


def read(filesystem: pyarrow.fs.FileSystem, path: str, sha256: str | None = None) -> Snapshot:
    """Read the snapshot in the file at `path`, and compare its checksum if one is given.

    Raises:
        BadSnapshot: The file cannot be read, is damaged, or is no snapshot.
    """
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
    return parse(data, path)


def parse(data: bytes, name: str) -> Snapshot:
    """Return the snapshot that a file's bytes are.

    Args:
        data: The bytes.
        name: What errors call them.

    Raises:
        BadSnapshot: They are none, or of another format.
    """
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        document = json.loads(header["__metadata__"]["downpour"])
        if document["format"] != FORMAT:
            raise BadSnapshot(
                f"{name} has snapshot format {document['format']}, not {FORMAT}: read it with the "
                "release that wrote it"
            )
        partition, meta = Partition(**document["partition"]), document["meta"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadSnapshot(f"{name} is not a snapshot of a partition: {error}") from None
    return Snapshot(partition=partition, meta=meta, tensors=tensors)
