"""What a configuration says to each part of a run, by itself. Pure.

Some values reach across owners: the staleness policy decides when a step fetches weights, and the
number of steps in flight decides the length of a synchronous round. Such values are put together
here. What also depends on the machine is in `resolve`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from downpour.cluster.config.run import RunConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.shuffler.config import WINDOW_BYTES, DataConfig
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.plan import Plan
from downpour.workers.spec import ModelSpec, StepConfig

if TYPE_CHECKING:
    from downpour.paramserver.partition.update_config import UpdateConfig


def make_plan(
    config: RunConfig,
    num_rows: int,
    shard_rows: tuple[int, ...] = (),
    window_batches: int | None = None,
) -> Plan:
    """The mini-batches of `num_rows` examples, checked against the length of the run.

    Args:
        config: of the run.
        num_rows: rows of the training split.
        shard_rows: rows of each of its shards; only the strategy `within_shard` looks at them.
        window_batches: mini-batches of a window, as `window_that_fits` gives it; None takes the
            configuration's.

    Raises:
        PlanError: the data has too few rows, or the run has more epochs than the plan allows.
    """
    data = config.data
    plan = Plan(
        num_rows=num_rows,
        batch_size=data.batch_size,
        seed=config.policy.seed,
        window_batches=window_batches or data.window_batches,
        strategy=data.strategy,
        shard_rows=shard_rows if data.strategy == "within_shard" else (),
        buffer_rows=data.buffer_rows,
        past_bound=data.past_bound,
        version=data.plan_version,
    )
    plan.check_epochs(config.policy.epochs)
    return plan


def window_that_fits(data: DataConfig, row_bytes: float) -> int:
    """The mini-batches of a window: as configured, or fewer of large images.

    Args:
        data: how the examples are put together.
        row_bytes: mean bytes of a row on disk.
    """
    fitting = int(WINDOW_BYTES / max(1.0, row_bytes * data.batch_size))
    return max(1, min(data.window_batches, fitting))


def make_decoder(config: RunConfig) -> Decoder:
    """How training rows become inputs."""
    return Decoder(
        spec=config.model.input,
        columns=config.model.columns,
        augment=config.data.augment,
        seed=config.policy.seed,
        on_bad_image=config.data.on_bad_image,
    )


def model_spec(config: RunConfig) -> ModelSpec:
    """Which network the workers build."""
    model = config.model
    return ModelSpec(
        name=model.model,
        arguments=model.all_arguments,
        loss=model.loss,
        seed=stream_key(config.policy.seed, "initial weights"),
        image=model.input,
        num_classes=model.num_classes,
        task=model.the_task.name,
        columns=model.columns,
        freeze=model.freeze,
        carried=model.carried,
    )


def step_config(config: RunConfig) -> StepConfig:
    """How replicas run their steps, with what the staleness policy asks of them."""
    policy, steps = config.server.policy.staleness_policy, config.replicas.steps
    return dataclasses.replace(
        steps,
        by_permit=policy in ("bounded", "synchronous"),
        by_push=policy == "compensate",
        # A record names one mini-batch a push.
        steps_together=1 if config.policy.record_pushes else steps.steps_together,
    )


def update_config(config: RunConfig, plan: Plan) -> UpdateConfig:
    """How a push changes a partition."""
    from downpour.paramserver.partition.update_config import UpdateConfig

    server = config.server
    return UpdateConfig(
        rule=server.make_rule(),
        regulariser=server.make_regulariser(),
        schedule=server.schedule.over(config.policy.epochs),
        statistics=server.statistics,
        policy=_staleness_policy(config),
        guard=server.guard,
        average_decay=server.ema,
        batches_per_epoch=plan.num_batches,
        epoch_examples=plan.num_rows,
        epochs=config.policy.epochs,
    )


def _staleness_policy(config: RunConfig) -> StalenessPolicy:
    """The staleness policy; a synchronous round is as long as there are steps in flight."""
    policy, in_flight = config.server.policy, config.replicas.slots
    if policy.staleness_policy != "synchronous":
        return policy
    pushes = policy.round_pushes or in_flight
    return dataclasses.replace(policy, round_pushes=pushes, round_steps=in_flight)


def spares(config: RunConfig) -> Literal["none", "replicas", "all"]:
    """Return the kinds of processes that one is kept ready for."""
    wanted = config.replicas.spares
    if wanted != "auto":
        return wanted
    ready = config.server.hot_standby and config.replicas.steps.device == "cpu"
    return "replicas" if ready else "none"
