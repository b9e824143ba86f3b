"""What a simulation is given: what things cost, where they run, how often they die."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from downpour.cluster.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Durations: a log-normal distribution, or the mean itself where there is no spread."""

    mean_s: float
    """Mean, in seconds."""
    spread: float = 0.0
    """Standard deviation over the mean."""

    def __post_init__(self) -> None:
        if not 0 <= self.mean_s < math.inf or not 0 <= self.spread < math.inf:
            raise ValueError(
                f"a mean of {self.mean_s} s with a spread of {self.spread}: give numbers from 0 on"
            )

    def draw(self, rng: random.Random) -> float:
        """One duration, in seconds.

        ln X is normal with variance s = ln(1 + spread^2) and mean ln(mean) - s / 2, so that X has
        this mean and this spread.
        """
        if not self.spread or not self.mean_s:
            return self.mean_s
        variance = math.log1p(self.spread**2)
        return rng.lognormvariate(math.log(self.mean_s) - variance / 2, math.sqrt(variance))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Processor time, and bytes on the way."""

    step: Spread
    """Of a step on the thread that runs them, its push and pull included."""
    slow_share: float = 0.0
    """Share of the processes whose steps take longer."""
    slow_times: float = 1.0
    """How many times longer."""
    speed_spread: float = 1.0
    """How many times longer the slowest process's steps take than the fastest's: the others' times
    lie evenly between them, on a logarithmic scale."""
    beside_s: float = 0.0
    """Of a mini-batch on other threads of the replicas' process: decoding, Ray."""
    apply: Spread
    """Of a push at a partition, on the thread that serves."""
    bell_s: float = 0.0
    """Of a packet at a partition, besides that: waking, and taking it in."""
    read_s: float = 0.0
    """Of a mini-batch at the shuffler."""
    score_s: float = 0.0
    """Of an evaluation."""
    num_parameters: int = 0
    """Of the model."""
    gradient_bytes: float = 0.0
    """Of a gradient on its way between machines, to all partitions together."""
    weights_bytes: float = 0.0
    """Of the weights on theirs."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where things run."""

    machines: int = 1
    """That replicas run on."""
    server_machines: int = 0
    """Others, that partitions run on; 0 has them on the first of the replicas'."""
    processors: int = 2
    """Of each machine."""
    background: float = 0.0
    """Processors that something else uses all the time, on the first machine."""
    bytes_per_s: float = math.inf
    """That a machine can send, and receive."""
    latency_s: float = 0.0
    """Of a message between machines."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often things die, and how long they are away. Deaths come at random, independently."""

    process_mtbf_s: float = math.inf
    """Mean time between deaths of one process of replicas."""
    partition_mtbf_s: float = math.inf
    """Mean time between deaths of one partition."""
    restart_s: float = 2.0
    """From a death to being back."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All of a simulation. `config` decides what a run of it would do."""

    config: RunConfig
    num_rows: int
    """Examples of an epoch."""
    num_partitions: int
    costs: Costs
    machines: Machines = field(default_factory=Machines)
    faults: Faults = field(default_factory=Faults)
    call_s: float = 0.0015
    """What passes between a window's end and the next one's beginning to be read: Ray's calls."""
    seed: int = 0
