"""Power failures: what had been finished is whole when the disk is mounted again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RESULT, RunFolder
from downpour.paramserver import durable
from tests.helpers import tiny
from tests.helpers.checkpoint_deaths import write

DISK_BYTES = 16 << 20


class Disk:
    """An ext4 file system on a loop device, whose power can fail."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._device = place / "device"
        self._device.write_bytes(b"")
        os.truncate(self._device, DISK_BYTES)
        self._mounted: list[Path] = []
        _run("mkfs.ext4", "-q", "-F", str(self._device))

    def mount(self, device: Path | None = None) -> Path:
        """Mount it, or what was left of it."""
        root = self._place / f"mounted-{len(self._mounted)}"
        root.mkdir()
        # Nothing is written back by the passing of time while the test runs.
        _run("mount", "-o", "loop,commit=300", str(device or self._device), str(root))
        self._mounted.append(root)
        return root

    def lose_power(self) -> Path:
        """Mount what has reached the device by now, and nothing of what the kernel still has."""
        left = self._place / f"left-{len(self._mounted)}"
        shutil.copyfile(self._device, left)
        return self.mount(left)

    def close(self) -> None:
        """Unmount everything."""
        for root in self._mounted:
            _run("umount", str(root))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of its own, if this machine lets us have one."""
    if os.geteuid() != 0:
        pytest.skip("a disk of its own takes root, for a loop device and its mount")
    try:
        made = Disk(tmp_path)
        made.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ext4 on a loop device can be mounted here: {error}")
    yield made
    made.close()


def test_what_was_written_without_a_sync_is_lost_on_this_disk(tmp_path: Path, disk: Disk) -> None:
    """The oracle of this file: its power failures do lose what nobody synced."""
    (tmp_path / "mounted-0" / "a").write_text("a")
    left = disk.lose_power() / "a"
    assert not left.exists() or left.read_text() == ""


def test_the_newest_checkpoint_is_whole_after_a_power_failure(tmp_path: Path, disk: Disk) -> None:
    store = CheckpointStore((tmp_path / "mounted-0" / "run" / "checkpoints").as_uri())
    for number in range(1, 5):
        write(store, number, store._filesystem)
        store.prune(keep_last=2)
    write(store, 5, store._filesystem)
    left = disk.lose_power()
    after = CheckpointStore((left / "run" / "checkpoints").as_uri())
    newest, passed = after.latest()
    assert newest is not None, passed
    assert (newest.number, passed) == (5, [])
    # The older ones may be gone, or not yet; what is there of one that is kept is whole.
    assert {3, 4, 5} <= set(after.numbers())


def test_files_that_are_replaced_are_the_old_or_the_new(tmp_path: Path, disk: Disk) -> None:
    root = tmp_path / "mounted-0"
    folder = RunFolder.create(root / "runs" / "a", tiny.config("nowhere"))
    folder.write_json(RESULT, {"accuracy": 0.5})
    with durable.replacing(root / "best.safetensors") as partial:
        Path(partial).write_bytes(bytes(1 << 20))
    left = disk.lose_power()
    after = RunFolder.open(left / "runs" / "a")
    assert after.config() == folder.config()
    assert after.read_json(RESULT) == {"accuracy": 0.5}
    assert (left / "best.safetensors").read_bytes() == bytes(1 << 20)
