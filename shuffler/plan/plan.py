"""The plan: which rows each mini-batch of each epoch holds, and in which order batches run.

Pure arithmetic on a few integers: nothing is read, nothing is remembered, and nothing grows with
the number of rows but the orders past the bound, for which 8 bytes a row are kept. Who trains on a
batch is not known here (`cluster.controller.leases`), nor where a row lies
(`shuffler.dataset.reader`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.errors import PlanError
from downpour.shuffler.plan import orders
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.permutation import Permutation

Strategy = Literal["pairwise", "random", "within_shard", "buffer", "none"]
STRATEGIES: Final = ("pairwise", "random", "within_shard", "buffer", "none")
PastBound = Literal["auto", "error", "rekey"]

VERSION: Final = 2
"""The arithmetic of new plans; see `Plan.version`."""


SMALL_ROWS: Final = 1_000_000
"""Datasets of up to this many rows go on past their bound by themselves; see `Plan.past_bound`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The mini-batches of a dataset of `num_rows` rows, for every epoch.

    With p = `num_batches` and K = ceil(num_rows / p), the rows stand as K groups of p: group g is
    rows [g*p, (g+1)*p). Numbers from num_rows up are holes; there are fewer than p of them and they
    are the end of the last group. Mini-batch b of epoch e holds, from each group g, its row

        (b + s_e * g) mod p,

    where s_e is the slope of epoch e. In one epoch each group's rows are met once as b runs over
    [0, p), so every row is in exactly one mini-batch, and a mini-batch holds K rows, or K - 1 if it
    falls on a hole.

    **No pair meets twice.** Let row r of group g and row r' of group g' be in one mini-batch in
    two epochs, of slopes s and t. Rows of one group never meet, so g != g'. From
    b + s*g = r, b + s*g' = r', and c + t*g = r, c + t*g' = r' (all mod p) follows
    s*(g - g') = r - r' = t*(g - g'), hence d * h = 0 (mod p) with d = |s - t| and h = |g - g'|,
    that is, p / gcd(p, h) divides d. Slopes are taken from [0, E) and groups from [0, K), so
    0 < d < E and 0 < h < K. The least such d is p / G, where G is the largest gcd(p, h): each gcd
    is a divisor of p of at most h < K, and h = G attains it, so G is the largest divisor of p
    below K. Hence no pair meets twice in E epochs if E <= p / G, which is `max_epochs`. (Section
    4.2.1 of the batch normalisation paper asks for shuffling in which the same examples do not keep
    meeting.)

    **How many mini-batches.** With B = `batch_size`, at least q = ceil(num_rows / B) are needed. p
    is the least number from q up that no number in [2, K) divides: then G is 1, and the bound is p
    itself, 1,877 epochs of MNIST in mini-batches of 32 and 40,037 of ImageNet. It is close to what
    counting allows: a row meets up to B - 1 others an epoch and has num_rows - 1 to meet. So p
    hardly depends on num_rows, whereas q / G jumps with the divisors of q. The price is smaller
    mini-batches, by a thousandth on average from some thousand mini-batches up. If there is no such
    number within a sixth above q, p is the one there with the largest bound. Only fewer than about
    B * B rows can come to that: mini-batches of B rows that share at most one row with each of an
    earlier epoch need B mini-batches.

    **Order.** An epoch runs through windows: window w is batches [w*W, min((w+1)*W, p)), in each
    group a run of W rows that is contiguous modulo p, so reading it is sequential. Windows run
    in a keyed order, and so do the batches within a window; the slopes of the epochs are a keyed
    order of [0, max_epochs).

    Raises:
        PlanError: the plan cannot be laid out; the message names the value and the remedy.
    """

    num_rows: int
    """Rows of the dataset, N."""

    batch_size: int = 32
    """Most rows of a mini-batch, B; see above for how many fewer it may hold."""

    seed: int = 0
    """Names the slopes' order and the batches' order; the pairs' guarantee holds for any."""

    window_batches: int = 64
    """Batches of a window, W: the unit that is read and leased at once."""

    strategy: Strategy = "pairwise"
    """`pairwise`: as above. The others are what other loaders do, to compare with: `random`, a
    fresh uniform order each epoch; `within_shard`, shards in a fresh order and rows within each;
    `buffer`, rows in stored order through a buffer of `buffer_rows`; `none`, rows as they are
    stored, so that the same ones are always together, which section 4.2.1 improves on. With these
    the epoch's order is cut into `num_batches` batches whose sizes differ by one at most."""

    shard_rows: tuple[int, ...] = ()
    """Rows of each shard, for `within_shard`."""

    buffer_rows: int = 1000
    """Rows of the buffer, for `buffer`."""

    past_bound: PastBound = "auto"
    """What follows epoch `max_epochs - 1`. `error`: nothing, and asking raises. `rekey`: each
    further block of `max_epochs` epochs starts from the rows of each group in a fresh keyed order.
    Within a block no pair meets twice; across blocks pairs meet as often as chance has it. Rows
    of a window then lie scattered in their group, so reading is no longer sequential: meant for
    datasets that fit the reader's cache. `auto`: `rekey` up to `SMALL_ROWS` rows, else `error`."""

    version: int = VERSION
    """Arithmetic of the plan, so that a run goes on as it began. 2: as above. 1: p is q whatever
    its divisors and K is B, so there may be more holes than p, over several groups; orders past the
    bound are made by `Permutation`."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_size", "window_batches", "buffer_rows"):
            value = getattr(self, name)
            if value < 1:
                raise PlanError(f"{name}={value} is not positive; give 1 or more")
        if self.num_rows < self.batch_size:
            raise PlanError(
                f"num_rows={self.num_rows} does not fill one mini-batch of "
                f"batch_size={self.batch_size}; choose a batch_size of {self.num_rows} or less"
            )
        if self.strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise PlanError(f"strategy={self.strategy!r} is unknown; choose of {known}")
        if self.strategy == "within_shard" and sum(self.shard_rows) != self.num_rows:
            raise PlanError(
                f"shards of {sum(self.shard_rows)} rows in all do not make up num_rows="
                f"{self.num_rows}; strategy 'within_shard' needs the rows of each shard"
            )
        if self.past_bound not in get_args(PastBound):
            known = ", ".join(get_args(PastBound))
            raise PlanError(f"past_bound={self.past_bound!r} is unknown; choose of {known}")
        if self.version not in (1, VERSION):
            raise PlanError(
                f"version={self.version} of the plan is unknown here; use the version of downpour "
                "that wrote it"
            )

    @property
    def num_batches(self) -> int:
        """Mini-batches of an epoch, and rows of a group: p of the class, or ceil(N / B)."""
        if self.strategy != "pairwise" or self.version == 1:
            return -(-self.num_rows // self.batch_size)
        return group_rows(self.num_rows, self.batch_size)

    @property
    def num_groups(self) -> int:
        """Groups of rows, K, and so the rows of the largest mini-batch."""
        if self.version == 1:
            return self.batch_size
        return -(-self.num_rows // self.num_batches)

    @property
    def num_windows(self) -> int:
        """Windows of an epoch; the last may be shorter than `window_batches`."""
        return -(-self.num_batches // self.window_batches)

    @property
    def max_epochs(self) -> int | None:
        """Epochs in which no pair meets twice; None where no pair is promised anything.

        That is so with batches of one row, which hold no pair, and with other strategies.
        """
        if self.batch_size == 1 or self.strategy != "pairwise":
            return None
        return _pair_free_epochs(self.num_batches, self.num_groups)

    @property
    def goes_on(self) -> bool:
        """Whether there are epochs past `max_epochs`."""
        if self.past_bound == "auto":
            return self.num_rows <= SMALL_ROWS
        return self.past_bound == "rekey"

    def check_epochs(self, epochs: int) -> None:
        """Raise a `PlanError` if a run of `epochs` epochs would pass the bound; for start-up."""
        if epochs < 0:
            raise PlanError(f"epochs={epochs} is negative; give 0 or more")
        bound = self.max_epochs
        if bound is not None and epochs > bound and not self.goes_on:
            raise PlanError(
                f"epochs={epochs} passes the bound of {bound} epochs in which no two of "
                f"{self.num_rows} rows meet twice in mini-batches of {self.batch_size}; train for "
                f"{bound} epochs or fewer, use smaller mini-batches, or have the rows put together "
                "afresh every so many epochs with `--past-bound rekey` (past_bound='rekey' in "
                "Python), which reads them in no order"
            )

    def past_bound_line(self, epochs: int) -> str | None:
        """Return what to tell of a run of `epochs` epochs that passes the bound; None if not."""
        bound = self.max_epochs
        if bound is None or epochs <= bound or not self.goes_on:
            return None
        every = "every epoch" if bound == 1 else f"every {bound} epochs"
        return (
            f"{self.num_rows:,} rows in mini-batches of {self.batch_size} can be put together for "
            f"{bound} of the {epochs} epochs so that no two meet twice: {every} the rows are "
            "re-randomised, and pairs meet again as often as by chance"
        )

    def slope(self, epoch: int) -> int:
        """Return s_e, the step from group to group of the rows of a batch of `epoch`.

        With other strategies than `pairwise` there are no groups, and it is 0.
        """
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
        p = self.num_batches
        batches = np.asarray(indices, dtype=np.int64).reshape(-1)
        if batches.size and (batches.min() < 0 or batches.max() >= p):
            raise PlanError(
                f"batches {batches.min()}..{batches.max()} are not all in [0, {p}); "
                f"an epoch of {self.num_rows} rows has {p} mini-batches of {self.batch_size}"
            )
        self._check_epoch(epoch)
        if self.strategy != "pairwise":
            return self._ordered(epoch, batches)
        slope = self.slope(epoch)
        groups = np.arange(self.num_groups, dtype=np.int64)
        firsts = groups * p
        offsets = (batches[:, None] + (slope * groups) % p) % p
        block = epoch // (self.max_epochs or 1 + epoch)
        rows = self._rekeyed(block, firsts + offsets) if block else firsts + offsets
        exists = rows < self.num_rows
        return rows[exists], exists.sum(axis=1, dtype=np.int64)

    def window_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the windows of `epoch` in the order in which they run: int64 [num_windows]."""
        self._check_epoch(epoch)
        if self.strategy != "pairwise":
            return np.arange(self.num_windows, dtype=np.int64)
        return self._windows(epoch).order()

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
        if self.strategy != "pairwise":
            return start + np.arange(size, dtype=np.int64)
        return start + Permutation(size, stream_key(self.seed, "batches", epoch, window)).order()

    def next_windows(self, epoch: int, window: int, count: int) -> list[tuple[int, int]]:
        """Return the windows (epoch, window) that run after one, at most `count`.

        The next epoch's follow the last of an epoch, as far as the plan reaches.
        """
        found: list[tuple[int, int]] = []
        at = self.turn_of(epoch, window)
        while len(found) < count:
            at += 1
            if at == self.num_windows:
                epoch, at = epoch + 1, 0
                if self.max_epochs == epoch and not self.goes_on:
                    break
            found.append((epoch, self.window_at(epoch, at)))
        return found

    def window_at(self, epoch: int, turn: int) -> int:
        """Return the window that runs at `turn` of an epoch, in [0, num_windows)."""
        if self.strategy != "pairwise":
            return turn
        return int(self._windows(epoch).forward(np.array([turn]))[0])

    def turn_of(self, epoch: int, window: int) -> int:
        """Return when a window runs: the inverse of `window_at`."""
        if self.strategy != "pairwise":
            return window
        return int(self._windows(epoch).inverse(np.array([window]))[0])

    def locate(self, epoch: int, place: int) -> tuple[int, int]:
        """Return where mini-batch number `place` of an epoch, as they run, is to be found.

        In constant time: the turn of its window, and its number in that window's order.
        """
        if not 0 <= place < self.num_batches:
            raise PlanError(f"place={place} is not in [0, {self.num_batches}), an epoch's batches")
        self._check_epoch(epoch)
        size = self.window_batches
        short = self.turn_of(epoch, self.num_windows - 1)  # the only one that may be shorter
        missing = self.num_windows * size - self.num_batches
        if place < (short + 1) * size - missing:
            return divmod(place, size)
        return divmod(place + missing, size)

    def _windows(self, epoch: int) -> Permutation:
        return Permutation(self.num_windows, stream_key(self.seed, "windows", epoch))

    def _ordered(
        self, epoch: int, batches: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cut `batches` out of the epoch's order, whatever it is."""
        starts = orders.even_bounds(self.num_rows, self.num_batches, batches)
        lengths = orders.even_bounds(self.num_rows, self.num_batches, batches + 1) - starts
        firsts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        places = firsts + np.arange(len(firsts))
        if self.strategy == "random":
            places = orders.random_rows(self.seed, epoch, self.num_rows, places)
        elif self.strategy == "within_shard":
            places = orders.within_shard_rows(self.seed, epoch, self.shard_rows, places)
        elif self.strategy == "buffer":
            places = orders.buffer_rows(self.seed, epoch, self.num_rows, self.buffer_rows, places)
        return places, lengths

    def _rekeyed(self, block: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Send rows [n, K] through the orders of the groups of a block from 1 up.

        Each group has an order of its own: with one for all, rows of equal offset would meet in
        every block (at slope 0).
        """
        q, groups = self.num_batches, self.num_groups
        if self.version == 1:
            return _permuted_groups(self.seed, block, q, groups).take(rows)
        return orders.group_orders(stream_key(self.seed, "groups", block), q, groups).take(rows)

    def _check_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise PlanError(f"epoch={epoch} is negative; epochs count from 0")
        self.check_epochs(epoch + 1)


@functools.lru_cache(maxsize=64)
def group_rows(num_rows: int, batch_size: int) -> int:
    """Return how many mini-batches `num_rows` rows are cut into: p of `Plan`.

    Args:
        num_rows: N, at least `batch_size`.
        batch_size: most rows of a mini-batch, B.
    """
    least = -(-num_rows // batch_size)
    best, longest = least, 0
    for size in range(least, least + least // 6 + 1):
        bound = _pair_free_epochs(size, -(-num_rows // size))
        if bound == size:
            return size
        if bound > longest:
            best, longest = size, bound
    return best


@functools.lru_cache(maxsize=1024)
def _pair_free_epochs(group_size: int, num_groups: int) -> int:
    """Return p / G, with p = `group_size` and G its largest divisor below `num_groups`.

    With a single group no pair ever meets; p is returned.
    """
    below = np.arange(min(num_groups - 1, group_size), 0, -1)
    divisors = below[group_size % below == 0]
    return group_size // int(divisors[0]) if divisors.size else group_size


@functools.lru_cache(maxsize=2)
def _permuted_groups(seed: int, block: int, size: int, num_groups: int) -> NDArray[np.int64]:
    """The orders of a block of version 1, int64 [num_groups, size], as numbers of rows."""
    orders_of = [
        Permutation(size, stream_key(seed, "group", block, group)).order() + group * size
        for group in range(num_groups)
    ]
    table = np.stack(orders_of)
    table.setflags(write=False)
    return table
