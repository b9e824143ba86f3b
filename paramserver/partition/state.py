"""The state of one partition, and its one door: `apply_all`.

Pure logic apart from transport, clock and Ray. A push comes in, is judged against the applied
set, and either becomes a new version (weights, rule state, BN statistics, applied set, staleness
record all change together) or changes nothing but the counters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration, BadSnapshot
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING, AppliedSet
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.record import PushRecord
from downpour.paramserver.partition.round import MOMENTS, Round
from downpour.paramserver.partition.staleness import StalenessRecord
from downpour.paramserver.rules.compensation import make_compensation
from downpour.paramserver.rules.policy import APPLY, Guard, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.statistics import BatchStatistics, StatisticsRule
from downpour.paramserver.rules.update import Momentum, Nesterov, Regulariser, Rule

Arrival = tuple[Push, Tensor, Tensor]
"""A push, and this partition's gradient and moments of it; see `PartitionState.apply`."""
_Size = tuple[float, float]
MEAN_WEIGHT = 0.01
"""Weight of a new observation in the moving averages of staleness and of the gradient's norm."""


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """All that decides how a push changes a partition."""

    rule: Rule = field(default_factory=Momentum)
    """How a gradient changes the weights."""
    regulariser: Regulariser = field(default_factory=Regulariser)
    """What happens to a gradient before that."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate, by examples applied."""
    statistics: StatisticsRule = field(default_factory=StatisticsRule)
    """How BN moments are merged."""
    policy: StalenessPolicy = field(default_factory=StalenessPolicy)
    """What is done about staleness."""
    guard: Guard = field(default_factory=Guard)
    """What keeps poison out."""
    batches_per_epoch: int
    """q, mini-batches in an epoch."""
    epoch_examples: int
    """N, examples in an epoch."""
    epochs: int | None = None
    """Of the run; once they are settled, a round that is not full is closed as it is."""

    def __post_init__(self) -> None:
        if self.batches_per_epoch < 1 or self.epoch_examples < 1:
            raise BadConfiguration(
                f"an epoch has {self.batches_per_epoch} mini-batches and {self.epoch_examples} "
                "examples: give at least 1 of each"
            )

    @property
    def spoils_gradients(self) -> bool:
        """Whether an update may leave something else in the memory of its gradient."""
        regulariser = self.regulariser
        spoils = bool(regulariser.weight_decay) or regulariser.clip_norm is not None
        return spoils or isinstance(self.rule, Nesterov)


@dataclass(kw_only=True)
class Version:
    """Where a version's vectors live. The shell chooses; the next may be written over it."""

    weights: Tensor
    """float32 [num_parameters] of the partition."""
    statistics: Tensor
    """float32 [2, num_features]: moving averages of mean and unbiased variance."""


