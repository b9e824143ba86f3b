"""Delay compensation: the equations by hand, and any order of arrival against an oracle."""

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from downpour.paramserver.errors import BadConfiguration, BadSnapshot
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival, Version
from downpour.paramserver.rules.compensation import EPSILON, Compensation, make_compensation
from downpour.paramserver.rules.policy import PolicyName, StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD, Momentum, Regulariser, Rule
from downpour.paramserver.transport.shared.published import NUM_BUFFERS, PublishedWeights
from tests.helpers.close import assert_close

torch.set_num_threads(1)

P, BOUND = 24, 6
ROOM = torch.empty(2, 1000)
(PARTITION,) = split(num_parameters=P, num_features=0, num_decayed=10, num_partitions=1)
ADAPTIVE = StalenessPolicy(staleness_policy="compensate", staleness_bound=BOUND)
CONSTANT = replace(ADAPTIVE, compensation="constant", compensation_lambda=0.5)


def config(policy: StalenessPolicy, rule: Rule | None = None) -> UpdateConfig:
    return UpdateConfig(
        rule=rule or Momentum(momentum=0.9),
        regulariser=Regulariser(weight_decay=0.01, clip_norm=2.0),
        schedule=Schedule(learning_rate=0.1),
        policy=policy,
        batches_per_epoch=1000,
        epoch_examples=1000,
    )


def test_the_constant_variant_by_hand() -> None:
    gradient = torch.tensor([1.0, -2.0, 0.5])
    weights, pulled = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 4.0])
    one = Compensation(strength=0.5, decay=None)
    one.apply(gradient, weights, pulled, one.init(3), ROOM)
    # g + 0.5 * g*g * (w - w_pulled): 1 + 0.5*1*2, -2 + 0.5*4*-1, 0.5 + 0.5*0.25*-4
    assert gradient.tolist() == [2.0, -4.0, 0.0]


def test_the_adaptive_variant_by_hand() -> None:
    one = Compensation(strength=2.0, decay=0.75)
    state = one.init(2)
    state["mean_square"].copy_(torch.tensor([4.0, 1.0]))
    gradient = torch.tensor([2.0, 4.0])
    one.apply(gradient, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), state, ROOM)
    squares = [0.75 * 4 + 0.25 * 4, 0.75 * 1 + 0.25 * 16]
    assert state["mean_square"].tolist() == squares
    expected = [
        2 + 2 / (squares[0] + EPSILON) ** 0.5 * 4 * 1,
        4 + 2 / (squares[1] + EPSILON) ** 0.5 * 16 * -1,
    ]
    assert_close(gradient, torch.tensor(expected))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_sum_over_mini_batches_is_so_many_times_their_compensated_mean(
    decay: float | None,
) -> None:
    one = Compensation(strength=0.3, decay=decay)
    torch.manual_seed(1)
    mean, weights, pulled = torch.randn(8), torch.randn(8), torch.randn(8)
    total, alone, together = 4 * mean, one.init(8), one.init(8)
    one.apply(mean, weights, pulled, alone, ROOM)
    one.apply(total, weights, pulled, together, ROOM, 4)
    assert_close(total, 4 * mean)
    for name, value in alone.items():
        assert_close(together[name], value)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_long_vectors_are_corrected_as_short_ones_are(
    monkeypatch: pytest.MonkeyPatch, decay: float | None
) -> None:
    one = Compensation(strength=0.3, decay=decay)
    torch.manual_seed(1)
    gradient, weights, pulled = torch.randn(1000), torch.randn(1000), torch.randn(1000)
    whole, cut = gradient.clone(), gradient.clone()
    state, other = one.init(1000), one.init(1000)
    one.apply(whole, weights, pulled, state, ROOM)
    monkeypatch.setattr("downpour.paramserver.rules.compensation.BLOCK", 96)
    one.apply(cut, weights, pulled, other, ROOM)
    assert_close(cut, whole)
    for name, value in state.items():
        assert_close(other[name], value)


def test_a_correction_that_overflows_is_left_out() -> None:
    one = Compensation(strength=1.0, decay=None)
    gradient = torch.tensor([1e13, 1.0])
    one.apply(gradient, torch.full((2,), 1e20), torch.zeros(2), {}, ROOM)
    assert gradient.tolist() == [torch.tensor(1e13).item(), 1.0]


