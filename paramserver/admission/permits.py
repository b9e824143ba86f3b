"""Permits to begin a step, on one partition: asked for, out, and given back with a push.

A step asks for a permit before it pulls, and gives it back with its push. Here is what all policies
share. `bounded` and `rounds` decide when a permit is given and which push is applied next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from downpour.paramserver.errors import MalformedMessage

Key = tuple[int, int]
"""A connection's descriptor and a mailbox of it: one step in flight."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Permit:
    """A step that may now begin: its weights are to be pulled."""

    key: Key


@dataclass(frozen=True, slots=True)
class DuePush(Generic[T]):
    """A push that is now to be applied."""

    key: Key
    push: T


class Permits(ABC, Generic[T]):
    """Permits of one partition. `T` is a push with whatever belongs to it."""

    def __init__(self) -> None:
        """None yet."""
        self._asked: deque[Key] = deque()
        self._out: dict[Key, int] = {}
        """The lowest version that each step can have pulled."""
        self._pushed: dict[Key, T] = {}
        """In the order in which they came."""

    @property
    def num_out(self) -> int:
        """Steps in flight."""
        return len(self._out)

    @property
    def num_held(self) -> int:
        """Pushes that wait for their turn."""
        return len(self._pushed)

    def ask(self, key: Key) -> None:
        """Note that a step wants to begin.

        Raises:
            MalformedMessage: It has asked already.
        """
        if key in self._out or key in self._asked:
            raise MalformedMessage(f"a second permit is asked for mailbox {key[1]}")
        self._asked.append(key)

    def push(self, key: Key, version: int, push: T) -> None:
        """Note that a step has ended, which was computed on `version`.

        Raises:
            MalformedMessage: It has no permit, or its weights are older than its permit.
        """
        low = self._out.get(key)
        if low is None or key in self._pushed:
            raise MalformedMessage(f"a push without a permit from mailbox {key[1]}")
        if version < low:
            raise MalformedMessage(f"a push computed on version {version}, permitted at {low}")
        self._pushed[key] = push

    def leave(self, connection: int) -> None:
        """Forget a connection that is gone: its requests, its permits and its pending pushes."""
        for key in [key for key in self._out if key[0] == connection]:
            self._take_back(key)
            self._pushed.pop(key, None)
        self._asked = deque(key for key in self._asked if key[0] != connection)

    @abstractmethod
    def next(self, version: int, changed: int) -> Permit | DuePush[T] | None:
        """Return what can be done now, which counts as done; None if there is nothing.

        Args:
            version: The partition's version.
            changed: The version at which its weights changed last.
        """

    def _permit(self, version: int) -> Permit:
        """Let whoever asked first begin, on weights that are no older than `version`."""
        key = self._asked.popleft()
        self._out[key] = version
        return Permit(key)

    def _turn(self, key: Key) -> DuePush[T]:
        self._take_back(key)
        return DuePush(key, self._pushed.pop(key))

    def _take_back(self, key: Key) -> int:
        """Take a permit back; returns what `_out` had."""
        return self._out.pop(key)