class PartitionState:
    """Weights, rule state, BN statistics, version and applied set of one partition."""

    def __init__(self, partition: Partition, config: UpdateConfig, current: Version) -> None:
        """Version 0, with the weights and statistics that `current` holds."""
        if current.weights.shape != (partition.num_parameters,):
            raise BadConfiguration(
                f"partition {partition.index} has {partition.num_parameters} parameters, but was "
                f"given weights of shape {tuple(current.weights.shape)}"
            )
        self.partition = partition
        self.config = config
        self.current = current
        self.version = 0
        self.examples = 0
        self.applied = AppliedSet(config.batches_per_epoch)
        self.staleness = StalenessRecord()
        self.mean_staleness = 0.0
        """Moving average of the staleness of applied pushes, in versions."""
        self.mean_norm = 0.0
        """Moving average of the norm of applied gradients."""
        self.quarantined: set[int] = set()
        """Replicas whose pushes are not taken any more."""
        self.record: PushRecord | None = None
        """Takes note of every push, if there is one."""
        self.rule_state = config.rule.init(partition.num_parameters)
        self._compensation = make_compensation(config.policy)
        if self._compensation is not None:
            self.rule_state |= self._compensation.init(partition.num_parameters)
            self._room = self._compensation.room(partition.num_parameters)
        self.weights_version = 0
        """The version at which the weights changed last: the latest, or the round's start."""
        self._round: Round | None = None
        if config.policy.staleness_policy == "synchronous":
            self._round = Round(pushes=config.policy.round_pushes or 1)
            self.rule_state |= self._round.init(partition.num_parameters)
        self._past = {0: current.weights}
        """Where the weights of versions lie that pushes may have been computed on."""
        self.statistics = BatchStatistics(partition.num_features, config.statistics)
        self.outcomes: Counter[Outcome] = Counter()
        self.refusals: Counter[int] = Counter()

    def judge(self, push: Push) -> Outcome:
        """What would become of `push`, by its header alone. Changes nothing."""
        applied = self.applied
        if not applied.valid(push.epoch, push.batches) or push.version > self.version:
            return Outcome.REFUSED_UNKNOWN
        waiting = sum(applied.get(push.epoch, b) == WAITING for b in push.batches)
        if waiting == 0:
            return Outcome.DUPLICATE
        if waiting < len(push.batches):
            return Outcome.REFUSED_MIXED
        if push.replica in self.quarantined:
            return Outcome.REFUSED_QUARANTINE
        if not math.isfinite(push.loss):
            return Outcome.REFUSED_LOSS
        norm = push.gradient_norm
        if not 0 <= norm < math.inf or self.config.guard.enormous(
            norm, self.mean_norm, self.version
        ):
            return Outcome.REFUSED_GRADIENT
        return Outcome.APPLIED

    def apply(
        self,
        push: Push,
        gradient: Tensor,
        moments: Tensor,
        into: Callable[[], Version] | None = None,
    ) -> Outcome:
        """Take in one push.

        `gradient` is this partition's slice of the sum over the push's mini-batches of their mean
        gradients, float32 [num_parameters], and is scribbled on; `moments` is float32
        [len(push.batches), 3, num_features]. Only if there is to be a new version is `into`
        called, for where to write it: over `current`, as without `into`, or to another, which
        becomes `current`. Where gradients are compensated it has to leave those versions alone that
        are at most `versions_kept` old (`StalenessPolicy`).
        """
        return self.apply_all(((push, gradient, moments),), into)[0]

    def apply_all(
        self, arrivals: Sequence[Arrival], into: Callable[[], Version] | None = None
    ) -> list[Outcome]:
        """Take in pushes in their order; the only way in which this state changes.

        What comes of it is to the bit what `apply` makes of one after the other, but only the last
        version can be seen. Work is ordered by kind: vectors are long, and each pass over them
        takes this method's own data out of the processor's caches, so all is decided in between.
        """
        if self._round is not None:
            return self._apply_in_rounds(self._round, arrivals, into)
        # Alone, a repeat need not be looked at; among others, that would cost more than it saves.
        sizes = [
            self._measure(gradient, moments) if len(arrivals) > 1 else None
            for _, gradient, moments in arrivals
        ]
        outcomes, updates = [], []
        for arrival, size in zip(arrivals, sizes, strict=True):
            push, gradient, moments = arrival
            outcome, rate = self._decide(arrival, size)
            outcomes.append(outcome)
            if outcome is Outcome.APPLIED:
                updates.append((push, gradient, moments, rate, self.version - 1))
        if updates:
            target = into() if into else self.current
            self._write_over(target)
            for push, gradient, moments, rate, version in updates:
                moved = push.version != version
                self._update(push, gradient, moments, rate, moved, target)
            self._keep()
        return outcomes

    def _apply_in_rounds(
        self, current: Round, arrivals: Sequence[Arrival], into: Callable[[], Version] | None
    ) -> list[Outcome]:
        outcomes = []
        for arrival in arrivals:
            push, gradient, moments = arrival
            outcome, _ = self._decide(arrival)
            outcomes.append(outcome)
            if outcome is Outcome.APPLIED:
                self.config.regulariser.clip(gradient, push.gradient_norm)
                current.add(gradient, moments, push.examples, self.rule_state)
            if current.count == current.pushes:
                self.close_round(into)
            else:
                self.close_last_round(into)
        return outcomes

    def close_last_round(self, into: Callable[[], Version] | None = None) -> bool:
        """Close the round where no more mini-batches will come; whether that was so."""
        epochs, applied = self.config.epochs, self.applied
        if epochs is None or self._round is None or not self._round.count:
            return False
        if applied.num_applied + applied.num_refused != epochs * self.config.batches_per_epoch:
            return False
        self.close_round(into)
        return True

    def close_round(self, into: Callable[[], Version] | None = None) -> None:
        """Apply the mean of what the round has taken, if it has taken anything."""
        if self._round is None or not self._round.count:
            return
        # The rate is that of the round's start, in whichever order its pushes came.
        examples = self.examples - self._round.examples
        rate = self.config.schedule.rate(examples, self.config.epoch_examples)
        gradient, moments = self._round.close(self.rule_state)
        self._step(gradient, moments, rate, into() if into else self.current)
        gradient.zero_()
        self.weights_version = self.version

    def _write_over(self, target: Version) -> None:
        """A new version comes where an old one may be, on which no push can be taken any more."""
        if self._compensation is None:
            return
        place = target.weights.data_ptr()
        for version in [v for v, w in self._past.items() if w.data_ptr() == place]:
            del self._past[version]

    def _keep(self) -> None:
        """Remember where the latest version is, and forget those that are too old."""
        if self._compensation is None:
            return
        self._past[self.version] = self.current.weights
        oldest = self.version - self.config.policy.versions_kept
        while (first := next(iter(self._past))) < oldest:
            del self._past[first]

    def _remembers(self, version: int) -> bool:
        """Whether a push that was computed on `version` can be applied."""
        return self._compensation is None or version == self.version or version in self._past

    def _decide(self, arrival: Arrival, size: _Size | None = None) -> tuple[Outcome, float]:
        """What becomes of a push, and the rate that it is applied at; takes note of it.

        Without its `size` it is measured here, if all else speaks for it.
        """
        push, gradient, moments = arrival
        outcome, rate = self.judge(push), 0.0
        staleness, decision = self.staleness_of(push), APPLY
        if outcome is Outcome.APPLIED:
            decision = self.config.policy.decide(staleness, self.mean_staleness)
            if decision.dropped or not self._remembers(push.version):
                outcome = Outcome.REFUSED_STALE
            elif not self._sound(size or self._measure(gradient, moments), push.gradient_norm):
                outcome = Outcome.REFUSED_GRADIENT
        self.outcomes[outcome] += 1
        if outcome is Outcome.APPLIED:
            rate = self.rate() * decision.scale
            self.staleness.add(push.replica, staleness)
            self.mean_staleness += MEAN_WEIGHT * (staleness - self.mean_staleness)
            self.version += 1
            if self._round is None:
                self.weights_version = self.version
            weight = max(MEAN_WEIGHT, 1 / self.version)
            self.mean_norm += weight * (push.gradient_norm - self.mean_norm)
            self.examples += push.examples
            for batch in push.batches:
                self.applied.add(push.epoch, batch, APPLIED)
        elif outcome in (Outcome.REFUSED_LOSS, Outcome.REFUSED_GRADIENT):
            self.refusals[push.replica] += 1
            for batch in push.batches:
                self.applied.add(push.epoch, batch, REFUSED)
            self._consider_quarantine(push.replica)
        if self.record is not None:
            self.record.add(push, outcome)
        return outcome, rate

    def staleness_of(self, push: Push) -> int:
        """Versions since its weights were the latest; within a round they stay the same."""
        if self._round is None:
            return self.version - push.version
        return max(0, self.weights_version - push.version)

    def rate(self) -> float:
        """The learning rate of the next update."""
        return self.config.schedule.rate(self.examples, self.config.epoch_examples)

    def _measure(self, gradient: Tensor, moments: Tensor) -> _Size:
        """The gradient's squared length, and the sum of the moments.

        One read of memory, where isfinite().all() would write a mask too.
        """
        total = float(moments.sum()) if moments.numel() else 0.0
        return float(torch.dot(gradient, gradient)), total

    def _sound(self, size: _Size, norm: float) -> bool:
        """Whether all is finite, and the gradient's slice no longer than `norm` allows.

        Rounding for the wire leaves a rest of earlier gradients in a slice, so it may be somewhat
        longer than `norm`. A sum is finite only if every term is; one that overflows is an outlier
        all the same.
        """
        square, total = size
        return square <= (10 * norm) ** 2 + self.mean_norm**2 and math.isfinite(total)

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

    def _update(
        self,
        push: Push,
        gradient: Tensor,
        moments: Tensor,
        rate: float,
        moved: bool,
        into: Version,
    ) -> None:
        """`moved`: whether the weights are others than those that the push was computed on."""
        config, current = self.config, self.current
        config.regulariser.clip(gradient, push.gradient_norm)
        if self._compensation is not None:
            pulled = self._past[push.version] if moved else None
            self._compensation.apply(
                gradient, current.weights, pulled, self.rule_state, self._room, len(push.batches)
            )
        self._step(gradient, moments, rate, into)

    def _step(
        self, gradient: Tensor, moments: Sequence[Tensor] | Tensor, rate: float, into: Version
    ) -> None:
        """Weight decay, the rule, and the statistics."""
        config, current = self.config, self.current
        config.regulariser.decay(gradient, current.weights, self.partition.num_decayed)
        config.rule.update(current.weights, gradient, self.rule_state, rate, into.weights)
        if self.partition.num_features:
            source = current.statistics
            for i in range(len(moments)):  # iterating over a tensor is slow
                self.statistics.update(source, moments[i], into.statistics)
                source = into.statistics
        self.current = into

    def counts(self) -> dict[str, int]:
        """Mini-batches by what became of them, and pushes repeated or refused."""
        return {
            "batches_applied": self.applied.num_applied,
            "refused": self.applied.num_refused,
            "duplicates": self.outcomes[Outcome.DUPLICATE],
            "dropped": self.outcomes[Outcome.REFUSED_STALE],
            "malformed": self.outcomes[Outcome.REFUSED_MIXED]
            + self.outcomes[Outcome.REFUSED_UNKNOWN],
        }

    def room(self) -> dict[str, Tensor]:
        """Memory for the large tensors of a `dump`, as yet untouched."""
        large = {"weights": self.current.weights, "statistics": self.current.statistics}
        large |= {f"rule.{name}": t for name, t in self.rule_state.items()}
        return {name: torch.empty_like(tensor) for name, tensor in large.items()}

    def dump(
        self, into: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, object], dict[str, Tensor]]:
        """Plain metadata and tensors that `load` takes; the tensors are copies.

        The large ones are copied to where `into` has them, if it does: memory that has been used
        before costs a fraction of fresh memory.
        """
        into = {} if into is None else into
        applied_meta, open_flags = self.applied.dump()
        statistics_meta, statistics_arrays = self.statistics.dump()
        meta: dict[str, object] = {
            "version": self.version,
            "examples": self.examples,
            "applied": applied_meta,
            "statistics": statistics_meta,
            "staleness": {str(r): c for r, c in self.staleness.dump().items()},
            "mean_staleness": self.mean_staleness,
            "mean_norm": self.mean_norm,
            "outcomes": {o.name: n for o, n in sorted(self.outcomes.items())},
            "refusals": {str(r): n for r, n in sorted(self.refusals.items())},
        }
        if self._round is not None:
            meta["round"] = {"start": self.weights_version, "examples": self._round.examples}
        large = {"weights": self.current.weights, "statistics": self.current.statistics}
        large |= {f"rule.{name}": t for name, t in self.rule_state.items()}
        tensors = {n: into[n].copy_(t) if n in into else t.clone() for n, t in large.items()}
        tensors |= {f"applied.{e}": torch.from_numpy(f) for e, f in open_flags.items()}
        tensors |= {n: torch.from_numpy(a.copy()) for n, a in statistics_arrays.items()}
        if self._round is not None:
            tensors[MOMENTS] = self._round.stacked(self.partition.num_features)
        return meta, tensors

    def load(self, meta: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `dump` gave, writing the weights to where `current` points.

        Raises `BadSnapshot` for what no `dump` of this configuration gives; this state is then
        of no more use.
        """
        rule_names = {name for name in tensors if name.startswith("rule.")}
        if rule_names != {f"rule.{name}" for name in self.rule_state}:
            raise BadSnapshot(
                f"the snapshot's rule kept {sorted(rule_names) or 'nothing'}, which is not what "
                f"{self.config.rule} and the staleness policy keep: resume with the rule and the "
                "staleness policy that the run began with"
            )
        try:
            self._load(meta, tensors)
            self.check()
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise self._damaged(error) from None
        except AssertionError as error:  # it says that what it holds cannot be
            raise self._damaged(error) from None
        if self.applied.num_batches != self.config.batches_per_epoch:
            raise BadSnapshot(
                f"the snapshot is of epochs of {self.applied.num_batches} mini-batches, not "
                f"{self.config.batches_per_epoch}: resume with the data and the batch size that "
                "the run began with"
            )

    def _damaged(self, error: Exception) -> BadSnapshot:
        return BadSnapshot(
            f"the snapshot of partition {self.partition.index} is damaged "
            f"({type(error).__name__}: {' '.join(str(error).split())}): use another checkpoint"
        )

    def _load(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.version, self.examples = int(meta["version"]), int(meta["examples"])
        self.mean_staleness = float(meta["mean_staleness"])
        self.mean_norm = float(meta["mean_norm"])
        into = {"weights": self.current.weights, "statistics": self.current.statistics}
        into |= {f"rule.{name}": value for name, value in self.rule_state.items()}
        for name, value in into.items():
            saved = tensors[name]
            if saved.shape != value.shape or saved.dtype != value.dtype:
                raise ValueError(f"{name} is {saved.dtype} {list(saved.shape)}")
            value.copy_(saved)
        self._past = {self.version: self.current.weights}
        self.weights_version = self.version
        if self._round is not None:
            about = meta["round"]
            self.weights_version = int(about["start"])
            self._round.restore(int(about["examples"]), tensors[MOMENTS])
        flags = {
            int(name.removeprefix("applied.")): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith("applied.")
        }
        self.applied = AppliedSet.load(meta["applied"], flags)
        self.statistics.load(meta["statistics"], {"ledger": tensors["ledger"].numpy()})
        self.staleness = StalenessRecord({int(r): c for r, c in meta["staleness"].items()})
        self.outcomes = Counter({Outcome[o]: int(n) for o, n in meta["outcomes"].items()})
        self.refusals = Counter({int(r): int(n) for r, n in meta["refusals"].items()})
        self.quarantined = {int(r) for r in meta.get("quarantined", ())}
        if self._round is not None and self._round.count >= self._round.pushes:
            self.close_round()  # rounds are shorter than they were

    def check(self) -> None:
        """Assert the invariants."""
        self.applied.check()
        assert 0 <= self.mean_staleness < math.inf
        assert 0 <= self.mean_norm < math.inf
        assert self.version == self.outcomes[Outcome.APPLIED] == self.staleness.all().total
        assert self.version <= self.applied.num_applied
        assert self.examples >= 0
        taken = 0 if self._round is None else self._round.count
        assert self.version - self.weights_version == taken
        assert self._round is None or taken < self._round.pushes
        if self.partition.num_features:
            assert self.statistics.num_updates == self.applied.num_applied - taken
        assert torch.isfinite(self.current.weights).all()
        assert torch.isfinite(self.current.statistics).all()
