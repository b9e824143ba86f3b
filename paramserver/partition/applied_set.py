"""The applied set: which mini-batches a partition has settled. Exactly-once rests on it.

A mini-batch is named (epoch, index). Each is *waiting*, *applied* or *refused*: noted but not
applied, because its loss or its gradient was not finite. An epoch in progress costs one byte for
each mini-batch. A complete epoch costs its number and its refusals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

WAITING, APPLIED, REFUSED = 0, 1, 2


class AppliedSet:
    """What became of each mini-batch of each epoch on one partition."""

    def __init__(self, num_batches: int) -> None:
        """An empty set over epochs of `num_batches` mini-batches."""
        self.num_batches = num_batches
        self.num_applied = 0
        self.num_refused = 0
        self._open: dict[int, bytearray] = {}
        self._waiting: dict[int, int] = {}
        self._complete: dict[int, frozenset[int]] = {}

    def valid(self, epoch: int, batches: Iterable[int]) -> bool:
        """Whether these name mini-batches."""
        return epoch >= 0 and all(0 <= b < self.num_batches for b in batches)

    def get(self, epoch: int, batch: int) -> int:
        """Return what became of a mini-batch: `WAITING`, `APPLIED` or `REFUSED`."""
        if epoch in self._complete:
            return REFUSED if batch in self._complete[epoch] else APPLIED
        flags = self._open.get(epoch)
        return WAITING if flags is None else flags[batch]

    def add(self, epoch: int, batch: int, outcome: int) -> None:
        """Settle a waiting mini-batch as `APPLIED` or `REFUSED`; it can be settled only once."""
        flags = self._open.get(epoch)
        if flags is None:
            assert epoch not in self._complete, f"epoch {epoch} is complete"
            flags = self._open[epoch] = bytearray(self.num_batches)
            self._waiting[epoch] = self.num_batches
        assert flags[batch] == WAITING, f"mini-batch ({epoch}, {batch}) was settled before"
        flags[batch] = outcome
        if outcome == APPLIED:
            self.num_applied += 1
        else:
            self.num_refused += 1
        self._waiting[epoch] -= 1
        if not self._waiting[epoch]:
            self._complete[epoch] = frozenset(i for i, f in enumerate(flags) if f == REFUSED)
            del self._open[epoch], self._waiting[epoch]

    def flags(self, epoch: int) -> npt.NDArray[np.uint8]:
        """Return what became of every mini-batch of an epoch: uint8 [num_batches], a copy."""
        if epoch in self._complete:
            flags = np.full(self.num_batches, APPLIED, np.uint8)
            flags[list(self._complete[epoch])] = REFUSED
            return flags
        held = self._open.get(epoch)
        if held is None:
            return np.zeros(self.num_batches, np.uint8)
        return np.frombuffer(bytes(held), np.uint8).copy()

    @property
    def open_epochs(self) -> tuple[int, ...]:
        """Epochs with some, not all, mini-batches settled."""
        return tuple(sorted(self._open))

    @property
    def complete_epochs(self) -> tuple[int, ...]:
        """Epochs with every mini-batch settled."""
        return tuple(sorted(self._complete))

    def dump(self) -> tuple[dict[str, object], dict[int, npt.NDArray[np.uint8]]]:
        """Return what `load` takes.

        Returns:
            Plain metadata, and by open epoch its flags, uint8 [num_batches].
        """
        meta: dict[str, object] = {
            "num_batches": self.num_batches,
            "complete": {str(e): sorted(r) for e, r in sorted(self._complete.items())},
        }
        return meta, {epoch: self.flags(epoch) for epoch in self.open_epochs}

    @classmethod
    def load(
        cls, meta: Mapping[str, object], open_flags: Mapping[int, npt.NDArray[np.uint8]]
    ) -> AppliedSet:
        """Return the set that `dump` described.

        Args:
            meta: The metadata.
            open_flags: By open epoch, its flags, uint8 [num_batches].

        Raises:
            LookupError, TypeError, ValueError, AssertionError: No `dump` gave this.
        """
        new = cls(int(meta["num_batches"]))  # type: ignore[call-overload]
        complete: Mapping[str, list[int]] = meta["complete"]  # type: ignore[assignment]
        for number, refused in complete.items():
            new._complete[int(number)] = frozenset(refused)
            new.num_refused += len(refused)
            new.num_applied += new.num_batches - len(refused)
        for epoch, flags in open_flags.items():
            new._open[epoch] = bytearray(flags.tobytes())
            new._waiting[epoch] = int((flags == WAITING).sum())
            new.num_applied += int((flags == APPLIED).sum())
            new.num_refused += int((flags == REFUSED).sum())
        new.check()
        return new

    def check(self) -> None:
        """Assert the invariants."""
        assert not set(self._open) & set(self._complete)
        applied = sum(f.count(APPLIED) for f in self._open.values())
        refused = sum(f.count(REFUSED) for f in self._open.values())
        for epoch, flags in self._open.items():
            assert len(flags) == self.num_batches
            assert 0 < self._waiting[epoch] == flags.count(WAITING) < self.num_batches
            assert max(flags) <= REFUSED
        for gone in self._complete.values():
            assert all(0 <= batch < self.num_batches for batch in gone)
            refused += len(gone)
            applied += self.num_batches - len(gone)
        assert (applied, refused) == (self.num_applied, self.num_refused)
