"""The plan: which rows each mini-batch of each epoch holds, and in which order batches run.

Pure arithmetic on a few integers: nothing is read, nothing is remembered, and nothing grows with
the number of rows. Who trains on a batch is `lease`'s to say, and where a row lies is `reader`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shuffler.errors import PlanError
from shuffler.keys import stream_key
from shuffler.permutation import Permutation

Strategy = Literal["pairwise", "fixed"]
PastBound = Literal["error", "rekey"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The mini-batches of a dataset of `num_rows` rows, for every epoch.

    With B = `batch_size` and q = ceil(num_rows / B), the rows stand as B groups of q: group g is
    rows [g*q, (g+1)*q). Numbers from num_rows up are holes; there are fewer than B of them and
    they are the end of the last group (of the last groups where q is smaller than their number).
    Mini-batch b of epoch e holds, from each group g, its row

        (b + s_e * g) mod q,

    where s_e is the slope of epoch e. In one epoch each group's rows are met once as b runs over
    [0, q), so every row is in exactly one mini-batch, and a batch holds B rows, or B - 1 where it
    falls on a hole (fewer only when q is smaller than the number of holes).

    **No pair meets twice.** Let row r of group g and row r' of group g' be in one mini-batch in
    two epochs, of slopes s and t. Rows of one group never meet, so g != g'. From
    b + s*g = r, b + s*g' = r', and c + t*g = r, c + t*g' = r' (all mod q) follows
    s*(g - g') = r - r' = t*(g - g'), hence (s - t) * (g - g') = 0 (mod q). Slopes are taken from
    [0, E) and groups from [0, B), so 0 < |s - t| * |g - g'| <= (E - 1) * (B - 1), which is no
    multiple of q while q > (B - 1) * (E - 1). The largest such E is `max_epochs`,
    (q - 1) // (B - 1) + 1: 1,292 epochs of ImageNet in batches of 32. (Section 4.2.1 of the batch
    normalisation paper asks for shuffling in which the same examples do not keep meeting.)

    **Order.** An epoch runs through windows: window w is batches [w*W, min((w+1)*W, q)), in each
    group a run of W rows that is contiguous modulo q, so reading it is sequential. Windows run
    in a keyed order, and so do the batches within a window; the slopes of the epochs are a keyed
    order of [0, max_epochs).

    Raises:
        PlanError: the plan cannot be laid out; the message names the value and the remedy.
    """

    num_rows: int
    """Rows of the dataset, N."""

    batch_size: int = 32
    """Rows of a mini-batch, B; the last batches may hold one fewer."""

    seed: int = 0
    """Names the slopes' order and the batches' order; the pairs' guarantee holds for any."""

    window_batches: int = 64
    """Batches of a window, W: the unit that is read and leased at once."""

    strategy: Strategy = "pairwise"
    """`pairwise`: as above. `fixed`: slope 0 in every epoch, so the same rows are always together
    and only the order of batches changes; the thing that section 4.2.1 improves on."""

    past_bound: PastBound = "error"
    """What follows epoch `max_epochs - 1`. `error`: nothing, and asking raises. `rekey`: each
    further block of `max_epochs` epochs starts from the rows of each group in a fresh keyed order.
    Within a block no pair meets twice; across blocks pairs meet as often as chance has it. Rows
    of a window then lie scattered in their group, so reading is no longer sequential: meant for
    datasets that fit the reader's cache, which are the ones that pass the bound."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_size", "window_batches"):
            value = getattr(self, name)
            if value < 1:
                raise PlanError(f"{name}={value} is not positive; give 1 or more")
        if self.num_rows < self.batch_size:
            raise PlanError(
                f"num_rows={self.num_rows} does not fill one mini-batch of "
                f"batch_size={self.batch_size}; choose a batch_size of {self.num_rows} or less"
            )
        if self.strategy not in ("pairwise", "fixed"):
            raise PlanError(f"strategy={self.strategy!r} is unknown; choose 'pairwise' or 'fixed'")
        if self.past_bound not in ("error", "rekey"):
            raise PlanError(f"past_bound={self.past_bound!r} is unknown; choose 'error' or 'rekey'")

    @property
    def num_batches(self) -> int:
        """Mini-batches of an epoch, and rows of a group: q = ceil(num_rows / batch_size)."""
        return -(-self.num_rows // self.batch_size)

    @property
    def num_windows(self) -> int:
        """Windows of an epoch; the last may be shorter than `window_batches`."""
        return -(-self.num_batches // self.window_batches)

    @property
    def max_epochs(self) -> int | None:
        """Epochs in which no pair meets twice; None where no pair is promised anything.

        That is so with batches of one row, which hold no pair, and with the `fixed` strategy.
        """
        if self.batch_size == 1 or self.strategy == "fixed":
            return None
        return (self.num_batches - 1) // (self.batch_size - 1) + 1

    def check_epochs(self, epochs: int) -> None:
        """Raise a `PlanError` if a run of `epochs` epochs would pass the bound; for start-up."""
        if epochs < 0:
            raise PlanError(f"epochs={epochs} is negative; give 0 or more")
        bound = self.max_epochs
        if bound is not None and epochs > bound and self.past_bound == "error":
            raise PlanError(
                f"epochs={epochs} passes the bound of {bound} epochs in which no two of "
                f"{self.num_rows} rows meet twice in batches of {self.batch_size}; train for "
                f"{bound} epochs or fewer, use smaller batches, or set past_bound='rekey'"
            )

    def slope(self, epoch: int) -> int:
        """Return s_e, the step from group to group of the rows of a batch of `epoch`."""
        self._check_epoch(epoch)
        bound = self.max_epochs
        if bound is None:
            return 0
        block, position = divmod(epoch, bound)
        slopes = Permutation(bound, stream_key(self.seed, "slopes", block))
        return int(slopes.forward(np.array([position]))[0])

    def rows(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return the rows of mini-batch `index` of `epoch`, one a group, in ascending order."""
        return self.rows_of(epoch, [index])[0]

    def rows_of(
        self, epoch: int, indices: NDArray[np.integer] | list[int] | tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of several mini-batches one after the other, and each one's length.

        Args:
            epoch: the epoch.
            indices: mini-batches [n], in the order wanted.

        Returns:
            rows: int64 [sum(lengths)], batch after batch, ascending within each.
            lengths: int64 [n], rows of each batch.
        """
        slope = self.slope(epoch)
        q = self.num_batches
        batches = np.asarray(indices, dtype=np.int64).reshape(-1)
        if batches.size and (batches.min() < 0 or batches.max() >= q):
            raise PlanError(
                f"batches {batches.min()}..{batches.max()} are not all in [0, {q}); "
                f"an epoch of {self.num_rows} rows has {q} mini-batches of {self.batch_size}"
            )
        groups = np.arange(self.batch_size, dtype=np.int64)
        offsets = (batches[:, None] + (slope * groups) % q) % q
        offsets = self._rekeyed(epoch, offsets)
        rows = groups * q + offsets
        exists = rows < self.num_rows
        return rows[exists], exists.sum(axis=1, dtype=np.int64)

    def window_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the windows of `epoch` in the order in which they run: int64 [num_windows]."""
        self._check_epoch(epoch)
        return Permutation(self.num_windows, stream_key(self.seed, "windows", epoch)).order()

    def window_batches_order(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the mini-batches of a window in the order in which they run: int64 [<= W]."""
        self._check_epoch(epoch)
        if not 0 <= window < self.num_windows:
            raise PlanError(
                f"window={window} is not in [0, {self.num_windows}); an epoch of "
                f"{self.num_batches} batches has {self.num_windows} windows"
            )
        start = window * self.window_batches
        size = min(self.window_batches, self.num_batches - start)
        return start + Permutation(size, stream_key(self.seed, "batches", epoch, window)).order()

    def _rekeyed(self, epoch: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Send offsets [n, batch_size] through the orders of the groups of the epoch's block.

        Each group has an order of its own: with one for all, rows of equal offset would meet in
        every block (at slope 0).
        """
        bound = self.max_epochs
        block = 0 if bound is None else epoch // bound
        if block == 0:
            return offsets
        q = self.num_batches
        columns = [
            Permutation(q, stream_key(self.seed, "group", block, g)).forward(offsets[:, g])
            for g in range(self.batch_size)
        ]
        return np.stack(columns, axis=1)

    def _check_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise PlanError(f"epoch={epoch} is negative; epochs count from 0")
        self.check_epochs(epoch + 1)
