"""Synchronous rounds with backup workers: who may begin a step, on one partition.

Chen et al. 2016, "Revisiting distributed synchronous SGD": N + b workers compute a gradient each on
the same weights, the first N that come are averaged and applied, and those of the b backup workers
that come later are dropped. Here a worker is a slot, N is the round's `pushes` and N + b its
`steps`; what is added up is `state`'s.

A slot asks for a permit before it pulls, and gives it back with its push. Let a be the pushes that
the present round has taken and o the permits that are out and were given in it. A permit is given
while a + o < steps. So a round begins as many steps as its pushes and backups are, and one more for
each push that came to nothing (refused, a duplicate, or of a connection that is gone). Permits of
earlier rounds do not count: nobody waits for what is late.

Hence nobody waits for ever: while a < pushes and somebody waits, a + o >= steps >= pushes > a, so o
is at least 1, and whoever holds such a permit will push, or go.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from paramserver.bounded import Key, Permit, Turn
from paramserver.errors import MalformedMessage

T = TypeVar("T")


class Rounds(Generic[T]):
    """Permits that are out, asked for or given back. Used as `bounded.Admission` is."""

    def __init__(self, steps: int) -> None:
        """`steps` is the most that are begun for a round: its pushes and its backup workers."""
        self._steps = steps
        self._start = 0
        """Version of the weights of the present round."""
        self._asked: deque[Key] = deque()
        self._out: dict[Key, int] = {}
        """The start of the round in which each was given."""
        self._num_present = 0
        """Of those, how many in the present one."""
        self._pushed: deque[tuple[Key, T]] = deque()

    @property
    def num_out(self) -> int:
        """Steps in flight, late ones among them."""
        return len(self._out)

    @property
    def num_held(self) -> int:
        """Pushes that wait for their turn; none after `next` has given nothing."""
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
        if low is None or any(key == other for other, _ in self._pushed):
            raise MalformedMessage(f"a push without a permit from mailbox {key[1]}")
        if version < low:
            raise MalformedMessage(f"a push computed on version {version}, permitted at {low}")
        self._pushed.append((key, push))

    def leave(self, connection: int) -> None:
        """A connection is gone, and with it all that it has asked for, and not had applied."""
        for key in [key for key in self._out if key[0] == connection]:
            self._give_back(key)
        self._asked = deque(key for key in self._asked if key[0] != connection)
        self._pushed = deque(item for item in self._pushed if item[0][0] != connection)

    def next(self, version: int, changed: int) -> Permit | Turn[T] | None:
        """What can be done now at the partition's `version`, if anything; it counts as done.

        `changed` is the version at which its weights changed last: the present round's start.
        """
        if changed != self._start:
            self._start = changed
            self._num_present = sum(start == changed for start in self._out.values())
        if self._pushed:
            key, push = self._pushed.popleft()
            self._give_back(key)
            return Turn(key, push)
        if self._asked and version - changed + self._num_present < self._steps:
            key = self._asked.popleft()
            self._out[key] = changed
            self._num_present += 1
            return Permit(key)
        return None

    def _give_back(self, key: Key) -> None:
        self._num_present -= self._out.pop(key) == self._start
