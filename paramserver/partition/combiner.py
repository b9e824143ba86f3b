"""How the pushes of a packet become versions: one by one, compensated, or as a round.

A combiner asks the `ledger` what becomes of each push and has the `vectors` updated. Which combiner
a partition has follows from its staleness policy, once, when it is made (`make_combiner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ledger import Ledger, RoundLedger
from downpour.paramserver.partition.vectors import Arrival, Vectors, Version, measure
from downpour.paramserver.rules.compensation import Compensation, make_compensation

Place = Callable[[], Version]
"""Gives where to write the next version; called only if there is going to be one."""
ROUND_SUM = "round_sum"
"""Name of the sum of a round's gradients, among the rule's state."""
ROUND_MOMENTS = "round.moments"
"""Name of a round's moments in a snapshot, float32 [mini-batches, 3, f]."""


class Combiner(Protocol):
    """Turns pushes into versions."""

    def apply_all(self, arrivals: Sequence[Arrival], into: Place | None) -> list[Outcome]:
        """Take in pushes in their order. See `PartitionState.apply_all`."""

    def close_round(self, into: Place | None) -> None:
        """Apply what an incomplete round has taken, if anything."""

    def close_last_round(self, into: Place | None) -> bool:
        """Apply it if no mini-batch of the run is to come; whether it was applied."""

    def dump(self) -> dict[str, Tensor]:
        """The tensors that a snapshot needs beside those of `Vectors.large`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from those of a snapshot; ledger and vectors have been loaded."""

    def check(self) -> None:
        """Assert the invariants."""


class ImmediateCombiner:
    """Applies each push by itself, as it comes."""

    def __init__(self, ledger: Ledger, vectors: Vectors) -> None:
        """Both at the same version."""
        self._ledger = ledger
        self._vectors = vectors

    def apply_all(self, arrivals: Sequence[Arrival], into: Place | None) -> list[Outcome]:
        """See `Combiner`.

        Work is ordered by kind. Vectors are long, and each pass over them takes this method's own
        data out of the processor's caches, so everything is decided in between: all gradients are
        measured, all pushes judged and entered, then all updates made.
        """
        ledger = self._ledger
        # Alone, a repeat need not be measured; among others, that would cost more than it saves.
        sizes = [
            measure(gradient, moments) if len(arrivals) > 1 else None
            for _, gradient, moments in arrivals
        ]
        outcomes, updates = [], []
        for (push, gradient, moments), size in zip(arrivals, sizes, strict=True):
            outcome, scale = ledger.judge(push)
            if outcome is Outcome.APPLIED:
                if not self._remembers(push.version):
                    outcome = Outcome.REFUSED_STALE
                elif not ledger.is_sound(size or measure(gradient, moments), push.gradient_norm):
                    outcome = Outcome.REFUSED_GRADIENT
            rate = ledger.enter(push, outcome, scale)
            outcomes.append(outcome)
            if outcome is Outcome.APPLIED:
                updates.append((push, gradient, moments, rate, ledger.version - 1))
        if updates:
            target = into() if into else self._vectors.current
            self._begin(target)
            for push, gradient, moments, rate, version in updates:
                self._update(push, gradient, moments, rate, version, target)
            self._end()
        return outcomes

    def _remembers(self, version: int) -> bool:
        """Whether a push that was computed on `version` can be applied."""
        return True

    def _begin(self, target: Version) -> None:
        """A new version is about to be written to `target`."""

    def _end(self) -> None:
        """The new version is complete."""

    def _update(
        self,
        push: Push,
        gradient: Tensor,
        moments: Tensor,
        rate: float,
        version: int,
        into: Version,
    ) -> None:
        """Apply a push to the weights of `version`."""
        vectors = self._vectors
        vectors.config.regulariser.clip(gradient, push.gradient_norm, len(push.batches))
        vectors.step(gradient, moments, rate, into, push)

    def close_round(self, into: Place | None) -> None:
        """There are no rounds."""

    def close_last_round(self, into: Place | None) -> bool:
        """There are no rounds."""
        return False

    def dump(self) -> dict[str, Tensor]:
        """See `Combiner`."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Combiner`."""

    def check(self) -> None:
        """See `Combiner`."""
        vectors, applied = self._vectors, self._ledger.applied
        if vectors.partition.num_features:
            assert vectors.statistics.num_updates == applied.num_applied


