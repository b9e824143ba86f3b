"""The ledger of a partition: what became of every push, as integers and names.

The ledger decides: it judges a push, and enters what became of it. It knows no tensor, so the
partition (`state`) and the simulator (`cluster.simulate.partition`) decide by the same code. What
an applied push does to the vectors is `combiner`'s and `vectors`'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING, AppliedSet
from downpour.paramserver.partition.record import PushRecord
from downpour.paramserver.partition.staleness import StalenessRecord
from downpour.paramserver.partition.update_config import UpdateConfig

MEAN_WEIGHT = 0.01
"""Weight of a new observation in the moving averages of staleness and of the gradient's norm."""


class Ledger:
    """Versions, applied set, counts and quarantine of a partition that applies push by push."""

    def __init__(self, config: UpdateConfig, staleness: StalenessRecord | None = None) -> None:
        """Version 0. `staleness` is an empty record to fill; by default one by replica."""
        self.config = config
        self._rate = config.schedule.rates(config.epoch_examples)
        self.version = 0
        """Pushes applied."""
        self.weights_version = 0
        """The version at which the weights changed last."""
        self.examples = 0
        """Examples of the applied pushes."""
        self.applied = AppliedSet(config.batches_per_epoch)
        self.staleness = StalenessRecord() if staleness is None else staleness
        self.mean_staleness = 0.0
        """Moving average of the staleness of applied pushes, in versions."""
        self.mean_norm = 0.0
        """Moving average of the norm of applied gradients."""
        self.quarantined: set[int] = set()
        """Replicas whose pushes are refused from now on."""
        self.outcomes: Counter[Outcome] = Counter()
        """Pushes, by what became of them."""
        self.refusals: Counter[int] = Counter()
        """Pushes refused for their loss or gradient, by replica."""
        self.record: PushRecord | None = None
        """Where every push is recorded, if the run is."""

    def judge(self, push: Push) -> tuple[Outcome, float]:
        """Say what would become of `push`, by its header and its staleness. Changes nothing.

        Returns:
            The outcome, and the share of the learning rate if that is `APPLIED`. The gradient is
            still to be looked at (`is_sound`).
        """
        applied = self.applied
        if not applied.valid(push.epoch, push.batches) or push.version > self.version:
            return Outcome.REFUSED_UNKNOWN, 0.0
        waiting = sum(applied.get(push.epoch, b) == WAITING for b in push.batches)
        if waiting == 0:
            return Outcome.DUPLICATE, 0.0
        if waiting < len(push.batches):
            return Outcome.REFUSED_MIXED, 0.0
        if push.replica in self.quarantined:
            return Outcome.REFUSED_QUARANTINE, 0.0
        if not math.isfinite(push.loss):
            return Outcome.REFUSED_LOSS, 0.0
        norm, config = push.gradient_norm, self.config
        if not 0 <= norm < math.inf or config.guard.enormous(norm, self.mean_norm, self.version):
            return Outcome.REFUSED_GRADIENT, 0.0
        # Within a round the weights stay the same, so a push may be of a later version than they.
        staleness = self.weights_version - push.version
        if staleness < 0:
            staleness = 0
        decision = config.policy.decide(staleness, self.mean_staleness)
        if decision.dropped:
            return Outcome.REFUSED_STALE, 0.0
        return Outcome.APPLIED, decision.scale

    def is_sound(self, size: tuple[float, float], norm: float) -> bool:
        """Whether a gradient's slice is finite, and no longer than its replica said.

        A sum is finite only if every term is. A sum that overflows is an outlier all the same.
        Rounding for the wire leaves a rest of earlier gradients in a slice, so the slice may be
        somewhat longer than `norm`.

        Args:
            size: The squared length of the slice, and the sum of its moments.
            norm: The norm of the whole gradient, as pushed.
        """
        square, total = size
        return square <= (10 * norm) ** 2 + self.mean_norm**2 and math.isfinite(total)

    def enter(self, push: Push, outcome: Outcome, scale: float) -> float:
        """Enter what became of `push`. The only way in which pushes change the ledger.

        Args:
            push: The push.
            outcome: What `judge` said, or why it is refused in spite of that.
            scale: Share of the learning rate, as `judge` gave it.

        Returns:
            The learning rate at which the push is to be applied; 0 if it is not.
        """
        self.outcomes[outcome] += 1
        rate = 0.0
        if outcome is Outcome.APPLIED:
            rate = self._rate(self.examples) * scale
            staleness = self.weights_version - push.version
            if staleness < 0:  # as in `judge`; a call of `max` would cost more
                staleness = 0
            self.staleness.add(push.replica, staleness)
            self.mean_staleness += MEAN_WEIGHT * (staleness - self.mean_staleness)
            self.version += 1
            weight = max(MEAN_WEIGHT, 1 / self.version)
            self.mean_norm += weight * (push.gradient_norm - self.mean_norm)
            self._advance(push.examples)
            for batch in push.batches:
                self.applied.add(push.epoch, batch, APPLIED)
        elif outcome in (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT):
            self.refusals[push.replica] += 1
            for batch in push.batches:
                self.applied.add(push.epoch, batch, REFUSED)
            self._consider_quarantine(push.replica)
        if self.record is not None:
            self.record.add(push, outcome)
        return rate

    def take(self, push: Push) -> Outcome:
        """Judge and enter a push whose gradient is known to be sound; for a caller without vectors.

        Returns:
            What became of it.
        """
        outcome, scale = self.judge(push)
        self.enter(push, outcome, scale)
        return outcome

    def staleness_of(self, push: Push) -> int:
        """Versions between the push's weights and the present ones, from 0 on."""
        return max(0, self.weights_version - push.version)

    def rate(self) -> float:
        """The learning rate of the next update."""
        return self._rate(self.examples)

    def _advance(self, examples: int) -> None:
        """A push of so many examples was applied: the weights change with it."""
        self.weights_version = self.version
        self.examples += examples

    def _consider_quarantine(self, replica: int) -> None:
        applied = {r: sum(counts) for r, counts in self.staleness.dump().items()}
        own = applied.pop(replica, 0)
        if self.config.guard.quarantines(
            refused=self.refusals[replica],
            applied=own,
            others_refused=self.refusals.total() - self.refusals[replica],
            others_applied=sum(applied.values()),
        ):
            self.quarantined.add(replica)

    def counts(self) -> dict[str, int]:
        """Mini-batches applied and refused, and pushes repeated, dropped and malformed."""
        return {
            "batches_applied": self.applied.num_applied,
            "refused": self.applied.num_refused,
            "duplicates": self.outcomes[Outcome.DUPLICATE],
            "dropped": self.outcomes[Outcome.REFUSED_STALE],
            "malformed": self.outcomes[Outcome.REFUSED_MIXED]
            + self.outcomes[Outcome.REFUSED_UNKNOWN],
        }

    def dump(self) -> tuple[dict[str, object], dict[int, npt.NDArray[np.uint8]]]:
        """Return what `load` takes.

        Returns:
            Plain metadata, and by open epoch the flags of its mini-batches, uint8 [q].
        """
        applied_meta, open_flags = self.applied.dump()
        meta: dict[str, object] = {
            "version": self.version,
            "examples": self.examples,
            "applied": applied_meta,
            "staleness_bins": {str(r): c for r, c in self.staleness.dump().items()},
            "mean_staleness": self.mean_staleness,
            "mean_norm": self.mean_norm,
            "outcomes": {o.name: n for o, n in sorted(self.outcomes.items())},
            "refusals": {str(r): n for r, n in sorted(self.refusals.items())},
        }
        return meta, open_flags

    def load(
        self, meta: Mapping[str, Any], open_flags: Mapping[int, npt.NDArray[np.uint8]]
    ) -> None:
        """Go on from what `dump` gave.

        Args:
            meta: The metadata. `quarantined`, which only a follower is told, may be among it.
            open_flags: By open epoch, the flags of its mini-batches, uint8 [q].

        Raises:
            LookupError, TypeError, ValueError, AttributeError, AssertionError: No `dump` gave this.
        """
        self.version = self.weights_version = int(meta["version"])
        self.examples = int(meta["examples"])
        self.mean_staleness = float(meta["mean_staleness"])
        self.mean_norm = float(meta["mean_norm"])
        self.applied = AppliedSet.load(meta["applied"], open_flags)
        if "staleness" in meta:  # counts of each value, as earlier releases wrote them
            self.staleness.load_values({int(r): c for r, c in meta["staleness"].items()})
        else:
            self.staleness.load({int(r): c for r, c in meta["staleness_bins"].items()})
        self.outcomes = Counter({Outcome[o]: int(n) for o, n in meta["outcomes"].items()})
        self.refusals = Counter({int(r): int(n) for r, n in meta["refusals"].items()})
        self.quarantined = {int(r) for r in meta.get("quarantined", ())}

    def check(self) -> None:
        """Assert the invariants."""
        self.applied.check()
        assert 0 <= self.mean_staleness < math.inf
        assert 0 <= self.mean_norm < math.inf
        assert self.version == self.outcomes[Outcome.APPLIED] == self.staleness.all().total
        assert self.version <= self.applied.num_applied
        assert self.examples >= 0
        self._check_weights_version()

    def _check_weights_version(self) -> None:
        assert self.weights_version == self.version


