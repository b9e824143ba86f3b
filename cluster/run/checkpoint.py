"""Checkpoints: folders of partition snapshots, each complete once its manifest is there.

Each partition writes `<base>/<number>/partition-*.safetensors` by itself while training goes on.
`manifest.json`, with sizes and checksums, is written last and in one step. A folder without a
manifest is an unfinished checkpoint: it is never loaded, and the next `prune` removes it. Files and
folders are synced in this order, so a power failure leaves what had been finished. Everything goes
through pyarrow.fs, so the base may be a bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from downpour.cluster.errors import UserError, one_line
from downpour.cluster.run.folder import RESOLVED, RunFolder
from downpour.paramserver import durable
from downpour.paramserver.partition.snapshot import SnapshotFile

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished checkpoint."""

    number: int
    """Counts checkpoints of the run from 1."""
    updates: int
    """Version of the partition that was furthest behind."""
    elapsed_s: float
    """Seconds of training behind it, over all sessions of the run."""
    accuracy: float | None = None
    """Accuracy of the newest evaluation at that time, if it has one."""
    goodness: float | None = None
    """The figure that decides which weights are best, turned so that more is better."""
    ramp: dict[str, Any] | None = None
    """What the guard of the warm start remembers (`cluster.controller.leases.warm_start`), if there
    is one.
    """
    scores: dict[str, Any] | None = None
    """What is remembered of the run's scorings (`cluster.run.early_stopping`)."""
    files: tuple[SnapshotFile, ...]
    """One for each partition, in their order."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, uri: str, num_partitions: int | None = None) -> None:
        """Checkpoints under `uri`, which need not exist yet.

        Args:
            uri: as `pyarrow.fs` takes it.
            num_partitions: checkpoints of another number are passed over; None takes any.

        Raises:
            UserError: no file system has such a URI.
        """
        self._num_partitions = num_partitions
        try:
            self._filesystem, self._base = pyarrow.fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"checkpoints cannot be kept at {uri}: {error}") from None
        self._uri = uri.rstrip("/")

    def folder_uri(self, number: int) -> str:
        """The folder that the partitions write checkpoint `number` to."""
        return f"{self._uri}/{number:06d}"

    def begin(self, number: int) -> str:
        """Make the folder of checkpoint `number`, and return its URI."""
        if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
            durable.make_folder(Path(self._folder(number)))
        else:
            self._filesystem.create_dir(self._folder(number), recursive=True)
        return self.folder_uri(number)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Finish a checkpoint whose snapshots have all been written.

        It is on the disk when this returns, so older ones may be removed.

        Raises:
            OSError: it cannot be written.
        """
        path = f"{self._base}/{checkpoint.number:06d}/{MANIFEST}"
        data = json.dumps({"format": FORMAT, **asdict(checkpoint)}, indent=1).encode()
        partial = f"{path}.partial"
        with self._filesystem.open_output_stream(partial, compression=None) as stream:
            stream.write(data)
        durable.sync_on(self._filesystem, partial)
        self._filesystem.move(partial, path)
        durable.sync_on(self._filesystem, self._folder(checkpoint.number))

    def numbers(self) -> list[int]:
        """Every checkpoint that has a folder, finished or not, in order."""
        selector = pyarrow.fs.FileSelector(self._base, allow_not_found=True)
        names = [info.base_name for info in self._filesystem.get_file_info(selector)]
        return sorted(int(name) for name in names if name.isdigit())

    def to_resume(self) -> tuple[Checkpoint | None, list[str]]:
        """As `latest`, to go on from; None if the run has finished no checkpoint yet.

        A run that ended while it wrote its first checkpoint begins anew.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        checkpoint, passed = self.latest()
        if checkpoint is None and passed:
            numbers = self.numbers()
            if len(numbers) > 1 or any(map(self._has_manifest, numbers)):
                raise UserError(
                    f"none of the checkpoints at {self._uri} can be used ({'; '.join(passed)}): "
                    "put a copy of one there, or remove that folder to begin the run anew"
                )
        return checkpoint, passed

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and why each newer one was passed over."""
        return self._newest(None)

    def latest_for(self, index: int) -> tuple[Checkpoint | None, list[str]]:
        """As `latest`, but only the file of partition `index` has to be whole."""
        return self._newest((index,))

    def _newest(self, indices: Sequence[int] | None) -> tuple[Checkpoint | None, list[str]]:
        passed: list[str] = []
        for number in reversed(self.numbers()):
            checkpoint, problem = self._verify(number, indices)
            if checkpoint is not None:
                return checkpoint, passed
            passed.append(problem)
        return None, passed

    def discard(self, number: int) -> None:
        """Remove an unfinished checkpoint; what cannot be removed is left to `prune`."""
        with contextlib.suppress(OSError):
            self._filesystem.delete_dir(self._folder(number))

    def prune(self, keep_last: int, keep_best: int = 0) -> None:
        """Remove old checkpoints; what cannot be removed is left to the next time.

        Of the finished ones, the last `keep_last` and the `keep_best` best ones stay. An
        unfinished one stays if it is newer than the last finished one.
        """
        numbers = self.numbers()
        finished = [n for n in numbers if self._has_manifest(n)]
        if not finished:
            return
        kept = set(finished[-keep_last:])
        if keep_best and len(finished) > keep_last:
            scores = {n: self._goodness(n) for n in finished}
            scored = sorted((n for n in finished if scores[n] is not None), reverse=True)
            kept |= set(sorted(scored, key=lambda n: -(scores[n] or 0.0))[:keep_best])
        for number in numbers:
            if number not in kept and number < finished[-1]:
                self.discard(number)

    def _folder(self, number: int) -> str:
        return f"{self._base}/{number:06d}"

    def _goodness(self, number: int) -> float | None:
        try:
            kept = json.loads(self._read(f"{self._folder(number)}/{MANIFEST}"))
            value = kept.get("goodness", kept.get("accuracy"))
        except (OSError, ValueError, AttributeError):
            return None
        return float(value) if isinstance(value, int | float) else None

    def _has_manifest(self, number: int) -> bool:
        info = self._filesystem.get_file_info(f"{self._folder(number)}/{MANIFEST}")
        return bool(info.type == pyarrow.fs.FileType.File)

    def _verify(self, number: int, indices: Sequence[int] | None) -> tuple[Checkpoint | None, str]:
        folder = self._folder(number)
        if not self._has_manifest(number):
            return None, f"checkpoint {number} was not finished"
        try:
            plain = json.loads(self._read(f"{folder}/{MANIFEST}"))
            if plain.pop("format") != FORMAT:
                return None, f"checkpoint {number} is of another format"
            files = tuple(SnapshotFile(**f) for f in plain.pop("files"))
            checkpoint = Checkpoint(**plain, files=files)
            if self._num_partitions not in (None, len(files)):
                return None, f"checkpoint {number} is of {len(files)} partitions"
            for index in range(len(files)) if indices is None else indices:
                file = files[index]
                if self._digest(f"{folder}/{file.name}") != file.sha256:
                    return None, f"checkpoint {number} is damaged: {file.name} has changed"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return None, f"checkpoint {number} is damaged: {one_line(error)}"
        return checkpoint, ""

    def _digest(self, path: str) -> str:
        """SHA-256 of a file, which need not fit into memory."""
        digest = hashlib.sha256()
        with self._filesystem.open_input_stream(path, compression=None) as stream:
            while block := stream.read(CHUNK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _read(self, path: str) -> bytes:
        with self._filesystem.open_input_file(path) as stream:
            return bytes(stream.read())


def slowest(files: Sequence[SnapshotFile]) -> int:
    """Version of the partition that is furthest behind."""
    return min(file.version for file in files)


def partitions_before(folder: RunFolder) -> int | None:
    """How many partitions the run of `folder` has had so far; None if it has not begun.

    The number is in the configuration if somebody chose it, else in `resolved.json`. A run that an
    older version began has no such file: its newest checkpoint tells.
    """
    chosen = folder.config().server.partitions
    if chosen is not None:
        return chosen
    if (folder.path / RESOLVED).exists():
        return int(folder.read_json(RESOLVED)["partitions"])
    checkpoint, _ = CheckpointStore(folder.checkpoints_uri).latest()
    return None if checkpoint is None else len(checkpoint.files)


def going_on(
    newest: Checkpoint | None, status: Mapping[str, Any], *, version: int, metric: str
) -> Checkpoint:
    """Return where a run stands whose partitions have outlived its driver.

    Args:
        newest: its newest checkpoint, if there is one.
        status: what the run's status says, from the last second of that driver.
        version: of the partition that is furthest behind.
        metric: the figure that decides which weights are best.
    """
    before = newest or Checkpoint(number=0, updates=0, elapsed_s=0.0, files=())
    elapsed_s = max(before.elapsed_s, float(status.get("elapsed_s", 0.0)))
    scores = dict(before.scores or {})
    if newest is not None:
        more_s = elapsed_s - before.elapsed_s
        scores["training_s"] = scores.get("training_s", 0.0) + more_s
    if (best := status.get(f"best_{metric}")) is not None:
        scores |= {"best": best, "metric": metric}
    return replace(before, updates=version, elapsed_s=elapsed_s, scores=scores)
