"""Pushes as they may arrive at a partition's state, faults among them, and what they make of it."""

import copy
import json
import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED
from downpour.paramserver.partition.ranges import Partition, split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival, Version
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.statistics import StatisticsRule
from downpour.paramserver.rules.update import SGD, Momentum, Regulariser

torch.set_num_threads(1)


P, F, Q, EPOCHS = 16, 3, 6, 2


RATE = 0.5


NAN, INF = math.nan, math.inf


(PARTITION,) = split(num_parameters=P, num_features=F, num_decayed=10, num_partitions=1)


# With this rate and gradients of small integers, every weight is exact in float32.
EXACT = UpdateConfig(
    rule=SGD(),
    schedule=Schedule(learning_rate=RATE),
    statistics=StatisticsRule(window=8),
    batches_per_epoch=Q,
    epoch_examples=4 * Q,
)


# And with this one, any change of order or state anywhere shows in the last bits.
ROUGH = UpdateConfig(
    rule=Momentum(momentum=0.9),
    regulariser=Regulariser(weight_decay=0.01, clip_norm=2.0),
    schedule=Schedule(learning_rate=0.1, decay_factor=0.9, warmup_epochs=1.0),
    statistics=StatisticsRule(decay=0.7, window=8),
    batches_per_epoch=Q,
    epoch_examples=4 * Q,
)


class Bench:
    """A state over a ring of slots, as the server keeps it, but in plain memory."""

    def __init__(self, config: UpdateConfig, partition: Partition = PARTITION) -> None:
        self.slots = [
            Version(
                weights=torch.zeros(partition.num_parameters),
                statistics=torch.zeros(2, partition.num_features),
            )
            for _ in range(3)
        ]
        self.state = PartitionState(partition, config, self.slots[0])

    def apply(self, push: Push, gradient: Tensor, moments: Tensor) -> Outcome:
        return self.apply_all([(push, gradient, moments)])[0]

    def apply_all(self, arrivals: list[Arrival]) -> list[Outcome]:
        at = next(i for i, slot in enumerate(self.slots) if slot is self.state.current)
        return self.state.apply_all(arrivals, lambda: self.slots[(at + 1) % 3])


def by_way_of_json(state: PartitionState, config: UpdateConfig) -> Bench:
    """A new bench that goes on from a snapshot of `state`."""
    meta, tensors = state.dump()
    bench = Bench(config, state.partition)
    bench.state.load(json.loads(json.dumps(meta)), {n: t.clone() for n, t in tensors.items()})
    return bench


def everything(state: PartitionState) -> dict[str, object]:
    """All that a snapshot holds, comparable."""
    meta, tensors = state.dump()
    return {**copy.deepcopy(meta), **{n: t.tolist() for n, t in tensors.items()}}


@dataclass(frozen=True)
class Event:
    """A push that arrives, and what is wrong with it."""

    epoch: int
    batches: tuple[int, ...]
    fault: str
    behind: int
    replica: int

    @property
    def push(self) -> Push:
        return Push(
            mailbox=0,
            replica=self.replica,
            epoch=self.epoch,
            batches=self.batches,
            examples=4 * len(self.batches),
            version=0,
            loss={"loss": NAN, "infinite loss": INF}.get(self.fault, 1.0),
            gradient_norm=NAN if self.fault == "norm" else 3.0,
        )

    @property
    def gradient(self) -> Tensor:
        return sum((gradient_of(self.epoch, b) for b in self.batches), torch.zeros(P))

    @property
    def moments(self) -> Tensor:
        return torch.stack([moments_of(self.epoch, b) for b in self.batches])

    def spoilt(self) -> tuple[Tensor, Tensor]:
        gradient, moments = self.gradient, self.moments
        if self.fault == "gradient":
            gradient[-1] = NAN
        elif self.fault == "opposite infinities":
            gradient[0], gradient[1] = INF, -INF
        elif self.fault == "moments":
            moments[-1, 2, -1] = INF
        return gradient, moments


def gradient_of(epoch: int, batch: int) -> Tensor:
    return (torch.arange(P) * (batch + 1) + 7 * epoch).remainder(5).float() - 2


def moments_of(epoch: int, batch: int) -> Tensor:
    row = torch.arange(F, dtype=torch.float32)
    return torch.stack([torch.full((F,), 4.0), row + batch - epoch, row * 0.5 + batch + 1])


FAULTS = ["loss", "infinite loss", "norm", "gradient", "opposite infinities", "moments"]


events = st.builds(
    Event,
    epoch=st.integers(0, EPOCHS - 1),
    batches=st.lists(st.integers(0, Q - 1), min_size=1, max_size=3, unique=True).map(tuple),
    fault=st.sampled_from(["none"] * 8 + FAULTS + ["of the future", "no such batch"]),
    behind=st.integers(0, 3),
    replica=st.integers(0, 2),
)


class Oracle:
    """What a sequential run would have made of the mini-batches that count."""

    def __init__(self) -> None:
        self.settled: dict[tuple[int, int], int] = {}
        self.weights = torch.zeros(P)
        self.version = 0

    def expect(self, event: Event) -> Outcome:
        if event.fault in ("of the future", "no such batch"):
            return Outcome.REFUSED_UNKNOWN
        names = [(event.epoch, b) for b in event.batches]
        held = [n for n in names if n in self.settled]
        if held:
            return Outcome.DUPLICATE if len(held) == len(names) else Outcome.REFUSED_MIXED
        if event.fault in FAULTS:
            self.settled |= dict.fromkeys(names, REFUSED)
            return Outcome.REFUSED_LOSS if "loss" in event.fault else Outcome.REFUSED_GRADIENT
        self.settled |= dict.fromkeys(names, APPLIED)
        for name in names:
            self.weights -= RATE * gradient_of(*name)
        self.version += 1
        return Outcome.APPLIED


def arrival_of(event: Event, version: int) -> Arrival:
    """What arrives at a partition that is at `version`, or a little beyond."""
    push = replace(event.push, version=max(0, version - event.behind))
    if event.fault == "of the future":
        push = replace(push, version=version + 1)
    if event.fault == "no such batch":
        push = replace(push, batches=(*push.batches[1:], Q))
    return push, *event.spoilt()


def deliver(bench: Bench, event: Event) -> Outcome:
    return bench.apply(*arrival_of(event, bench.state.version))
