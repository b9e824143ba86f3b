"""Actors whose process ends when its raylet ends, and that say why they do not start.

When a driver is killed, its raylet ends at once, but Ray's workers may take a minute to notice.
Every actor's process imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from downpour.cluster.ray_backend.orphans import Attendance, end_as_orphan

PR_SET_PDEATHSIG = 1


def ending_with_parent(actor: type, *first: type, driver: str | None = None) -> type:
    """A class like `actor`, under the same name, whose process ends with its parent.

    The classes in `first` are bases, too, whose modules its process imports before the actor's.
    With `driver` it ends by itself, too, once that driver is gone and no other has come (`attend`).

    Its constructor never raises: Ray would say of such an actor no more than that it died. Each
    call raises what kept it from starting instead.
    """

    class EndingWithParent(*first, actor):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            end_with_parent()
            if driver is not None:
                self._attendance = Attendance(driver)
                end_as_orphan(self._attendance)
            self._kept_from_starting: Exception | None = None
            try:
                super().__init__(*arguments)
            except Exception as error:
                self._kept_from_starting = _told(actor, error)

        def __repr__(self) -> str:
            return actor.__name__ if self._kept_from_starting else str(super().__repr__())

        def attend(self, driver: str) -> None:
            """Work for another driver from now on: the one before is gone."""
            self._attendance.driver = driver

    for name in dir(actor):
        method = getattr(actor, name)
        if callable(method) and not name.startswith("_"):
            setattr(EndingWithParent, name, _guarded(method))
    EndingWithParent.__name__ = EndingWithParent.__qualname__ = actor.__name__
    return EndingWithParent


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self._kept_from_starting is not None:
            raise self._kept_from_starting
        return method(self, *arguments, **keywords)

    return call


def _told(actor: type, error: Exception) -> Exception:
    """What to tell of an error in a constructor: the user's own with its file and line."""
    from downpour.cluster.controller.protocol.backend import RunFailed
    from downpour.cluster.errors import user_message
    from downpour.models.lookup import place_of

    place = place_of(error)
    if user_message(error) is not None or place is None:
        return error
    return RunFailed(f"{type(error).__name__}: {error} ({place}), where {actor.__name__} starts")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. Linux only."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:  # the parent died before this
            os._exit(1)
