"""Checkpoints: folders of partition snapshots, each complete once its manifest is there.

`<base>/<number>/partition-*.safetensors` are written by the partitions, each by itself, while
training goes on; `manifest.json`, with sizes and checksums, is written last and in one step. A
folder without a manifest is an unfinished checkpoint: it is never loaded, and is removed by the
next `prune`. Everything goes through pyarrow.fs, so the base may be a bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.fs

from cluster.errors import UserError
from paramserver.snapshot import SnapshotFile

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished checkpoint."""

    number: int
    """Counts checkpoints of the run from 1."""
    updates: int
    """Version of the partition that was furthest behind."""
    elapsed_s: float
    """Seconds of training behind it, over all sessions of the run."""
    files: tuple[SnapshotFile, ...]
    """One for each partition, in their order."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, uri: str) -> None:
        """Checkpoints under `uri`, which need not exist yet."""
        try:
            self._filesystem, self._base = pyarrow.fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"checkpoints cannot be kept at {uri}: {error}") from None
        self._uri = uri.rstrip("/")

    def folder_uri(self, number: int) -> str:
        """Where the partitions write checkpoint `number`."""
        return f"{self._uri}/{number:06d}"

    def begin(self, number: int) -> str:
        """Make the folder of checkpoint `number`, and return its URI."""
        self._filesystem.create_dir(f"{self._base}/{number:06d}", recursive=True)
        return self.folder_uri(number)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Finish a checkpoint whose snapshots have all been written."""
        path = f"{self._base}/{checkpoint.number:06d}/{MANIFEST}"
        data = json.dumps({"format": FORMAT, **asdict(checkpoint)}, indent=1).encode()
        partial = f"{path}.partial"
        with self._filesystem.open_output_stream(partial, compression=None) as stream:
            stream.write(data)
        self._filesystem.move(partial, path)

    def numbers(self) -> list[int]:
        """Every checkpoint that has a folder, finished or not, in order."""
        selector = pyarrow.fs.FileSelector(self._base, allow_not_found=True)
        names = [info.base_name for info in self._filesystem.get_file_info(selector)]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and why each newer one was passed over."""
        passed: list[str] = []
        for number in reversed(self.numbers()):
            checkpoint, problem = self._verify(number)
            if checkpoint is not None:
                return checkpoint, passed
            passed.append(problem)
        return None, passed

    def prune(self, keep: int) -> None:
        """Remove all but the last `keep` finished checkpoints, and unfinished older ones."""
        numbers = self.numbers()
        finished = [n for n in numbers if self._has_manifest(n)]
        if not finished:
            return
        kept = set(finished[-keep:])
        for number in numbers:
            if number not in kept and number < finished[-1]:
                self._filesystem.delete_dir(f"{self._base}/{number:06d}")

    def _has_manifest(self, number: int) -> bool:
        info = self._filesystem.get_file_info(f"{self._base}/{number:06d}/{MANIFEST}")
        return bool(info.type == pyarrow.fs.FileType.File)

    def _verify(self, number: int) -> tuple[Checkpoint | None, str]:
        folder = f"{self._base}/{number:06d}"
        if not self._has_manifest(number):
            return None, f"checkpoint {number} was not finished"
        try:
            plain = json.loads(self._read(f"{folder}/{MANIFEST}"))
            if plain.pop("format") != FORMAT:
                return None, f"checkpoint {number} is of another format"
            files = tuple(SnapshotFile(**f) for f in plain.pop("files"))
            checkpoint = Checkpoint(**plain, files=files)
            for file in files:
                data = self._read(f"{folder}/{file.name}")
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    return None, f"checkpoint {number} is damaged: {file.name} has changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"checkpoint {number} is damaged: {error}"
        return checkpoint, ""

    def _read(self, path: str) -> bytes:
        with self._filesystem.open_input_file(path) as stream:
            return bytes(stream.read())


def slowest(files: Sequence[SnapshotFile]) -> int:
    """Version of the partition that is furthest behind."""
    return min(file.version for file in files)
