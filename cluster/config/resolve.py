"""What follows from a configuration and the facts that a run finds. Pure.

`resolve` gives every actor its spec. Not here: how the facts are found out (`training.launch`),
and what an actor gets at each start or connect, such as keys and endpoints (`ray_backend`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from downpour.cluster.config.derive import (
    make_decoder,
    make_plan,
    model_spec,
    step_config,
    update_config,
)
from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.spec import PartitionSpec
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec
from downpour.workers.config import ReplicaConfig
from downpour.workers.spec import EvaluatorSpec, RecomputeSpec, ReplicasSpec


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run finds: data, network, machines."""

    num_rows: int
    """Rows of the training split."""
    shard_rows: tuple[int, ...] = ()
    """Rows of each of its shards."""
    window_batches: int | None = None
    """Mini-batches of a window; None: as configured."""
    num_parameters: int
    """Parameters of the network."""
    num_features: int
    """Normalised features of the network."""
    num_decayed: int
    """Parameters that weight decay applies to; they come first."""
    num_frozen: int = 0
    """Parameters that never change; they come last."""
    stops: tuple[int, ...] = ()
    """Where each of its tensors ends."""
    num_partitions: int
    """Partitions; see `num_partitions`."""
    num_nodes: int = 1
    """Nodes of the cluster."""
    num_processors: int
    """Processors for replicas, over all nodes."""
    gpu_places: int | None = None
    """Processes of replicas that the GPUs have room for; None if replicas compute on processors."""
    record: str | None = None
    """Folder for the record of pushes, if the configuration asks for one."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The numbers that a run was given, for `resolved.json`.

    A resume takes `partitions` from it, since checkpoints are cut that way. The others follow the
    machine that resumes.
    """

    partitions: int
    """Partitions of the parameter server."""
    processes: int
    """Processes that the replicas are spread over."""
    threads: int
    """Threads that each of them computes a step on."""
    nodes: int
    """Nodes of the cluster."""
    processors: int
    """Processors for replicas, over all nodes."""


@dataclass(frozen=True, kw_only=True)
class RunSpecs:
    """What every actor of a run is told."""

    resolved: Resolved
    plan: Plan
    """Which rows make up each mini-batch."""
    partitions: tuple[PartitionSpec, ...]
    processes: tuple[ReplicasSpec, ...]
    """Processes of replicas."""
    shufflers: tuple[ShufflerSpec, ...]
    """Shufflers, with the data in one place. If shards are on nodes' own disks, there is one for
    each node that has some, and its spec is a copy of the first with another `holding`."""
    evaluator: EvaluatorSpec


def resolve(config: RunConfig, facts: Facts) -> RunSpecs:
    """What each actor of a run of `config` is told, given the facts."""
    plan = make_plan(config, facts.num_rows, facts.shard_rows, facts.window_batches)
    model, update = model_spec(config), update_config(config, plan)
    room = facts.num_processors if facts.gpu_places is None else facts.gpu_places
    count = num_processes(config.replicas, room)
    threads = config.replicas.threads_per_process or num_threads(
        config.policy, count, facts.num_processors
    )
    layout = split(
        num_parameters=facts.num_parameters,
        num_features=facts.num_features,
        num_decayed=facts.num_decayed,
        num_partitions=facts.num_partitions,
        num_frozen=facts.num_frozen,
        stops=facts.stops if config.server.by_layer else (),
    )
    listen = config.server.network.listens_on(facts.num_nodes)
    return RunSpecs(
        resolved=Resolved(
            partitions=len(layout),
            processes=count,
            threads=threads,
            nodes=facts.num_nodes,
            processors=facts.num_processors,
        ),
        plan=plan,
        partitions=tuple(
            PartitionSpec(
                partition=each,
                update=update,
                listen=listen,
                standby_wait=config.server.standby_wait,
                record=facts.record,
            )
            for each in layout
        ),
        processes=tuple(
            ReplicasSpec(
                replicas=members,
                model=model,
                steps=step_config(config),
                decoder=make_decoder(config),
                num_threads=threads,
                queued_windows=config.replicas.queued_windows,
            )
            for members in spread(config.replicas.replicas, count)
        ),
        shufflers=shuffler_specs(config, plan),
        evaluator=EvaluatorSpec(
            model=model,
            data=config.data.data,
            split=config.data.eval_split,
            recompute=recompute_spec(config),
        ),
    )


def recompute_spec(config: RunConfig) -> RecomputeSpec | None:
    """What the evaluator recomputes BN statistics on, if it is to.

    It may take what a scoring may take without becoming rarer.
    """
    if config.policy.bn_statistics == "moving":
        return None
    return RecomputeSpec(
        data=config.data.data,
        split=config.data.train_split,
        batch_size=config.data.batch_size,
        decoder=dataclasses.replace(make_decoder(config), on_bad_image="skip"),
        num_classes=config.model.num_classes,
        seed=config.policy.seed,
        most_s=config.policy.evaluate_every_s * config.policy.evaluation_share,
    )


def shuffler_specs(config: RunConfig, plan: Plan) -> tuple[ShufflerSpec, ...]:
    """What the shufflers are told, with the data in one place."""
    return tuple(
        ShufflerSpec(
            index=index,
            num_shufflers=config.data.shufflers,
            data=config.data.data,
            split=config.data.train_split,
            plan=plan,
            num_classes=config.model.num_classes,
            columns=config.model.columns,
            cache_bytes=config.data.shuffler_cache_mb << 20,
            input=config.model.input,
        )
        for index in range(config.data.shufflers)
    )


def spread(num_replicas: int, num_processes: int) -> list[tuple[int, ...]]:
    """The replicas in each process.

    Replica r is in process r mod n, so that a warm start spreads over all processes.
    """
    return [tuple(range(i, num_replicas, num_processes)) for i in range(num_processes)]


def num_processes(config: ReplicaConfig, num_processors: int) -> int:
    """How many processes the replicas are spread over.

    Steps of small nets are bound by the processor, so more processes than processors only add
    context switches, memory and time to start. On GPUs, `num_processors` is the number of processes
    that the GPUs have room for.
    """
    if config.replicas_per_process is not None:
        return -(-config.replicas // config.replicas_per_process)
    return max(1, min(config.replicas, num_processors))


def num_threads(config: PolicyConfig, num_processes: int, num_processors: int) -> int:
    """How many threads each of so many processes of replicas computes a step on.

    It is one if pushes are recorded. On several threads, matrix products now and then round
    otherwise while the machine is busy, and a replay would find other bits.
    """
    return 1 if config.record_pushes else max(1, num_processors // num_processes)
