"""What makes an actor start without taking processors from those that train.

Followers and spares on one machine, and an evaluator that is replaced, are waited for by nobody.
Most of their start is PyTorch's import: more than a second of a processor. An actor with
`Unhurried` as a base has its process import this module before its class, and this module imports
PyTorch on a thread of the lowest priority. A thread's priority cannot be raised again without
rights, so it is one of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading

LOWEST = 19
"""Niceness. Ray's workers have 15."""


class Unhurried:
    """A base that comes before the actor's class."""


def import_unhurriedly(name: str) -> None:
    """Import a module at the lowest priority, if it is not there yet."""
    if name in sys.modules:
        return
    thread = threading.Thread(target=_import, args=(name,), name="imports", daemon=True)
    thread.start()
    thread.join()


def _import(name: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and hears of it
        importlib.import_module(name)


import_unhurriedly("torch")
