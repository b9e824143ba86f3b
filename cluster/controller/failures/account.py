"""The account of failures: what is decided about each is told, and how long members are missing.

Also when reserves (spares, followers) are to be made again. The decisions are the policy's
(`policy`). Bringing a member back is up to the part that looks after its kind.
"""

from __future__ import annotations

from downpour.cluster.controller.failures.policy import Failure, FailurePolicy, Recovery
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.controller.protocol.instructions import Instruction, Tell

SPARES_AFTER_S = 5.0
"""A spare's start takes a second of a processor: it waits until those that are back get going."""


class GaveUp(Exception):
    """The run is given up: `error` says what to do."""

    def __init__(self, error: Exception, cause: Exception | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.cause = cause


class Failures:
    """The failures of one session of a run."""

    def __init__(self, policy: FailurePolicy, *, run: str, out: list[Instruction]) -> None:
        """Nothing has failed. `run` is the path of the run's folder, for messages."""
        self.policy = policy
        self._run = run
        self._out = out
        self.weak_since_s: float | None = None
        """When the first failed of the members that are not back yet."""
        self.reserves_due_s: float | None = None
        """When reserves are to be made."""

    def recover(
        self,
        failure: Failure,
        now: float,
        *,
        error: Exception | None = None,
        followed: bool = False,
    ) -> Recovery:
        """Decide what is done about a failure, tell it, and return it.

        Args:
            failure: what failed, and how.
            now: seconds by the run's clock.
            error: what the run's failure is caused by, if it is given up.
            followed: a follower can take the member's place.

        Raises:
            GaveUp: the policy gives the run up.
        """
        recovery = self.policy.decide(failure, now, followed=followed)
        self._out.append(Tell(text=recovery.reason))
        if failure.part in ("replicas", "partition") and self.weak_since_s is None:
            self.weak_since_s = now
        if recovery.action == "give up":
            raise self.given_up(recovery.reason, error)
        in_full = self.weak_since_s is None
        if failure.part == "follower" and recovery.action == "restart" and in_full:
            self.reserve_soon(now)
        return recovery

    def given_up(self, reason: str, cause: Exception | None) -> GaveUp:
        """Return what ends the run for a reason, with what to do about it."""
        hint = f"see the logs, then go on with `downpour resume {self._run}`"
        return GaveUp(RunFailed(f"{reason}: {hint}"), cause)

    def all_back(self, now: float, *, but_for_some: bool) -> None:
        """No member is missing, or only some that are not to come yet: tell it, if one was."""
        if self.weak_since_s is None:
            return
        took_s = now - self.weak_since_s
        self.weak_since_s = None
        self.reserve_soon(now)
        if not but_for_some:
            self._out.append(Tell(text=f"everybody is back after {took_s:.1f} s"))

    def reserve_soon(self, now: float) -> None:
        """Have reserves made once the members that have just come have got going."""
        self.reserves_due_s = now + SPARES_AFTER_S

    def take_reserves_due(self, now: float) -> bool:
        """Return whether reserves are to be made now; True once."""
        due = self.reserves_due_s is not None and now >= self.reserves_due_s
        if due:
            self.reserves_due_s = None
        return due


def detail_of(error: Exception) -> str:
    """Return the kind and the last line of an error, whose text may be a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
