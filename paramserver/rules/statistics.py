"""BN statistics as the server keeps them: a merge rule instead of a gradient rule.

Each push carries, for each feature, its mini-batch's moments: float32 [3, F] of count, mean and
unbiased variance. From them the server keeps two things:

* the moving averages that section 3.1 asks for, by applied updates:
  `mean <- mean + a * (mu_B - mean)`, the same for the variance, with `a = max(1 - decay, 1/(n+1))`
  for the n-th update of the feature from 0 on. Early on this is the plain average, so there is no
  start-up bias. A feature with fewer than two values in the mini-batch, which has no variance,
  keeps its average and its n: its layer was skipped, or is frozen. A layer may bring averages
  along, with its n, and a momentum of its own, which takes the place of `1 - decay`;
* the recent moments: over the last `window` updates, a monoid (count, mean, m2) merged by Chan's
  formula, float64: the pooled moments of every value seen in the window.

The two differ in meaning: Algorithm 2 averages the variances *within* mini-batches; the variance of
the recent moments includes the variance *between* their means, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.update import check_fraction

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.float64]

NUM_BLOCKS = 8
"""A window is kept as this many blocks, and slides by a block at a time."""
BY_FEATURE = "by_feature"
"""The name under which a snapshot has updates and momentum of each feature."""
RULES = -1.0
"""In place of a layer's own momentum: it has none, and the rule's decay holds."""
MAX_PENDING = 32
"""Mini-batches whose moments are merged in one go."""


@dataclass(frozen=True, kw_only=True)
class StatisticsRule:
    """How BN statistics are aggregated."""

    decay: float = field(default=0.99, metadata={"cli": "statistics-decay"})
    """Share of a moving average kept at each applied mini-batch, in [0, 1)."""
    window: int = field(default=1024, metadata={"cli": "statistics-window"})
    """Updates that the recent moments look back on."""

    def __post_init__(self) -> None:
        check_fraction("statistics decay", self.decay)
        if self.window < NUM_BLOCKS:
            raise BadConfiguration(
                f"statistics window is {self.window}: give at least {NUM_BLOCKS}"
            )


class Block:
    """(count, mean, m2) of each feature: a monoid under `merge`, all float64 [F]."""

    def __init__(self, num_features: int) -> None:
        """The empty block."""
        self.count = np.zeros(num_features)
        self.mean = np.zeros(num_features)
        self.m2 = np.zeros(num_features)

    def merge(self, count: Array, mean: Array, m2: Array) -> None:
        """Take in another set of values, float64 [F] each, by Chan's formula.

        Counts of 0 change nothing.
        """
        total = self.count + count
        share = count / np.maximum(total, 1.0)
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * (self.count * share)
        self.mean += delta * share
        self.count = total


class RecentMoments:
    """Pooled moments over (about) the last `window` updates."""

    def __init__(self, num_features: int, window: int) -> None:
        """Nothing seen yet."""
        self._num_features = num_features
        self._per_block = max(1, window // NUM_BLOCKS)
        self._blocks: deque[Block] = deque([Block(num_features)], maxlen=NUM_BLOCKS)
        self._in_block = 0
        self._pending = np.zeros((min(MAX_PENDING, self._per_block), 3, num_features))
        self._num_pending = 0

    def add(self, moments: npt.NDArray[np.float32] | Array) -> None:
        """Take in one mini-batch's moments, [3, F]: count, mean, unbiased variance."""
        if self._in_block + self._num_pending >= self._per_block:  # more is possible after `load`
            self._merge_pending()
            self._blocks.append(Block(self._num_features))
            self._in_block = 0
        self._pending[self._num_pending] = moments
        self._num_pending += 1
        if self._num_pending == len(self._pending):
            self._merge_pending()

    def add_all(self, moments: npt.NDArray[np.float32]) -> None:
        """Take in those of several mini-batches in their order, [k, 3, F]."""
        stop = self._num_pending + len(moments)
        if stop >= len(self._pending) or self._in_block + stop > self._per_block:
            for each in moments:
                self.add(each)
            return
        self._pending[self._num_pending : stop] = moments
        self._num_pending = stop

    def _merge_pending(self) -> None:
        """Merge what is pending: many mini-batches at once cost little more than one."""
        if not self._num_pending:
            return
        counts, means, variances = self._pending[: self._num_pending].swapaxes(0, 1)
        count = counts.sum(axis=0)
        mean = (counts * means).sum(axis=0) / np.maximum(count, 1.0)
        within = variances * np.maximum(counts - 1.0, 0.0)
        m2 = (within + counts * np.square(means - mean)).sum(axis=0)
        self._blocks[-1].merge(count, mean, m2)
        self._in_block += self._num_pending
        self._num_pending = 0

    def pooled(self) -> Block:
        """Return everything in the window, merged."""
        self._merge_pending()
        whole = Block(self._num_features)
        for block in self._blocks:
            whole.merge(block.count, block.mean, block.m2)
        return whole

    def dump(self) -> tuple[Array, int]:
        """Return what `load` takes: float64 [blocks, 3, F], and the updates in the last block."""
        self._merge_pending()
        return np.stack([np.stack([b.count, b.mean, b.m2]) for b in self._blocks]), self._in_block

    def load(self, blocks: Array, in_block: int) -> None:
        """Go on from what `dump` gave.

        Raises:
            ValueError: `blocks` is of another shape than [blocks, 3, F].
        """
        if not len(blocks) or blocks.shape[1:] != (3, self._num_features):
            raise ValueError(f"the recent moments are {list(blocks.shape)}")
        self._num_pending = 0
        self._blocks.clear()
        for count, mean, m2 in blocks:
            block = Block(self._num_features)
            block.count, block.mean, block.m2 = count.copy(), mean.copy(), m2.copy()
            self._blocks.append(block)
        self._in_block = in_block