class Bench:
    """A state whose versions lie in the slots that a partition publishes them in."""

    def __init__(self, policy: StalenessPolicy, rule: Rule | None = None) -> None:
        self.config = config(policy, rule)
        self.published = PublishedWeights(P, 0, kept=policy.versions_kept)
        self.state = PartitionState(PARTITION, self.config, self.published.versions[0])

    def room(self) -> Version:
        return self.published.versions[self.published.begin()]

    def take(self, arrivals: list[Arrival]) -> list[Outcome]:
        before = self.state.version
        outcomes = self.state.apply_all(arrivals, self.room)
        if self.state.version > before:
            self.published.commit(self.state.version)
        return outcomes


class Oracle:
    """One update after the other, on weights that whoever pulled them has kept."""

    def __init__(self, of: UpdateConfig) -> None:
        self.config, self.weights = of, torch.zeros(P)
        self.compensation = make_compensation(of.policy)
        self.state = of.rule.init(P)
        if self.compensation is not None:
            self.state |= self.compensation.init(P)

    def apply(self, push: Push, gradient: Tensor, pulled: Tensor, moved: bool) -> None:
        regulariser = self.config.regulariser
        regulariser.clip(gradient, push.gradient_norm, len(push.batches))
        if self.compensation is not None:
            args = (gradient, self.weights, pulled if moved else None, self.state, ROOM)
            self.compensation.apply(*args, len(push.batches))
        regulariser.decay(gradient, self.weights, PARTITION.num_decayed, len(push.batches))
        new = torch.empty(P)
        self.config.rule.update(self.weights, gradient, self.state, 0.1, new)
        self.weights = new


def push(number: int, version: int, gradient: Tensor, count: int = 1) -> Push:
    return Push(
        mailbox=0,
        replica=0,
        epoch=0,
        batches=tuple(range(count * number, count * number + count)),
        examples=count,
        version=version,
        loss=1.0,
        gradient_norm=gradient.norm().item(),
    )