class RoundLedger(Ledger):
    """A ledger whose weights change at the end of a synchronous round, not with every push."""

    def __init__(self, config: UpdateConfig, staleness: StalenessRecord | None = None) -> None:
        """Version 0, at the start of a round."""
        super().__init__(config, staleness)
        self.round_pushes = config.policy.round_pushes or 1
        """Pushes of a full round."""
        self.round_examples = 0
        """Examples of the pushes that the round has taken."""

    @property
    def round_count(self) -> int:
        """Pushes that the round has taken."""
        return self.version - self.weights_version

    @property
    def is_round_over(self) -> bool:
        """Whether the round is full, or is the run's last and gets no more pushes."""
        count = self.version - self.weights_version
        return count == self.round_pushes or (count > 0 and self.is_run_over)

    @property
    def is_run_over(self) -> bool:
        """Whether every mini-batch of the run is settled."""
        epochs, applied = self.config.epochs, self.applied
        if epochs is None:
            return False
        settled = applied.num_applied + applied.num_refused
        return settled == epochs * self.config.batches_per_epoch

    def end_round(self) -> float:
        """Note that the weights change now.

        Returns:
            The learning rate of the round, which is that of its start: the order in which its
            pushes came must not matter.
        """
        examples = self.examples - self.round_examples
        self.weights_version, self.round_examples = self.version, 0
        return self._rate(examples)

    def take(self, push: Push) -> Outcome:
        """As for every ledger; ends the round if this was its last push."""
        outcome = super().take(push)
        if self.is_round_over:
            self.end_round()
        return outcome

    def _advance(self, examples: int) -> None:
        self.examples += examples
        self.round_examples += examples

    def dump(self) -> tuple[dict[str, object], dict[int, npt.NDArray[np.uint8]]]:
        """As for every ledger, with the round's start and examples."""
        meta, open_flags = super().dump()
        meta["round"] = {"start": self.weights_version, "examples": self.round_examples}
        return meta, open_flags

    def load(
        self, meta: Mapping[str, Any], open_flags: Mapping[int, npt.NDArray[np.uint8]]
    ) -> None:
        """As for every ledger. The round may hold more pushes than a full one has by now."""
        super().load(meta, open_flags)
        self.weights_version = int(meta["round"]["start"])
        self.round_examples = int(meta["round"]["examples"])

    def _check_weights_version(self) -> None:
        assert 0 <= self.round_count < self.round_pushes


def make_ledger(config: UpdateConfig, staleness: StalenessRecord | None = None) -> Ledger:
    """Return the ledger that the staleness policy of `config` needs, at version 0."""
    if config.policy.staleness_policy == "synchronous":
        return RoundLedger(config, staleness)
    return Ledger(config, staleness)
