"""BN statistics: moving averages against closed forms, the recent against numpy on raw values."""

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.statistics import (
    NUM_BLOCKS,
    BatchStatistics,
    RecentMoments,
    StatisticsRule,
)
from tests.helpers.close import assert_close

torch.set_num_threads(1)

Values = npt.NDArray[np.float64]
F = 5


def raw_batches(num: int, seed: int = 0) -> list[Values]:
    """Raw values [m, F] of mini-batches of different lengths; means far from 0 and drifting."""
    rng = np.random.default_rng(seed)
    scale, offset = np.array([1, 10, 0.1, 3, 1]), np.array([0, 1e3, -5, 1e4, 7])
    return [
        rng.normal(size=(int(rng.integers(2, 9)), F)) * scale + offset + scale * 0.1 * i
        for i in range(num)
    ]


def moments_of(values: Values) -> Values:
    """[3, F]: count, mean, unbiased variance. float64, so that nothing is lost on the way."""
    return np.stack([np.full(F, len(values)), values.mean(0), values.var(0, ddof=1)])


def pushed(values: Values) -> Tensor:
    """As a push carries them: float32."""
    return torch.from_numpy(moments_of(values).astype(np.float32))


class TestMovingAverages:
    def run(self, rule: StatisticsRule, batches: list[Values]) -> Tensor:
        statistics, slots = BatchStatistics(F, rule), [torch.full((2, F), 9.0) for _ in range(2)]
        for i, values in enumerate(batches):
            statistics.update(slots[i % 2], pushed(values), slots[1 - i % 2])
        assert statistics.num_updates == len(batches)
        return slots[len(batches) % 2]

    def test_early_on_the_plain_average_without_start_up_bias(self) -> None:
        batches = raw_batches(50)
        average = np.mean([moments_of(b)[1:] for b in batches], 0)  # Algorithm 2, E_B[.]
        found = self.run(StatisticsRule(decay=0.99), batches)
        np.testing.assert_allclose(found, average, rtol=2e-5, atol=1e-5)

    def test_later_exponential(self) -> None:
        batches = raw_batches(30)
        moments = np.stack([moments_of(b)[1:] for b in batches])
        # The first 4 are averaged; each later one gets 1/4, which decays by 3/4 from then on.
        expected = moments[:4].mean(0) * 0.75 ** (30 - 4)
        for i in range(4, 30):
            expected += moments[i] * 0.25 * 0.75 ** (29 - i)
        found = self.run(StatisticsRule(decay=0.75), batches)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)

    def test_without_memory_the_last_mini_batch(self) -> None:
        batches = raw_batches(7)
        found = self.run(StatisticsRule(decay=0.0), batches)
        assert torch.equal(found, pushed(batches[-1])[1:])

    @pytest.mark.parametrize("count", [0, 1])
    @pytest.mark.parametrize("alias", [False, True])
    def test_a_feature_without_a_variance_keeps_its_average(self, count: int, alias: bool) -> None:
        statistics = BatchStatistics(2, StatisticsRule(decay=0.5))
        current = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        out = current if alias else torch.full((2, 2), torch.nan)
        before = current.clone()
        moments = torch.tensor([[8.0, count], [3.0, 99.0], [4.0, 99.0]])
        statistics.update(current, moments, out)
        assert out.tolist() == [[3.0, 1.0], [4.0, 2.0]]
        assert alias or torch.equal(current, before)

    def test_several_mini_batches_in_one_buffer(self) -> None:
        # As a push of several mini-batches does it: all but the first are merged in place.
        batches = raw_batches(6)
        rule = StatisticsRule(decay=0.5)
        statistics, held = BatchStatistics(F, rule), torch.zeros(2, F)
        for values in batches:
            statistics.update(held, pushed(values), held)
        assert torch.equal(held, self.run(rule, batches))

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
    @pytest.mark.parametrize("alias", [False, True])
    def test_all_of_a_push_at_once_is_one_after_the_other(self, decay: float, alias: bool) -> None:
        batches, rule = raw_batches(75), StatisticsRule(decay=decay, window=4 * NUM_BLOCKS)
        one, all_ = BatchStatistics(F, rule), BatchStatistics(F, rule)
        held, slots = torch.zeros(2, F), [torch.zeros(2, F), torch.zeros(2, F)]
        for i, start in enumerate(range(0, len(batches), 3)):
            few = [pushed(values) for values in batches[start : start + 3]]
            for moments in few:
                one.update(held, moments, held)
            now, after = (slots[0], slots[0]) if alias else (slots[i % 2], slots[1 - i % 2])
            all_.update_all(now, torch.stack(few), after)
            torch.testing.assert_close(after, held, rtol=1e-5, atol=1e-5)
        assert one.num_updates == all_.num_updates == len(batches)
        assert np.array_equal(one.recent.dump()[0], all_.recent.dump()[0])
        assert one.recent.dump()[1] == all_.recent.dump()[1]

    def test_a_push_with_a_feature_without_a_variance_goes_one_by_one(self) -> None:
        moments = torch.stack([pushed(values) for values in raw_batches(3)])
        moments[1, 0, 2] = 1
        one, all_ = (BatchStatistics(F, StatisticsRule()) for _ in range(2))
        held, found = torch.zeros(2, F), torch.zeros(2, F)
        for each in moments:
            one.update(held, each, held)
        all_.update_all(torch.zeros(2, F), moments, found)
        assert torch.equal(found, held)


