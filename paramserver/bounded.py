"""Bounded staleness: who may begin a step, and which push is applied next, on one partition.

Stale-synchronous parallel in terms of versions: nothing is applied more than `bound` versions after
it was pulled, and nothing is dropped, so whoever is fast waits. A slot asks for a permit before it
pulls, and gives it back with its push. The permit bears the partition's version when it was given,
below which the pull that follows cannot lie.

Let the partition be at version V, and v_0 <= v_1 <= ... be the versions of the permits that are
out. Applied oldest first, the push of permit r would have staleness V + r - v_r. The invariant is
that this exceeds the bound for none of them:

- A permit is given at version V while at most `bound` are out. It comes last, at r <= bound.
- Applying the oldest push takes V and every other r one step in opposite directions.
- Applying another one moves V up for those before it, so it waits until each has room for that.
- A push says what was pulled, a permit is withdrawn: versions go up, or r goes down.

So the oldest push can be applied whenever it comes, and nothing has ever to be dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from paramserver.errors import MalformedMessage

Key = tuple[int, int]
"""A connection's descriptor and a mailbox of it: one step in flight."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Permit:
    """A step that may now begin: its weights are to be pulled."""

    key: Key


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """A push that is now to be applied."""

    key: Key
    push: T


class Admission(Generic[T]):
    """Permits that are out, asked for or given back. `T` is a push with whatever belongs to it."""

    def __init__(self, bound: int) -> None:
        """`bound` is the most versions between pull and application."""
        self._bound = bound
        self._asked: deque[Key] = deque()
        self._out: dict[Key, int] = {}
        """The lowest version that the step can have pulled."""
        self._pushed: dict[Key, T] = {}

    @property
    def num_out(self) -> int:
        """Steps in flight."""
        return len(self._out)

    @property
    def num_held(self) -> int:
        """Pushes that wait for their turn."""
        return len(self._pushed)

    def ask(self, key: Key) -> None:
        """A step wants to begin. Raises `MalformedMessage` where it has asked already."""
        if key in self._out or key in self._asked:
            raise MalformedMessage(f"a second permit is asked for mailbox {key[1]}")
        self._asked.append(key)

    def push(self, key: Key, version: int, push: T) -> None:
        """A step has ended that was computed on `version`. Raises `MalformedMessage` for one
        without a permit, or on weights older than that.
        """
        low = self._out.get(key)
        if low is None or key in self._pushed:
            raise MalformedMessage(f"a push without a permit from mailbox {key[1]}")
        if version < low:
            raise MalformedMessage(f"a push computed on version {version}, permitted at {low}")
        self._out[key] = version
        self._pushed[key] = push

    def leave(self, connection: int) -> None:
        """A connection is gone, and with it all that it has asked for, and not had applied."""
        for key in [key for key in self._out if key[0] == connection]:
            del self._out[key]
            self._pushed.pop(key, None)
        self._asked = deque(key for key in self._asked if key[0] != connection)

    def next(self, version: int, changed: int | None = None) -> Permit | Turn[T] | None:
        """What can be done now at the partition's `version`, if anything; it counts as done.

        When the weights `changed` last matters to `rounds.Rounds` only.
        """
        if self._pushed:
            key = self._applicable(version)
            if key is not None:
                del self._out[key]
                return Turn(key, self._pushed.pop(key))
        if self._asked and len(self._out) <= self._bound:
            key = self._asked.popleft()
            self._out[key] = version
            return Permit(key)
        return None

    def _applicable(self, version: int) -> Key | None:
        """The oldest push, if every older step has room for one more version before it."""
        for rank, key in enumerate(sorted(self._out, key=self._out.__getitem__)):
            if key in self._pushed:
                return key
            if version + 1 + rank - self._out[key] > self._bound:
                return None
        return None
