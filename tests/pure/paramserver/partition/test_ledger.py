"""The ledger alone decides as it does within a partition: what the simulator rests on."""

import json
import math
import random
from collections.abc import Iterator

import pytest
import torch

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ledger import Ledger, RoundLedger, make_ledger
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.staleness import StalenessRecord
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.policy import Guard, PolicyName, StalenessPolicy
from tests.helpers.seeds import seeds

P, Q, EPOCHS = 16, 12, 2
POLICIES: tuple[PolicyName, ...] = ("asynchronous", "bounded", "drop", "scale", "synchronous")


def config(name: PolicyName) -> UpdateConfig:
    return UpdateConfig(
        policy=StalenessPolicy(staleness_policy=name, staleness_bound=3, round_pushes=5),
        guard=Guard(quarantine_after=2),
        batches_per_epoch=Q,
        epoch_examples=4 * Q,
        epochs=EPOCHS,
    )


def pushes(ledger: Ledger, seed: int, count: int = 120) -> Iterator[Push]:
    """Pushes as they may come, made one by one, as the version that they bear depends on it."""
    rng = random.Random(seed)
    for _ in range(count):
        yield Push(
            mailbox=0,
            replica=rng.randrange(3),
            epoch=rng.randrange(EPOCHS),
            batches=(rng.randrange(Q + 1),),
            examples=rng.choice((3, 4)),
            version=max(0, ledger.weights_version + rng.choice((-5, -2, -1, 0, 0, 0, 2))),
            loss=rng.choice((math.nan, *[1.0] * 9)),
            gradient_norm=4.0,
        )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", seeds(2, 10))
def test_without_vectors_it_comes_to_the_same(name: PolicyName, seed: int) -> None:
    (partition,) = split(num_parameters=P, num_features=0, num_decayed=0, num_partitions=1)
    current = Version(weights=torch.zeros(P), statistics=torch.zeros(2, 0))
    state = PartitionState(partition, config(name), current)
    alone = make_ledger(config(name))
    seen = set()
    for push in pushes(alone, seed):
        outcome = state.apply(push, torch.ones(P), torch.zeros(1, 3, 0))
        seen.add(outcome)
        assert alone.take(push) is outcome
        assert alone.rate() == state.ledger.rate()
        assert (alone.version, alone.weights_version) == (state.version, state.weights_version)
        meta, flags = alone.dump()
        theirs, their_flags = state.ledger.dump()
        assert meta == theirs
        assert {e: f.tolist() for e, f in flags.items()} == {
            e: f.tolist() for e, f in their_flags.items()
        }
        alone.check()
    assert {Outcome.APPLIED, Outcome.DUPLICATE, Outcome.REFUSED_LOSS} <= seen


@pytest.mark.parametrize("name", POLICIES)
def test_restored_at_any_push_it_goes_on_the_same(name: PolicyName) -> None:
    whole = make_ledger(config(name))
    for push in pushes(whole, 3):
        meta, flags = whole.dump()
        restored = make_ledger(config(name), StalenessRecord({9: [7]}))  # which is overwritten
        restored.load(
            {**json.loads(json.dumps(meta)), "quarantined": sorted(whole.quarantined)}, flags
        )
        restored.check()
        assert restored.take(push) is whole.take(push)
        assert restored.dump()[0] == whole.dump()[0]
        assert restored.quarantined == whole.quarantined


def test_a_snapshot_of_an_earlier_release_is_taken() -> None:
    whole = make_ledger(config("asynchronous"))
    for push in pushes(whole, 3):
        whole.take(push)
    meta, flags = whole.dump()
    plain = json.loads(json.dumps(meta))
    plain["staleness"] = plain.pop("staleness_bins")  # so few versions have a bin each
    restored = make_ledger(config("asynchronous"))
    restored.load(plain, flags)
    restored.check()
    assert restored.dump()[0] == meta


def test_a_round_ends_when_it_is_full_or_nothing_is_to_come() -> None:
    ledger = make_ledger(config("synchronous"))
    assert isinstance(ledger, RoundLedger)
    starts = []
    for number in range(EPOCHS * Q):  # 24 mini-batches, 5 to a round
        epoch, batch = divmod(number, Q)
        push = Push(
            mailbox=0,
            replica=0,
            epoch=epoch,
            batches=(batch,),
            examples=4,
            version=ledger.weights_version,
            loss=1.0,
            gradient_norm=1.0,
        )
        assert ledger.take(push) is Outcome.APPLIED
        starts.append(ledger.weights_version)
    assert starts == [5 * ((n + 1) // 5) for n in range(23)] + [24]
    assert ledger.round_count == ledger.round_examples == 0