class BatchStatistics:
    """One partition's BN statistics. The caller owns the moving averages, float32 [2, F]."""

    def __init__(self, num_features: int, rule: StatisticsRule) -> None:
        """Nothing seen yet."""
        self.rule = rule
        self.num_updates = 0
        self.recent = RecentMoments(num_features, rule.window)
        self._num_features = num_features
        self._seen: Array | None = None
        """Updates of each feature, float64 [F]; None if all have had all of them."""
        self._momentum: Array = np.full(num_features, RULES)
        """The layer's own, float64 [F], or `RULES`."""

    def begin(self, seen: Array, momentum: Array) -> None:
        """Start from averages that were brought along.

        Args:
            seen: Mini-batches that they are averages of, float64 [F]; inf for so many that one more
                weighs as little as any.
            momentum: Of each feature's layer, float64 [F]; 0 keeps the plain average, `RULES` takes
                the rule's.
        """
        if seen.any() or (momentum != RULES).any():
            self._seen, self._momentum = seen.copy(), momentum.copy()

    def update(self, current: Tensor, moments: Tensor, out: Tensor) -> None:
        """Merge a mini-batch's moments into the moving averages.

        Args:
            current: The averages, float32 [2, F].
            moments: Of the mini-batch, float32 [3, F].
            out: Where to write the new averages, float32 [2, F]; may be `current`.
        """
        import torch

        new, values = moments[1:], moments.numpy()
        if self._seen is not None or (values.size and values[0].min() < 2):
            new = torch.where(moments[0] < 2, current, new)
            torch.lerp(current, new, torch.from_numpy(self._weights(values[0])), out=out)
        else:
            weight = max(1.0 - self.rule.decay, 1.0 / (self.num_updates + 1))
            torch.lerp(current, new, weight, out=out)
        self.recent.add(values)
        self.num_updates += 1

    def update_all(self, current: Tensor, moments: Tensor, out: Tensor) -> None:
        """Merge the moments of several mini-batches, one after the other, up to rounding.

        With weights a_i for the i-th, the averages become
        `prod(1 - a_i) * current + sum(a_i * prod over j > i of (1 - a_j) * moments_i)`.

        Args:
            current: The averages, float32 [2, F].
            moments: Of the mini-batches, float32 [k, 3, F].
            out: Where to write the new averages, float32 [2, F]; may be `current`.
        """
        values = moments.numpy()
        count = len(values)
        if count < 2 or self._seen is not None or values[:, 0].min(initial=2) < 2:
            for i in range(count):  # iterating over a tensor is slow
                self.update(current, moments[i], out)
                current = out
            return
        shares, kept = np.empty(count, np.float32), 1.0
        for i in range(count - 1, -1, -1):
            weight = max(1.0 - self.rule.decay, 1.0 / (self.num_updates + i + 1))
            shares[i] = kept * weight
            kept *= 1.0 - weight
        averages = out.numpy()
        np.multiply(current.numpy(), np.float32(kept), out=averages)
        averages += np.dot(shares, values[:, 1:].reshape(count, -1)).reshape(averages.shape)
        self.recent.add_all(values)
        self.num_updates += count

    def _weights(self, counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The weight of each feature's new moments, float32 [F]; counts them."""
        if self._seen is None:
            self._seen = np.full(self._num_features, float(self.num_updates))
        least = np.where(self._momentum == RULES, 1.0 - self.rule.decay, self._momentum)
        weights = np.maximum(least, 1.0 / (self._seen + 1.0))
        self._seen += counts >= 2
        return weights.astype(np.float32)

    def drift(self, current: Tensor) -> float:
        """Mean over features of `|moving mean - pooled mean| / sqrt(pooled variance)`.

        `current` are the moving averages [2, F]; pooled are the recent moments. 0 if
        there are no features, or nothing has been seen of them.
        """
        pooled = self.recent.pooled()
        known = pooled.count > 1
        if not known.any():
            return 0.0
        variance = pooled.m2[known] / (pooled.count[known] - 1.0)
        away = np.abs(current[0].numpy()[known] - pooled.mean[known])
        return float(np.mean(away / np.sqrt(np.maximum(variance, 1e-12))))

    def dump(self) -> tuple[dict[str, int], dict[str, Array]]:
        """Return metadata and arrays that `load` takes.

        `ledger` is float64 [blocks, 3, F], `by_feature` float64 [2, F]: updates and momentum.
        """
        blocks, in_block = self.recent.dump()
        whole = np.full(self._num_features, float(self.num_updates))
        by_feature = np.stack([whole if self._seen is None else self._seen, self._momentum])
        arrays = {"ledger": blocks, BY_FEATURE: by_feature}
        return {"num_updates": self.num_updates, "in_block": in_block}, arrays

    def load(self, meta: Mapping[str, int], arrays: Mapping[str, Array]) -> None:
        """Go on from what `dump` gave; an older one counted no feature by itself.

        Raises:
            LookupError, ValueError: No `dump` gave this.
        """
        self.num_updates = int(meta["num_updates"])
        self._seen, self._momentum = None, np.full(self._num_features, RULES)
        if BY_FEATURE in arrays:
            by_feature = arrays[BY_FEATURE]
            if by_feature.shape != (2, self._num_features) or by_feature.dtype != np.float64:
                raise ValueError(f"the counts by feature are {list(by_feature.shape)}")
            seen, momentum = by_feature
            if not ((seen == self.num_updates).all() and (momentum == RULES).all()):
                self._seen, self._momentum = seen.copy(), momentum.copy()
        self.recent.load(arrays["ledger"], int(meta["in_block"]))