class TestRecentMoments:
    WINDOW = 2 * NUM_BLOCKS

    def kept(self, num: int, window: int) -> int:
        """How many of `num` updates the recent has let go of."""
        per_block = window // NUM_BLOCKS
        blocks = -(-num // per_block)
        return max(0, blocks - NUM_BLOCKS) * per_block

    @pytest.mark.parametrize("num", [1, 2, 3, 15, 16, 17, 18, 19, 40, 41])
    def test_is_numpy_over_the_raw_values_in_the_window(self, num: int) -> None:
        batches, recent = raw_batches(num), RecentMoments(F, self.WINDOW)
        for values in batches:
            recent.add(moments_of(values))
        raw, pooled = np.concatenate(batches[self.kept(num, self.WINDOW) :]), recent.pooled()
        assert pooled.count.tolist() == [len(raw)] * F
        np.testing.assert_allclose(pooled.mean, raw.mean(0), rtol=1e-12)
        np.testing.assert_allclose(pooled.m2 / (len(raw) - 1), raw.var(0, ddof=1), rtol=1e-9)

    def test_slides_by_a_block_and_never_holds_less_than_the_window_less_a_block(self) -> None:
        recent, one = RecentMoments(1, self.WINDOW), np.array([[1.0], [0.0], [0.0]])
        held = []
        for _ in range(2 * self.WINDOW):
            recent.add(one)
            held.append(int(recent.pooled().count[0]))
        filling, sliding = held[: self.WINDOW], held[self.WINDOW :]
        assert filling == list(range(1, self.WINDOW + 1))
        assert sliding == [self.WINDOW - 1, self.WINDOW] * (self.WINDOW // 2)

    def test_holds_variance_between_means_that_moving_averages_leave_out(self) -> None:
        # Two mini-batches without variance, whose means are 0 and 2: four values 0, 0, 2, 2.
        recent = RecentMoments(1, self.WINDOW)
        for mean in (0.0, 2.0):
            recent.add(np.array([[2.0], [mean], [0.0]]))
        assert recent.pooled().m2[0] == np.array([0, 0, 2, 2]).var() * 4

    def test_counts_of_zero_change_nothing_and_of_one_have_no_variance(self) -> None:
        recent = RecentMoments(2, self.WINDOW)
        recent.add(np.array([[4, 4], [1, 1], [3, 3.0]]))
        before = recent.pooled()
        recent.add(np.array([[0, 1], [1e9, 1], [1e9, 1e9]]))
        after = recent.pooled()
        assert after.count.tolist() == [4, 5]
        assert after.mean.tolist() == [1, 1]
        assert after.m2.tolist() == before.m2.tolist() == [9, 9]

    def test_an_offset_far_above_the_spread_does_not_cancel(self) -> None:
        recent, raw = (
            RecentMoments(1, self.WINDOW),
            1e8 + np.random.default_rng(0).normal(size=(8, 64)),
        )
        for row in raw:
            recent.add(np.array([[64.0], [row.mean()], [row.var(ddof=1)]]))
        naive = (raw**2).sum() - raw.size * raw.mean() ** 2
        exact = ((raw - raw.mean()) ** 2).sum()
        assert recent.pooled().m2[0] == pytest.approx(exact, rel=1e-6)
        assert naive != pytest.approx(exact, rel=0.01), "this data would not have shown it"


def updated(statistics: BatchStatistics, held: Tensor, batches: list[Values]) -> None:
    for values in batches:
        statistics.update(held, pushed(values), held)


@pytest.mark.parametrize("first", [0, 1, 15, 16, 23])
def test_dump_and_load_then_going_on_changes_nothing(first: int) -> None:
    rule, batches = StatisticsRule(decay=0.9, window=16), raw_batches(40)
    whole, held = BatchStatistics(F, rule), torch.zeros(2, F)
    updated(whole, held, batches)

    before, half = BatchStatistics(F, rule), torch.zeros(2, F)
    updated(before, half, batches[:first])
    meta, arrays = before.dump()
    after = BatchStatistics(F, rule)
    after.load(json.loads(json.dumps(meta)), {n: a.copy() for n, a in arrays.items()})
    updated(after, half, batches[first:])

    assert torch.equal(half, held)
    assert after.dump()[0] == whole.dump()[0]
    assert np.array_equal(after.dump()[1]["ledger"], whole.dump()[1]["ledger"])


def test_the_window_may_be_another_after_a_restart() -> None:
    long, batches = RecentMoments(F, 64), raw_batches(60)
    for values in batches[:6]:
        long.add(moments_of(values))
    short = RecentMoments(F, 8)  # an update to a block, where the last block holds six already
    short.load(*long.dump())
    for values in batches[6:]:
        short.add(moments_of(values))
    raw = np.concatenate(batches[-8:])
    assert short.pooled().count.tolist() == [len(raw)] * F
    np.testing.assert_allclose(short.pooled().mean, raw.mean(0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, F), (1, 3, F + 1), (1, 2, F), (3, F)])
def test_a_ledger_of_another_shape_is_not_loaded(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="recent"):
        RecentMoments(F, 16).load(np.zeros(shape), 0)


def test_features_cut_into_partitions_are_the_same_as_uncut() -> None:
    rule, batches, held = StatisticsRule(decay=0.9, window=16), raw_batches(30), torch.zeros(2, F)
    whole = BatchStatistics(F, rule)
    updated(whole, held, batches)
    for low, high in ((0, 2), (2, 2), (2, F)):
        part, piece = BatchStatistics(high - low, rule), torch.zeros(2, high - low)
        for values in batches:
            part.update(piece, pushed(values)[:, low:high], piece)
        assert torch.equal(piece, held[:, low:high])
        mine, all_ = part.recent.pooled(), whole.recent.pooled()
        for name in ("count", "mean", "m2"):
            assert np.array_equal(getattr(mine, name), getattr(all_, name)[low:high])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay": 1.0}, "statistics decay is 1.0"),
        ({"decay": float("nan")}, "statistics decay is nan"),
        ({"window": NUM_BLOCKS - 1}, "statistics window is 7"),
    ],
)
def test_bad_values_are_one_line_errors(options: dict[str, float], named: str) -> None:
    with pytest.raises(BadConfiguration, match=named) as caught:
        StatisticsRule(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("momentum", [0.1, 0.25, None, 0.0])
@pytest.mark.parametrize("seen", [0, 6])
def test_a_layers_own_momentum_and_count_are_torchs(momentum: float | None, seen: int) -> None:
    """From averages of `seen` mini-batches on; fresh ones are first made the plain average's."""
    layer = torch.nn.BatchNorm1d(3, momentum=momentum).train()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(5, 3, generator=generator) * 2 + 1 for _ in range(9)]
    held = torch.stack([torch.full((3,), 0.5), torch.full((3,), 2.0)])
    statistics = BatchStatistics(3, StatisticsRule(decay=0.5))
    count = math.inf if momentum == 0 or not seen else float(seen)
    own = np.full(3, 0.0 if momentum is None else momentum)
    if momentum is None and not seen:
        count = 0.0  # PyTorch's own first mini-batch takes the place of what was there
    statistics.begin(np.full(3, count), own)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.running_mean.copy_(held[0])
    layer.running_var.copy_(held[1])
    layer.num_batches_tracked.fill_(seen)
    for i, x in enumerate(batches):
        if momentum and count < math.inf and 1 / (count + i + 1) > momentum:
            layer.momentum = 1 / (count + i + 1)  # our plain average at the start
        else:
            layer.momentum = momentum
        layer(x)
        moments = torch.stack([torch.full((3,), 5.0), x.mean(0), x.var(0)])
        statistics.update(held, moments, held)
    assert_close(held, torch.stack([layer.running_mean, layer.running_var]))


def test_features_that_some_mini_batches_lack_count_by_themselves() -> None:
    """Of each feature, the averages are those of the mini-batches that have it, alone."""
    rule = StatisticsRule(decay=0.75)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.rand(3, 2, generator=generator) + 4 for _ in range(12)]
    there = [i % 3 != 1 for i in range(12)]
    mixed, held = BatchStatistics(2, rule), torch.ones(2, 2)
    alone, one = BatchStatistics(1, rule), torch.ones(2, 1)
    for moments, has_it in zip(batches, there, strict=True):
        pushed = moments.clone()
        if has_it:
            alone.update(one, moments[:, 1:].contiguous(), one)
        else:
            pushed[:, 1] = 0.0
        mixed.update(held, pushed, held)
    assert_close(held[:, 1:], one)
    assert mixed.num_updates == 12
    meta, arrays = mixed.dump()
    again, further = BatchStatistics(2, rule), held.clone()
    again.load(meta, arrays)
    mixed.update(held, batches[0], held)
    again.update(further, batches[0], further)
    assert torch.equal(held, further)
    del arrays["by_feature"]  # as an older snapshot
    again.load(meta, arrays)
    assert again.num_updates == 12
