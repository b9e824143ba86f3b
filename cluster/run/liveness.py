"""Whether a process trains a run, told from the run's folder and by no clock but the looker's.

The process that trains holds the folder's lock and beats: every `BEAT_S` the lock file's times
change. It also writes there who it is. So somebody else tells

- by the lock, wherever the filesystem has locks;
- by the process, on the machine that it runs on;
- by the beats otherwise: they move or they do not. How late or early they say that it is does not
  matter, so clocks that disagree do no harm.

Not here: the folder (`folder`), and how a run that nothing trains has ended (`monitoring.watch`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

BEAT_S = 2.0
"""Seconds between two beats."""
SILENT_S = 30.0
"""If nothing has moved for so long, nothing trains the run."""
LOCK = ".lock"
_TRIES, _RETRY_S = 10, 0.02
"""Somebody who only looks holds the lock for a moment."""

Life = Literal["lives", "died", "unknown"]


class Held(Exception):
    """Another process holds the lock."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, in words that mean the same on every machine."""

    host: str
    boot: str
    """Of the machine; another one after each start of it."""
    processes: str
    """The space that `pid` counts in: each container has one."""
    pid: int
    started: str
    """When it started, in the machine's own ticks: numbers of processes come again."""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            processes=_link("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=_started(os.getpid()),
        )

    def exists(self) -> bool | None:
        """Whether it is there; None if that cannot be told from here."""
        me = Holder.here()
        if not self.boot or (self.boot, self.processes) != (me.boot, me.processes):
            return None
        return _started(self.pid) == self.started


def decide(*, locked: bool | None, exists: bool | None, quiet_s: float | None) -> Life:
    """Return whether a process trains a run.

    Args:
        locked: whether the lock is held, as far as it is seen here.
        exists: whether the holder's process is there; None if it is on another machine.
        quiet_s: seconds, by the looker's clock, in which nothing has moved; None if something has
            moved while it looked.
    """
    if locked:
        return "lives"
    if exists is False:
        return "died"
    if exists and locked is False:  # on one machine the lock tells; a notebook outlives a run
        return "died"
    if quiet_s is None:
        return "lives"
    return "died" if quiet_s >= SILENT_S else "unknown"


class Pulse:
    """What somebody sees who looks at a run's folder again and again."""

    def __init__(
        self, folder: Path, files: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Look at a folder for the first time.

        Args:
            folder: the run's.
            files: names of files that the process that trains writes, besides the lock file.
            clock: seconds, monotonic.
        """
        self._folder = folder
        self._files = (LOCK, *files)
        self._clock = clock
        self._seen = self._look()
        self._moved_s = clock()
        self._has_moved = False

    def life(self) -> Life:
        """Return whether a process trains the run, as far as has been seen until now."""
        seen, now = self._look(), self._clock()
        if seen != self._seen:
            self._seen, self._moved_s, self._has_moved = seen, now, True
        quiet_s = now - self._moved_s
        recent = self._has_moved and quiet_s < SILENT_S
        return decide(
            locked=is_locked(self._folder),
            exists=_holder_exists(self._folder),
            quiet_s=None if recent else quiet_s,
        )

    @property
    def quiet_s(self) -> float:
        """Seconds in which nothing has moved, as far as `life` has looked."""
        return self._clock() - self._moved_s

    def holder(self) -> str:
        """The process that holds the folder, in words; "a process" if that is not known."""
        try:
            holder = Holder(**json.loads((self._folder / LOCK).read_text()))
        except (OSError, ValueError, TypeError):
            return "a process"
        return f"process {holder.pid} on {holder.host}"

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_times(self._folder / name) for name in self._files)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, and beat.

    Raises:
        Held: another process holds it.
        OSError: the folder cannot be written.
    """
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(fd)
        text = json.dumps(asdict(Holder.here())).encode()
        with contextlib.suppress(OSError):  # a full disk
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))
        over = threading.Event()
        beating = threading.Thread(target=_beat, args=(fd, over), name="beat", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
    finally:
        os.close(fd)


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the lock of a folder; None if that cannot be told."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a filesystem without locks
        return None
    finally:
        os.close(fd)
    return False


def _take(fd: int) -> None:
    for attempt in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 == _TRIES:
                raise Held from None
            time.sleep(_RETRY_S)
        except OSError:  # a filesystem without locks: nobody is kept out
            return
        else:
            return


def _beat(fd: int, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(fd)


def _holder_exists(folder: Path) -> bool | None:
    """As `Holder.exists`; False if nobody has ever held the folder."""
    try:
        return Holder(**json.loads((folder / LOCK).read_text())).exists()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):
        return None


def _times(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file is written. Opening it has network disks ask their server."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _started(pid: int) -> str:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
