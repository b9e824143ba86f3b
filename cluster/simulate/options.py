"""The options of `downpour simulate`, and the inputs that they, a run and a recipe make up."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.simulate.inputs import Costs, Faults, Inputs, Machines, Spread
from downpour.cluster.simulate.likeness import Likeness
from downpour.paramserver.rules.policy import PolicyName
from downpour.paramserver.transport.names import BYTES_AN_ELEMENT
from downpour.shuffler.processors import processors
from downpour.workers.spec import InFlight

ConfigT = TypeVar("ConfigT")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """What is simulated. What is not given is the recipe's or the measured run's."""

    replicas: int | None = None
    """Model replicas; none for the run's."""
    concurrent_steps: int | None = None
    """Steps that each has in flight; none for the run's."""
    in_flight: InFlight | None = None
    """Which steps hold weights at the same time, `auto` or `all`; none for the run's."""
    replicas_per_process: int | None = None
    """Replicas that share a process; none for the run's."""
    partitions: int | None = None
    """Partitions of the parameters; none for the run's."""
    staleness_policy: PolicyName | None = None
    """How staleness is governed; none for the run's."""
    staleness_bound: int | None = None
    """For `bounded`, `compensate` and `drop`; none for the run's."""
    round_pushes: int | None = None
    """For `synchronous`; none for the run's."""
    machines: int = 1
    """Machines that the replicas are spread over."""
    server_machines: int = 0
    """Others for the partitions; 0 has them on the first of the replicas' machines."""
    processors: int | None = None
    """Processors of each machine; none for those of this one."""
    bandwidth_mb_s: float | None = None
    """Megabytes a second that a machine can send, and receive; none for no limit."""
    latency_ms: float = 0.1
    """Milliseconds of a message between machines."""
    step_ms: float | None = None
    """Processor time of a step, with its push and pull, in milliseconds; none for the run's."""
    step_spread: float = 0.2
    """Standard deviation of a step's time over its mean."""
    slow_share: float = 0.0
    """Share of the processes whose steps take longer."""
    slow_times: float = 4.0
    """How many times longer theirs take."""
    speed_spread: float = 1.0
    """How many times longer the slowest process's steps take than the fastest's; the others lie
    evenly in between on a logarithmic scale."""
    apply_ms: float | None = None
    """Processor time of a push at a partition, in milliseconds; none for the run's."""
    background: float | None = None
    """Processors of the first machine that are not the run's to use; none for the run's own."""
    process_mtbf_s: float | None = None
    """Mean seconds between two deaths of a process of replicas; none for no deaths."""
    partition_mtbf_s: float | None = None
    """Mean seconds between two deaths of a partition; none for no deaths."""
    restart_s: float = 2.0
    """Seconds from a death to being back."""
    checkpoint_every_s: float | None = None
    """Seconds between two checkpoints; none for the run's."""
    seconds: float | None = None
    """Simulated seconds that figures are taken over, or the most that --learn takes; none is enough
    for four turns of every slot, or for all epochs."""
    seed: int = 0
    """Of everything that is random."""

    def __post_init__(self) -> None:
        for name in ("replicas", "concurrent_steps", "partitions", "machines", "processors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_words(name)} is {value}: give at least 1")
        for name in ("server_machines", "latency_ms", "step_spread", "apply_ms", "background"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{_words(name)} is {value}: give 0 or more")
        for name in (
            *("bandwidth_mb_s", "step_ms", "slow_times", "restart_s", "seconds"),
            *("process_mtbf_s", "partition_mtbf_s", "checkpoint_every_s"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{_words(name)} is {value}: give more than 0")
        if not 1 <= self.speed_spread < math.inf:
            raise ValueError(f"speed spread is {self.speed_spread}: give 1 or more")
        if not 0 <= self.slow_share <= 1:
            raise ValueError(f"slow share is {self.slow_share}: give a number from 0 to 1")


def configured(config: RunConfig, given: SimulateConfig) -> RunConfig:
    """The run as it is to be simulated: all of its replicas train from the beginning."""
    steps = _with(
        config.replicas.steps,
        concurrent_steps=given.concurrent_steps,
        in_flight=given.in_flight,
    )
    policy = _with(
        config.server.policy,
        staleness_policy=given.staleness_policy,
        staleness_bound=given.staleness_bound,
        round_pushes=given.round_pushes,
    )
    try:
        replicas = _with(
            dataclasses.replace(
                config.replicas, steps=steps, warm_start_epochs=0.0, ramp_epochs=0.0
            ),
            replicas=given.replicas,
            replicas_per_process=given.replicas_per_process,
        )
        return dataclasses.replace(
            config,
            replicas=replicas,
            server=dataclasses.replace(
                _with(config.server, partitions=given.partitions), policy=policy
            ),
            policy=_with(config.policy, checkpoint_every_s=given.checkpoint_every_s),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def make_inputs(
    config: RunConfig,
    given: SimulateConfig,
    *,
    num_rows: int,
    num_parameters: int,
    like: Likeness | None,
) -> Inputs:
    """All that a simulation needs. `config` is `configured`; costs that are not given are `like`'s.

    Raises `UserError` where neither says what a step or a push costs.
    """
    missing = [
        option
        for option, value in (("--step-ms", given.step_ms), ("--apply-ms", given.apply_ms))
        if value is None and like is None
    ]
    if missing:
        raise UserError(
            f"nothing says what {' and '.join(missing)} are: give them, or a measured run with "
            "--like"
        )
    step_s = like.step_s if given.step_ms is None and like else (given.step_ms or 0.0) / 1e3
    apply_s = like.apply_s if given.apply_ms is None and like else (given.apply_ms or 0.0) / 1e3
    count = given.processors or processors()
    background = (
        (like.background if like else 0.0) if given.background is None else given.background
    )
    if background >= count:
        raise UserError(
            f"{background:g} of {count} processors are not the run's to use: give more "
            "--processors, or less --background"
        )
    pushed, pulled = BYTES_AN_ELEMENT[config.server.network.wire]
    return Inputs(
        config=config,
        num_rows=num_rows,
        num_partitions=config.server.num_partitions(num_parameters, processors()),
        costs=Costs(
            step=Spread(mean_s=step_s, spread=given.step_spread),
            slow_share=given.slow_share,
            slow_times=given.slow_times,
            speed_spread=given.speed_spread,
            beside_s=like.beside_s if like else 0.0,
            apply=Spread(mean_s=apply_s, spread=given.step_spread),
            read_s=like.read_s if like else 0.0,
            score_s=like.score_s if like else 0.0,
            num_parameters=num_parameters,
            gradient_bytes=pushed * num_parameters,
            weights_bytes=pulled * num_parameters,
        ),
        machines=Machines(
            machines=given.machines,
            server_machines=given.server_machines,
            processors=count,
            background=background,
            bytes_per_s=math.inf if given.bandwidth_mb_s is None else given.bandwidth_mb_s * MB,
            latency_s=given.latency_ms / 1e3,
        ),
        faults=Faults(
            process_mtbf_s=given.process_mtbf_s or math.inf,
            partition_mtbf_s=given.partition_mtbf_s or math.inf,
            restart_s=given.restart_s,
        ),
        seed=given.seed,
    )


def _with(config: ConfigT, **given: object) -> ConfigT:
    """`config` with those values that are not None."""
    values = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **values) if values else config  # type: ignore[type-var]


def _words(name: str) -> str:
    return name.replace("_", " ")