@pytest.mark.parametrize("policy", [ADAPTIVE, CONSTANT])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("packets", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_pulls_and_packets_to_the_bit(
    policy: StalenessPolicy, count: int, packets: int, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    bench = Bench(policy)
    oracle = Oracle(bench.config)
    held: list[tuple[int, Tensor]] = []
    number = dropped = compensated = 0
    for _ in range(150):
        pulled_now = bench.state.version, bench.state.current.weights.clone()
        held += [pulled_now] * rng.randint(1, packets)
        rng.shuffle(held)
        taken = [held.pop() for _ in range(rng.randint(0, min(packets, len(held))))]
        arrivals: list[Arrival] = []
        for version, _ in taken:
            gradient = torch.randn(P)
            arrivals.append(
                (push(number, version, gradient, count), gradient, torch.zeros(count, 3, 0))
            )
            number += 1
        gradients, now = [g.clone() for _, g, _ in arrivals], bench.state.version
        outcomes = bench.take(arrivals)
        for (arrival, _, _), gradient, (version, pulled), outcome in zip(
            arrivals, gradients, taken, outcomes, strict=True
        ):
            if now - version > BOUND:
                assert outcome is Outcome.REFUSED_STALE
                dropped += 1
                continue
            assert outcome is Outcome.APPLIED
            oracle.apply(arrival, gradient, pulled, moved=now != version)
            compensated += now != version
            now += 1
        assert bench.state.version == now
        assert torch.equal(bench.state.current.weights, oracle.weights)
    assert dropped > 5
    assert compensated > 25
    for name, value in oracle.state.items():
        assert torch.equal(bench.state.vectors.rule_state[name], value)
    bench.state.check()


def test_without_staleness_nothing_is_compensated() -> None:
    plain, other = Bench(StalenessPolicy()), Bench(ADAPTIVE)
    torch.manual_seed(0)
    for number in range(30):
        gradient = torch.randn(P)
        for bench in (plain, other):
            bench.take([(push(number, number, gradient), gradient.clone(), torch.zeros(1, 3, 0))])
    assert torch.equal(plain.state.current.weights, other.state.current.weights)


def test_a_restored_state_goes_on_to_the_bit_and_drops_what_it_does_not_remember() -> None:
    torch.manual_seed(0)
    bench = Bench(ADAPTIVE)
    for number in range(20):
        gradient = torch.randn(P)
        bench.take([(push(number, max(0, number - 3), gradient), gradient, torch.zeros(1, 3, 0))])
    again = Bench(ADAPTIVE)
    meta, tensors = bench.state.dump()
    again.state.load(json.loads(json.dumps(meta)), tensors)
    again.published.publish(again.state.version)
    late = torch.randn(P)
    old = [(push(20, 19, late), late, torch.zeros(1, 3, 0))]
    assert again.take(old) == [Outcome.REFUSED_STALE]
    for number in range(21, 40):
        gradient, version = torch.randn(P), max(20, number - 4)
        for one in (bench, again):
            arrival = (push(number, version, gradient), gradient.clone(), torch.zeros(1, 3, 0))
            assert one.take([arrival]) == [Outcome.APPLIED]
    for name, tensor in bench.state.dump()[1].items():
        assert torch.equal(tensor, again.state.dump()[1][name]), name


def test_a_snapshot_of_another_policy_is_refused() -> None:
    plain, other = Bench(StalenessPolicy()), Bench(ADAPTIVE)
    with pytest.raises(BadSnapshot, match="resume with the rule, the staleness policy"):
        other.state.load(*plain.state.dump())
    Bench(CONSTANT).state.load(*plain.state.dump())  # which keeps nothing


def test_versions_that_may_be_needed_are_not_written_over() -> None:
    published = PublishedWeights(8, 0, kept=5)
    assert published.num_buffers == NUM_BUFFERS + 5
    rng = random.Random(1)
    slots, used = {0: 0}, set[int]()
    version = 0
    for _ in range(400):
        pinned = rng.sample(range(published.num_buffers), rng.randint(0, 4))
        slot = published.begin(pinned)
        assert slot not in {s for v, s in slots.items() if v >= version - 5}
        version += rng.choice((1, 1, 2, 4))
        published.commit(version)
        slots[version] = slot
        used.add(slot)
    # With four updates a version, a quarter of the versions is published.
    for _ in range(40):
        version += 4
        published.begin()
        published.commit(version)
        slots[version] = published.current_buffer
    assert len({slots[v] for v in list(slots)[-20:]}) <= 4


def test_memory_is_reused_in_the_order_in_which_caches_like_it() -> None:
    """Of a bound that is far beyond what is in flight, no more than the bound is ever touched."""
    published = PublishedWeights(8, 0, kept=50)
    for version in range(1, 200):
        published.begin()
        published.commit(version)
    assert published.current_buffer <= 52


def test_a_shell_that_takes_back_what_is_needed_loses_it() -> None:
    """What was written over is not remembered: a push on it is dropped, never wrongly corrected."""
    slots = [Version(weights=torch.zeros(P), statistics=torch.zeros(2, 0)) for _ in range(2)]
    state = PartitionState(PARTITION, config(ADAPTIVE, SGD()), slots[0])
    for number, slot in ((0, slots[1]), (1, slots[0]), (2, slots[1])):
        gradient = torch.ones(P)
        fresh = push(number, number, gradient)
        outcome = state.apply(fresh, gradient, torch.zeros(1, 3, 0), iter([slot]).__next__)
        assert outcome is Outcome.APPLIED
    gradient = torch.ones(P)
    assert (
        state.apply(push(3, 1, gradient), gradient, torch.zeros(1, 3, 0), lambda: slots[0])
        is Outcome.REFUSED_STALE
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"compensation_lambda": -1.0}, "compensation lambda is -1.0: give a finite number"),
        ({"compensation_lambda": float("nan")}, "compensation lambda is nan: give a finite number"),
        ({"compensation_decay": 1.0}, "compensation decay is 1.0: give a number from 0"),
    ],
)
def test_bad_values_are_refused(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(BadConfiguration, match=words):
        StalenessPolicy(staleness_policy="compensate", **wrong)  # type: ignore[arg-type]


def test_the_papers_strengths_are_the_defaults() -> None:
    assert ADAPTIVE.strength == 2.0
    assert replace(ADAPTIVE, compensation="constant").strength == 0.04
    others: tuple[PolicyName, ...] = ("asynchronous", "bounded", "drop", "scale")
    for name in others:
        assert make_compensation(StalenessPolicy(staleness_policy=name)) is None
        assert StalenessPolicy(staleness_policy=name).versions_kept == 0
