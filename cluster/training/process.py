"""The process that trains: how old it is, and what its signals ask for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def stop_on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT ask for an end; a second one ends the process at once.

    Python handles signals in the main thread only: in any other thread this changes nothing.

    Args:
        ask: gets the signal's name.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in names}

    def handle(number: int, _: Any) -> None:
        ask(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in names:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_age_s() -> float:
    """Seconds since this process started; 0 if the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