class CompensatedCombiner(ImmediateCombiner):
    """Corrects each gradient for how far the weights have moved since it was computed.

    So it remembers where the weights of the latest versions lie (`StalenessPolicy.versions_kept`);
    the caller must not write over those.
    """

    def __init__(self, ledger: Ledger, vectors: Vectors, compensation: Compensation) -> None:
        """Both at the same version."""
        super().__init__(ledger, vectors)
        self._trained = vectors.partition.num_trained
        vectors.rule_state |= compensation.init(self._trained)
        self._compensation = compensation
        self._scratch = compensation.room(self._trained)
        self.past = {ledger.version: vectors.current.weights}
        """Where the weights lie that a push may have been computed on, by version."""

    def _remembers(self, version: int) -> bool:
        return version == self._ledger.version or version in self.past

    def _begin(self, target: Version) -> None:
        """Forget the version that lay where the new one comes."""
        place = target.weights.data_ptr()
        for version in [v for v, w in self.past.items() if w.data_ptr() == place]:
            del self.past[version]

    def _end(self) -> None:
        """Remember the new version, and forget those that are too old."""
        ledger = self._ledger
        self.past[ledger.version] = self._vectors.current.weights
        oldest = ledger.version - ledger.config.policy.versions_kept
        while (first := next(iter(self.past))) < oldest:
            del self.past[first]

    def _update(
        self,
        push: Push,
        gradient: Tensor,
        moments: Tensor,
        rate: float,
        version: int,
        into: Version,
    ) -> None:
        vectors = self._vectors
        vectors.config.regulariser.clip(gradient, push.gradient_norm, len(push.batches))
        trained = self._trained
        self._compensation.apply(
            gradient,
            vectors.current.weights[:trained],
            self.past[push.version][:trained] if push.version != version else None,
            vectors.rule_state,
            self._scratch,
            len(push.batches),
        )
        vectors.step(gradient, moments, rate, into, push)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Combiner`. Of earlier versions a snapshot has nothing."""
        self.past = {self._ledger.version: self._vectors.current.weights}


class RoundCombiner:
    """Applies the mean gradient of a synchronous round as one update.

    The mean is weighted by examples, so it is the gradient of one mini-batch of all of them (with
    each mini-batch's own statistics if there is batch normalisation). The sum lies among the rule's
    state and the moments beside it. Both are in a snapshot, so a restored partition goes on in the
    middle of a round. Who may take part is `admission.rounds`'; when a round ends, `ledger`'s.
    """

    def __init__(self, ledger: RoundLedger, vectors: Vectors) -> None:
        """Both at the same version, at the start of a round."""
        self._ledger = ledger
        self._vectors = vectors
        self._moments: list[Tensor] = []
        vectors.rule_state[ROUND_SUM] = torch.zeros(vectors.partition.num_trained)

    def apply_all(self, arrivals: Sequence[Arrival], into: Place | None) -> list[Outcome]:
        """See `Combiner`."""
        ledger, regulariser = self._ledger, self._vectors.config.regulariser
        outcomes = []
        for push, gradient, moments in arrivals:
            outcome, scale = ledger.judge(push)
            if outcome is Outcome.APPLIED and not ledger.is_sound(
                measure(gradient, moments), push.gradient_norm
            ):
                outcome = Outcome.REFUSED_GRADIENT
            ledger.enter(push, outcome, scale)
            outcomes.append(outcome)
            if outcome is Outcome.APPLIED:
                regulariser.clip(gradient, push.gradient_norm)
                self._add(gradient, moments, push)
            if ledger.is_round_over:
                self._close(into)
        return outcomes

    def _add(self, gradient: Tensor, moments: Tensor, push: Push) -> None:
        """Add the gradient [n] of a mini-batch, and its moments [1, 3, f]."""
        self._vectors.witness.add(push.epoch, push.batches)
        examples = push.examples
        total = self._vectors.rule_state[ROUND_SUM]
        if self._moments:
            total.add_(gradient, alpha=examples)
        else:
            torch.mul(gradient, examples, out=total)
        self._moments.extend(moments.clone())  # the mailbox is free again before the round ends

    def _close(self, into: Place | None) -> None:
        """Apply the mean. The round has taken at least one push."""
        vectors, ledger = self._vectors, self._ledger
        mean = vectors.rule_state[ROUND_SUM].div_(ledger.round_examples)
        rate = ledger.end_round()
        vectors.step(mean, self._moments, rate, into() if into else vectors.current)
        mean.zero_()
        self._moments = []

    def close_round(self, into: Place | None) -> None:
        """See `Combiner`."""
        if self._ledger.round_count:
            self._close(into)

    def close_last_round(self, into: Place | None) -> bool:
        """See `Combiner`."""
        if not self._ledger.round_count or not self._ledger.is_run_over:
            return False
        self._close(into)
        return True

    def dump(self) -> dict[str, Tensor]:
        """See `Combiner`: the moments, float32 [mini-batches, 3, f]."""
        moments, num_features = self._moments, self._vectors.partition.num_features
        stacked = torch.stack(moments) if moments else torch.empty(0, 3, num_features)
        return {ROUND_MOMENTS: stacked}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Combiner`.

        Raises:
            LookupError: There are no moments.
            ValueError: They are not those of the round's pushes.
        """
        self._moments = list(tensors[ROUND_MOMENTS].clone())
        if len(self._moments) != self._ledger.round_count:
            raise ValueError(f"a round of {self._ledger.round_count}, {len(self._moments)} moments")
        if self._moments and self._ledger.round_count >= self._ledger.round_pushes:
            self._close(None)  # rounds are shorter than they were

    def check(self) -> None:
        """See `Combiner`."""
        vectors, applied = self._vectors, self._ledger.applied
        assert len(self._moments) == self._ledger.round_count
        if vectors.partition.num_features:
            assert vectors.statistics.num_updates == applied.num_applied - len(self._moments)


def make_combiner(ledger: Ledger, vectors: Vectors) -> Combiner:
    """Return the combiner that the staleness policy of `ledger` needs."""
    if isinstance(ledger, RoundLedger):
        return RoundCombiner(ledger, vectors)
    compensation = make_compensation(ledger.config.policy)
    if compensation is None:
        return ImmediateCombiner(ledger, vectors)
    return CompensatedCombiner(ledger, vectors, compensation)
