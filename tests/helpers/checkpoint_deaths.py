"""Writes a checkpoint over and over, and is killed (kill -9) at a later point of it each time.

A main module: prints, for each point, the number of the checkpoint that is the newest whole one
afterwards. Points are before and in the middle of every block that is written, and around the move
that finishes the checkpoint.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore, slowest
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version

PARTITIONS = split(num_parameters=4096, num_features=8, num_decayed=0, num_partitions=2)


class Dying:
    """A file system, or a stream of it, whose owner is killed at its n-th operation."""

    left = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __enter__(self) -> "Dying":
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()

    def open_output_stream(self, path: str, compression: None) -> "Dying":
        return Dying(self._inner.open_output_stream(path, compression=compression))

    def write(self, data: Any) -> None:
        _die_here()
        half = len(data) // 2
        self._inner.write(bytes(data)[:half])
        self._inner.flush()
        _die_here()
        self._inner.write(bytes(data)[half:])

    def move(self, source: str, target: str) -> None:
        _die_here()
        self._inner.move(source, target)
        _die_here()


def _die_here() -> None:
    Dying.left -= 1
    if Dying.left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def write(store: CheckpointStore, number: int, filesystem: Any) -> None:
    """A checkpoint as the partitions and the controller write it together."""
    folder = store.begin(number).removeprefix("file://")
    files = []
    for partition in PARTITIONS:
        weights = torch.full((partition.num_parameters,), float(number))
        current = Version(weights=weights, statistics=torch.ones(2, partition.num_features))
        config = UpdateConfig(batches_per_epoch=4, epoch_examples=4)
        meta, tensors = PartitionState(partition, config, current).dump()
        taken = snapshot.Snapshot(partition=partition, meta=meta, tensors=tensors)
        files.append(snapshot.write(filesystem, folder, taken))
    store._filesystem = filesystem
    store.commit(
        Checkpoint(number=number, updates=slowest(files), elapsed_s=1.0, files=tuple(files))
    )


def main() -> None:
    """See the module's docstring."""
    base = Path(sys.argv[1])
    snapshot.BLOCK_BYTES = 4096
    store = CheckpointStore(base.as_uri())
    inner = store._filesystem
    write(store, 1, inner)
    for point in range(1, 1000):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            Dying.left = point
            write(CheckpointStore(base.as_uri()), 2, Dying(inner))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        newest, passed = CheckpointStore(base.as_uri()).latest()
        number = 0 if newest is None else newest.number
        sys.stdout.write(f"{number} {len(passed)} {os.WIFSIGNALED(status)}\n")
        if not os.WIFSIGNALED(status):
            return
        inner.delete_dir(str(base / "000002"))


if __name__ == "__main__":
    main()
