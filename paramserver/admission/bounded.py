"""Bounded staleness: who may begin a step, and which push is applied next, on one partition.

Stale-synchronous parallel (Ho et al. 2013) in terms of versions: nothing is applied more than
`bound` versions after it was pulled, and nothing is dropped, so whoever is fast waits. A step asks
for a permit before it pulls, and gives it back with its push. The permit bears the partition's
version when it was given. The pull that follows cannot be of an older one.

Let the partition be at version V, and v_0 <= v_1 <= ... be the versions of the permits that are
out. Applied oldest first, the push of permit r would have staleness V + r - v_r. The invariant is
that this exceeds the bound for none of them:

- A permit is given at version V while at most `bound` are out. It comes last, at r <= bound.
- Applying the oldest push takes V and every other r one step in opposite directions.
- Applying another one moves V up for those before it, so it waits until each has room for that.
- A push that says what was pulled moves v_r up; a permit that is withdrawn moves r down.

So the oldest push can be applied whenever it comes, and nothing ever has to be dropped.
"""

from __future__ import annotations

from downpour.paramserver.admission.permits import DuePush, Key, Permit, Permits, T


class BoundedPermits(Permits[T]):
    """Who may begin, and whose push is next, where staleness is bounded."""

    def __init__(self, bound: int) -> None:
        """`bound` is the most versions between pull and application."""
        super().__init__()
        self._bound = bound

    def push(self, key: Key, version: int, push: T) -> None:
        """As for all `Permits`; from now on the step counts as one on `version`."""
        super().push(key, version, push)
        self._out[key] = version

    def next(self, version: int, changed: int | None = None) -> Permit | DuePush[T] | None:
        """As for all `Permits`; `changed` does not matter."""
        if self._pushed:
            key = self._applicable(version)
            if key is not None:
                return self._turn(key)
        if self._asked and len(self._out) <= self._bound:
            return self._permit(version)
        return None

    def _applicable(self, version: int) -> Key | None:
        """Return the oldest push for which every older step has room for one more version."""
        for rank, key in enumerate(sorted(self._out, key=self._out.__getitem__)):
            if key in self._pushed:
                return key
            if version + 1 + rank - self._out[key] > self._bound:
                return None
        return None
