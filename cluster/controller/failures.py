"""The account of losses: what `recovery` decides about each is told of, and counted.

Also since when members are missing, and when what is held in reserve (spares, followers) is to be
made again. Bringing a member back is the business of whoever looks after its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from downpour.cluster.controller.backend import RunFailed
from downpour.cluster.controller.failure_policy import Action, Cause, History, Loss, Part, decide
from downpour.cluster.run.folder import RunFolder

SPARES_AFTER_S = 5.0
"""A spare's start takes a second of a processor: not while those who are back get going."""


class Losses:
    """Those of one session of a run."""

    def __init__(
        self,
        *,
        max_restarts: int,
        folder: RunFolder,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """None yet. `max_restarts` is for each kind of member; `tell` has a line of news."""
        self._max_restarts = max_restarts
        self._folder = folder
        self._tell = tell
        self._clock = clock
        self._history = History()
        self._weak_since_s: float | None = None
        """When the first was lost of the members that are not back yet."""
        self._reserves_due_s: float | None = None

    @property
    def restarts(self) -> Counter[Part]:
        """Members that were replaced, by kind."""
        return self._history.restarts

    def progressed(self, part: Part, index: int = 0) -> None:
        """A member has done what it is there for."""
        self._history.progressed(part, index)

    def recover(
        self,
        part: Part,
        index: int,
        name: str,
        cause: Cause,
        *,
        detail: str = "",
        error: Exception | None = None,
        followed: bool = False,
    ) -> Action:
        """Decide what is done about a loss, and tell of it.

        Of a member that has failed, `error` says by what; see `recovery` for the rest. Raises
        `RunFailed` where the run is given up.
        """
        if error is not None:
            detail = f"{type(error).__name__}: {_last_line(error)}"
        loss = Loss(part=part, index=index, name=name, cause=cause, detail=detail)
        recovery = decide(loss, self._history, max_restarts=self._max_restarts, followed=followed)
        self._tell(recovery.reason)
        if part in ("replicas", "partition") and self._weak_since_s is None:
            self._weak_since_s = self._clock()
        if recovery.action == "give up":
            raise RunFailed(
                f"{recovery.reason}: see the logs, then go on with `downpour resume "
                f"{self._folder.path}`"
            ) from error
        if part == "follower" and recovery.action == "restart" and self._weak_since_s is None:
            self.reserve_soon()
        return recovery.action

    def whole(self) -> None:
        """Nobody is missing: tell of it, if somebody was."""
        if self._weak_since_s is None:
            return
        took_s = self._clock() - self._weak_since_s
        self._weak_since_s = None
        self.reserve_soon()
        self._tell(f"everybody is back after {took_s:.1f} s")

    def reserve_soon(self) -> None:
        """Have reserves made once those who have just come have got going."""
        self._reserves_due_s = self._clock() + SPARES_AFTER_S

    def take_reserves_due(self) -> bool:
        """Whether reserves are to be made now; says so once."""
        due = self._reserves_due_s is not None and self._clock() >= self._reserves_due_s
        if due:
            self._reserves_due_s = None
        return due


def _last_line(error: Exception) -> str:
    """The end of an error's text, which of one that comes from afar is a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
