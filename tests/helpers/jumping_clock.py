"""A clock of its own for some processes: a library that is loaded before all others, made by `cc`.

It adds seconds to the time of day, as clocks that are set do. Elapsed time is the kernel's.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *fast_s;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("JUMPING_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *page = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
  if (page != MAP_FAILED) fast_s = page;
  if (file >= 0) close(file);
}

int clock_gettime(clockid_t which, struct timespec *at) {
  int failed = syscall(SYS_clock_gettime, which, at);
  if (!failed && fast_s && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
    at->tv_sec += *fast_s;
  return failed;
}

int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


class JumpingClock:
    """The time of day of all processes that have `environment`."""

    def __init__(self, folder: Path) -> None:
        """Build it in a folder; it is right at first. Skips the test if nothing can be compiled."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("a clock of its own for a process takes a C compiler (cc)")
        self._file = folder / "fast_s"
        self.jump(0)
        source, library = folder / "clock.c", folder / "clock.so"
        self._library = library
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        self.environment = {
            "JUMPING_CLOCK": str(self._file),
            "LD_PRELOAD": str(library),
            "RAY_LD_PRELOAD_ON_WORKERS": "1",  # Ray keeps it from them otherwise
        }

    def jump(self, fast_s: int) -> None:
        """From now on it is fast by so many seconds."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("@q", fast_s))

    def is_of(self, pid: int) -> bool:
        """Whether a process has this clock."""
        return str(self._library) in Path(f"/proc/{pid}/maps").read_text()
