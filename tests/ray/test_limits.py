"""Real runs at the limits of a machine: each goes on, with a line about what is missing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour.benchmarks import hangs
from downpour.benchmarks.processes import alone
from downpour.cluster.monitoring.plots import read_metrics
from downpour.cluster.run.checkpoint import CheckpointStore
from downpour.cluster.run.folder import RunFolder
from tests.helpers import commands
from tests.helpers.small_run import SMALL, check_result

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(400)]
TRAIN = ("train", "mnist-bn", "--name", "a", "--no-dashboard", *SMALL)
BLKIO = Path("/sys/fs/cgroup/blkio")
BYTES_PER_S = 200_000
STOPPED_S = 12.0


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No process is left behind, however a test ends."""
    with alone():
        yield


def mounted(place: Path, *options: str, what: str = "tmpfs") -> contextlib.ExitStack:
    """Mount a file system until the stack is closed; skips the test if that is not allowed."""
    place.mkdir(exist_ok=True)
    command = ["mount", *options, what, str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here: that takes root")
    stack = contextlib.ExitStack()
    stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
    return stack


def text_of(log: Path) -> str:
    """What a run has said, without line breaks; nothing that it says may be a traceback."""
    text = re.sub(r"\s+", " ", log.read_text())
    assert "Traceback" not in text, text
    return text


def start(*arguments: str | Path, log: Path, within: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Start `downpour ...` by a command that sets the limits first."""
    words = [*within, sys.executable, "-m", "downpour", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as output:
        return subprocess.Popen(
            words,
            cwd=commands.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def test_a_small_shared_memory_and_few_open_files(tmp_path: Path) -> None:
    apart = ("unshare", "--mount", "--propagation", "private")
    can = subprocess.run([*apart, "true"], capture_output=True, check=False).returncode == 0
    if os.geteuid() != 0 or not can:
        pytest.skip("a /dev/shm of its own takes root")
    log = tmp_path / "log"
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm; ulimit -n 256; exec "$@"'
    process = start(
        *(*TRAIN, "--runs", tmp_path, "--epochs", "2"),
        log=log,
        within=(*apart, "bash", "-ec", script, "bash"),
    )
    assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    check_result(commands.result(tmp_path / "a"), epochs=2)
    assert "/dev/shm has 67 MB free" in text_of(log)


def test_a_run_folder_that_is_full_until_somebody_makes_room(tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    with mounted(runs, "-t", "tmpfs", "-o", "size=400k"):
        process = start(
            *(*TRAIN, "--runs", runs, "--epochs", "3", "--evaluate-every-s", "1"),
            *("--checkpoint-every-s", "1"),
            log=log,
            within=(),
        )
        try:
            commands.wait_for(
                lambda: "last weights could not be written" in text_of(log) or process.poll(),
                "a line about the last weights",
            )
            assert process.poll() is None, log.read_text()
            subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
            assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
        finally:
            process.kill()
        run = runs / "a"
        result = commands.result(run)
        check_result(result, epochs=3)
        assert result["process_restarts"] == 0, "nobody is to blame for a full disk"
        assert read_metrics(run / "metrics.jsonl")
        assert (run / "report.html").exists()
        assert (run / "model.safetensors").exists()
    assert "a checkpoint could not be written" in text_of(log)


def test_nobody_is_blamed_if_all_processes_are_stopped_for_a_while(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "a"
    process = start(
        *(*TRAIN, "--runs", tmp_path, "--epochs", "12", "--hang-after-s", "8"), log=log, within=()
    )
    try:
        commands.wait_for(lambda: commands.updates(run) > 500, "updates")
        stopped = [process.pid, *commands.descendants(process.pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(STOPPED_S)  # for how long they are stopped
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
        assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
    finally:
        process.kill()
    check_result(commands.result(run), epochs=12)
    said = text_of(log)
    assert "the driver stood still for 1" in said
    assert "does not answer" not in said


def test_a_slow_disk(tmp_path: Path) -> None:
    """An ext4 on a loop device that takes 200 KB a second, a third of a checkpoint."""
    runs, log, device = tmp_path / "runs", tmp_path / "log", tmp_path / "device"
    throttle = "blkio.throttle.write_bps_device"
    if not (BLKIO / throttle).exists() or not os.access(BLKIO, os.W_OK):
        pytest.skip("this kernel has no cgroup that slows a disk down, or it takes root")
    device.write_bytes(b"")
    os.truncate(device, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
    with mounted(runs, "-o", "loop", what=str(device)):
        about = os.stat(runs).st_dev
        group = BLKIO / f"downpour-test-{os.getpid()}"
        group.mkdir()
        try:
            limit = f"{os.major(about)}:{os.minor(about)} {BYTES_PER_S}"
            (group / throttle).write_text(limit)
            inside = ("bash", "-ec", f'echo $$ > {group}/cgroup.procs; exec "$@"', "bash")
            began_s = time.monotonic()
            tried = ("dd", "if=/dev/zero", f"of={runs}/tried", "bs=100k", "count=6", "conv=fsync")
            subprocess.run([*inside, *tried], check=True, capture_output=True)
            if time.monotonic() - began_s < 1.0:
                pytest.skip("this kernel does not slow down what is written by a cgroup's limit")
            (runs / "tried").unlink()
            process = start(
                *(*TRAIN, "--runs", runs, "--epochs", "3", "--checkpoint-every-s", "1"),
                log=log,
                within=inside,
            )
            try:
                assert process.wait(commands.DEADLINE_S) == 0, log.read_text()
            finally:
                process.kill()
            check_result(commands.result(runs / "a"), epochs=3)
            store = CheckpointStore(RunFolder.open(runs / "a").checkpoints_uri)
            newest, passed = store.latest()
            assert newest is not None, passed
            assert passed == []
            text_of(log)
        finally:
            commands.wait_for(lambda: not (group / "cgroup.procs").read_text(), "its processes")
            group.rmdir()


def test_members_of_every_kind_hang_for_good_and_the_run_ends_by_itself() -> None:
    said: list[str] = []
    kinds = ("replicas", "partition", "shuffler", "partition", "replicas", "evaluator")
    found = hangs.hung(
        len(kinds),
        20,
        ["--hot-standby", *SMALL],
        seed=3,
        say=said.append,
        kinds=kinds,
        together=1.0,
    )
    assert found.hangs.total() >= 2, said  # the run may be over before all have
    assert found.hangs.total() == len(found.ended_after_s) + found.at_the_end, found
    assert found.told, found
    assert found.accuracy > 0.9
