"""Synchronous rounds with backup workers: who may begin a step, on one partition.

Chen et al. 2016, "Revisiting distributed synchronous SGD": N + b workers compute a gradient each on
the same weights, the first N that come are averaged and applied, and those of the b backup workers
that come later are dropped. Here a worker is a concurrent step, N is the round's `pushes` and N + b
its `steps`. What is added up is `combiner`'s.

A step asks for a permit before it pulls, and gives it back with its push. Let a be the pushes that
the present round has taken and o the permits that are out and were given in it. A permit is given
while a + o < steps. So a round begins as many steps as its pushes and backups are, and one more for
each push that came to nothing (refused, a duplicate, or of a connection that is gone). Permits of
earlier rounds do not count: nobody waits for what is late.

Hence nobody waits for ever: while a < pushes and somebody waits, a + o >= steps >= pushes > a, so o
is at least 1, and whoever holds such a permit will push, or go.
"""

from __future__ import annotations

from downpour.paramserver.admission.permits import DuePush, Key, Permit, Permits, T


class RoundPermits(Permits[T]):
    """Who may begin, and whose push is next, where gradients are applied in rounds.

    Permits bear the start of the round in which they were given.
    """

    def __init__(self, steps: int) -> None:
        """`steps` is the most that are begun for a round: its pushes and its backup workers."""
        super().__init__()
        self._steps = steps
        self._start = 0
        """Version of the weights of the present round."""
        self._num_present = 0
        """Permits that are out and were given in it."""

    def next(self, version: int, changed: int) -> Permit | DuePush[T] | None:
        """As for all `Permits`; `changed` is the present round's start.

        Once this returns None, no push is pending.
        """
        if changed != self._start:
            self._start = changed
            self._num_present = sum(start == changed for start in self._out.values())
        if self._pushed:
            return self._turn(next(iter(self._pushed)))
        if self._asked and version - changed + self._num_present < self._steps:
            self._num_present += 1
            return self._permit(changed)
        return None

    def _take_back(self, key: Key) -> int:
        start = super()._take_back(key)
        self._num_present -= start == self._start
        return start
