"""Running the real command in a process of its own, and looking at what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 200.0


def start(*arguments: str | Path, log: Path, module: str = "downpour") -> subprocess.Popen[bytes]:
    """Start `downpour ...`, or another main module, with its output in `log`."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def run(*arguments: str | Path, log: Path, deadline_s: float | None = None) -> int:
    """Run `downpour ...` to its end; gives its exit status.

    Raises:
        subprocess.TimeoutExpired: it was not over at the deadline, and has been ended.
    """
    process = start(*arguments, log=log)
    try:
        return process.wait(deadline_s or DEADLINE_S)
    finally:
        end(process)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`, or an assertion error at the deadline."""
    give_up_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_s:
        value = condition()
        if value:
            return value
        time.sleep(0.05)  # how often to look, not how long to wait
    raise AssertionError(f"waited {DEADLINE_S:.0f} s for {what}")


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics so far."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def updates(run_folder: Path) -> int:
    """Updates so far."""
    return max((int(m["updates"]) for m in metrics(run_folder)), default=0)


def examples(run_folder: Path) -> int:
    """Examples so far."""
    return max((int(m["examples"]) for m in metrics(run_folder) if "examples" in m), default=0)


def result(run_folder: Path) -> dict[str, Any]:
    """What came out."""
    value: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    return value


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and command line of a process, or None where there is none."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, ValueError):
        return None
    return parent, command


def _all_processes() -> Iterator[tuple[int, int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            found = _stat(int(entry.name))
            if found is not None:
                yield int(entry.name), *found


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below `pid`, by their numbers."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for child, parent, command in _all_processes():
        parents.setdefault(parent, []).append((child, command))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child, command in parents.get(waiting.pop(), []):
            found[child] = command
            waiting.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Which of these processes still run (a zombie does not)."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.add(pid)
    return found


def kill(pid: int) -> None:
    """Kill -9."""
    os.kill(pid, signal.SIGKILL)


def folder_for_ray() -> tempfile.TemporaryDirectory[str]:
    """A folder with a short path, for Ray's sockets; its last processes may still write there."""
    return tempfile.TemporaryDirectory(prefix="dp", dir="/tmp", ignore_cleanup_errors=True)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command that a test has left running."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
