"""Processes of a benchmark: started one after the other, watched, and none left behind.

Everything that a benchmark times runs in children of its own. Not here: what they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from downpour.cluster.config.paths import ROOT
from downpour.cluster.errors import UserError

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
GRACE_S = 10.0
"""How long those who are left are given to end by themselves: Ray's daemons do."""
FAILED_GRACE_S = 2.0
"""The same after a failure or an interrupt."""


class BenchmarkFailed(UserError):
    """A benchmark could not be run to its end. The message says which, and where its output is."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as the system shows it."""

    pid: int
    command: str
    cpu_s: float
    """Processor time that it has used, its own threads' only."""


def _stat(pid: int) -> tuple[str, int, float] | None:
    """State, parent and processor seconds; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def descendants(pid: int) -> dict[int, Process]:
    """All processes below `pid`, zombies included, by their numbers."""
    children: dict[int, list[tuple[int, float]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            children.setdefault(stat[1], []).append((int(entry), stat[2]))
    found: dict[int, Process] = {}
    waiting = [pid]
    while waiting:
        for child, cpu_s in children.get(waiting.pop(), []):
            found[child] = Process(pid=child, command=_command(child), cpu_s=cpu_s)
            waiting.append(child)
    return found


def die_with_parent() -> None:
    """Have the kernel end this process once the one that started it is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """On leaving, however that happens, every process that was started inside is gone.

    Orphans, such as the daemons of a Ray whose driver was killed, become children of this process
    for as long, and SIGTERM ends it as an interrupt would.
    """
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = set(descendants(os.getpid()))

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        end_all_but(before)
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def end_all_but(known: set[int], grace_s: float = GRACE_S) -> None:
    """Wait for every descendant that is not in `known` to end, and kill those that do not."""
    give_up_s = time.monotonic() + grace_s
    killed = False
    while left := _strangers(known):
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > give_up_s:
            if killed:
                return  # a process that outlives SIGKILL waits for the kernel
            killed, give_up_s = True, time.monotonic() + grace_s
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _strangers(known: set[int]) -> set[int]:
    # Python's own tracker of what its processes share lives as long as this process, and no longer.
    found = descendants(os.getpid()).values()
    return {p.pid for p in found if "multiprocessing.resource_tracker" not in p.command} - known


class Child:
    """One child of a benchmark, and all that it starts; a context manager that ends them."""

    def __init__(self, what: str, arguments: Sequence[str | Path]) -> None:
        """Start `python ARGUMENTS` from the root. `what` names it in messages."""
        self.what = what
        self._before = set(descendants(os.getpid()))
        handle, name = tempfile.mkstemp(prefix="downpour-bench-", suffix=".log")
        self.log = Path(name)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {
            # As the command does it; and workers have to find `benchmarks.models`.
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(ROOT), environment.get("PYTHONPATH", "")))
            ),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "TP_SOCKET_IFNAME": "lo",
        }
        try:
            # This process has no threads that a fork could leave in the middle of something.
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                preexec_fn=die_with_parent,  # noqa: PLW1509
                start_new_session=True,  # an interrupt reaches us alone, and we end it in order
            )
        finally:
            os.close(handle)

    def __enter__(self) -> Self:
        """The child runs."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End what still runs; keep the log only of a failure."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        end_all_but(self._before, GRACE_S if exc_type is None else FAILED_GRACE_S)
        if not isinstance(exc, BenchmarkFailed):
            self.log.unlink(missing_ok=True)

    def wait(self, deadline_s: float) -> None:
        """Wait for a good end; `BenchmarkFailed` for another one, or none before the deadline."""
        if self.end(deadline_s) != 0:
            raise self.failed()

    def end(self, deadline_s: float) -> int:
        """Wait for any end, and return the status; `BenchmarkFailed` at the deadline."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkFailed(
                f"{self.what} has not ended for {deadline_s:.0f} s: see {self.log}, and try again "
                "on a machine that is less busy"
            ) from None

    def failed(self) -> BenchmarkFailed:
        """What to raise where the child has ended, and should not have."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "no output")
        return BenchmarkFailed(
            f"{self.what} ended with status {self.process.returncode} ({last[:200]}): "
            f"see {self.log}"
        )


def measure_in_child(
    what: str, module: str, setup: Mapping[str, Any], deadline_s: float
) -> dict[str, Any]:
    """Run `python -m MODULE SETUP RESULT`, whose main is `baselines.common.child_main`."""
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        result = Path(folder) / "result.json"
        with Child(what, ["-m", module, json.dumps(dict(setup)), result]) as child:
            child.wait(deadline_s)
            if not result.exists():
                raise child.failed()
        value: dict[str, Any] = json.loads(result.read_text())
        return value
