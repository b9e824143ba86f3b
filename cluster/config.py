"""The configuration of a run: frozen dataclasses, each value with one home.

The command line is derived from these (`options`), recipes are instances of `RunConfig`
(`recipes`), and the run folder keeps the resolved one as JSON (`to_plain`, `from_plain`).
What belongs to a package is configured by that package's own dataclasses.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cluster import combinations
from cluster.errors import UserError
from cluster.placement import PlacementConfig
from paramserver.policy import Guard, StalenessPolicy
from paramserver.rules import Regulariser, check_fraction, make_rule
from paramserver.schedule import Schedule
from paramserver.statistics import StatisticsRule
from paramserver.transport.names import NODE, TransportName, WireDtypeName
from shuffler.augment import AugmentConfig
from shuffler.decode import Decoder, ImageSpec
from shuffler.keys import stream_key
from shuffler.plan import Plan, Strategy
from shuffler.processors import processors
from workers.spec import ModelSpec, StepConfig

if TYPE_CHECKING:
    from paramserver.state import UpdateConfig

ConfigT = TypeVar("ConfigT")

ROOT = Path(__file__).resolve().parent.parent
PARTITION_BYTES = 1 << 24
"""Weights for which another partition pays: below this, a push costs more than its bytes."""
BUNDLED_MNIST = str(ROOT / "data" / "mnist-binary")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained, and on what kind of input."""

    model: str = field(metadata={"cli": False})
    """A name that `models.registry` knows, or `package.module:function`."""
    arguments: Mapping[str, Any] = field(default_factory=dict, metadata={"cli": False})
    """The network's keyword arguments."""
    loss: str = field(default="cross_entropy", metadata={"cli": False})
    """A name that `models.registry` knows, or `package.module:function`."""
    image: ImageSpec = field(metadata={"cli": False})
    """How a row becomes an input."""
    num_classes: int = 10
    """Labels are in [0, number of classes)."""
    image_size: int | None = None
    """Height and width that the network takes; none is the recipe's."""
    width: float | None = None
    """What the network's channel counts are multiplied by; none is the recipe's."""
    stem_stride: int | None = None
    """What Inception's first stages shrink an image by: 8 (Figure 5), 4 or 2; none takes the
    largest that leaves the last module 2 pixels."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num classes is {self.num_classes}: give at least 2")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image size is {self.image_size}: give at least 1, or none")

    @property
    def input(self) -> ImageSpec:
        """The images that the network takes."""
        if self.image_size is None:
            return self.image
        return dataclasses.replace(self.image, height=self.image_size, width=self.image_size)

    @property
    def all_arguments(self) -> dict[str, Any]:
        """The network's keyword arguments, those among them that are options of their own."""
        own = {"width": self.width, "stem_stride": self.stem_stride}
        return {**self.arguments, **{k: v for k, v in own.items() if v is not None}}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples are, and how they are put together into mini-batches."""

    data: str = BUNDLED_MNIST
    """Folder or pyarrow.fs URI with the shards, `<split>-*.parquet`."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to score."""
    batch_size: int = 32
    """Examples in a mini-batch."""
    window_batches: int = 64
    """Mini-batches that a replica is handed at a time."""
    strategy: Strategy = "pairwise"
    """How examples meet: `pairwise` lets no pair meet twice. `random`, `within_shard`, `buffer` and
    `none` shuffle as other loaders do."""
    buffer_rows: int = 1000
    """Examples that the `buffer` strategy shuffles at a time."""
    past_bound: Literal["error", "rekey"] = "error"
    """Past the epochs in which no pair can meet twice: an error, or a fresh keyed order."""
    shufflers: int = 1
    """Actors that read the training rows; each has shards of its own."""
    shuffler_cache_mb: int = 1024
    """Most megabytes of decoded row groups that each of them keeps."""
    node_folder: str | None = None
    """Folder on each node's own disk that has some of the training split's shards; `{node}` in it
    is the node's label downpour-node, or its address. The manifest and the split to score are where
    `data` says. There is a shuffler on each node that has shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are varied."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a training image does that cannot be decoded: it stops the run, or is skipped and
    counted."""

    def __post_init__(self) -> None:
        if self.shufflers < 1 or self.shuffler_cache_mb < 0:
            raise ValueError(
                f"shufflers is {self.shufflers} and shuffler cache {self.shuffler_cache_mb} MB: "
                "give at least 1 shuffler, and 0 MB or more"
            )
        folder = self.node_folder
        if folder is not None and not folder.startswith("/") and "://" not in folder:
            raise ValueError(
                f"node folder is {folder!r}: give a path from the root, which means the same on "
                "every node, or a URI"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """How replicas and partitions reach each other."""

    transport: TransportName = "auto"
    """Shared memory within a machine and the network between machines, or one of the two always."""
    encrypt: bool = True
    """Whether what goes over the network is encrypted; peers are authenticated in any case."""
    wire_dtype: WireDtypeName = "float32"
    """How gradients go over the network; 16 bits are with error feedback."""
    listen: str = "auto"
    """Address that partitions listen on: `auto` is the one by which Ray knows the node in a cluster
    of several, and on a single node loopback, or none where nobody comes over the network."""

    def __post_init__(self) -> None:
        if self.listen != "auto":
            try:
                ipaddress.ip_address(self.listen)
            except ValueError:
                raise ValueError(
                    f"listen is {self.listen!r}: give auto, or an IP address of the machine"
                ) from None

    def listens_on(self, num_nodes: int) -> str | None:
        """Where partitions listen in a cluster of so many nodes; None for nowhere.

        `NODE` stands for the node's address.
        """
        if self.transport == "shared":
            return None
        if self.listen != "auto":
            return self.listen
        if num_nodes > 1:
            return NODE
        return "127.0.0.1" if self.transport == "network" else None


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The parameter server."""

    partitions: int | None = None
    """Actors that the parameters are cut over; none is one for each 16 MB of weights, at the most
    one a processor. More than a model needs costs every push and pull another message."""
    rule: Literal["momentum", "nesterov", "sgd", "adagrad"] = "momentum"
    """The update rule."""
    momentum: float = 0.9
    """Momentum, for the two rules that have it."""
    weight_decay: float = 0.0
    """L2 weight of linear and convolutional weights."""
    clip_norm: float | None = None
    """Largest norm of a gradient; longer ones are scaled down to it."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate."""
    statistics: StatisticsRule = field(default_factory=StatisticsRule)
    """How BN statistics are aggregated."""
    policy: StalenessPolicy = field(default_factory=StalenessPolicy)
    """What is done about staleness."""
    guard: Guard = field(default_factory=Guard)
    """What keeps poison out."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """How replicas reach it."""
    hot_standby: bool = False
    """Whether each partition has a follower, a second process on the same machine that applies the
    same pushes and takes its place when it dies, so that no update is lost."""

    def __post_init__(self) -> None:
        if self.partitions is not None and self.partitions < 1:
            raise ValueError(f"partitions is {self.partitions}: give at least 1, or none")
        check_fraction("momentum", self.momentum)
        Regulariser(weight_decay=self.weight_decay, clip_norm=self.clip_norm)
        if self.hot_standby and self.policy.versions_kept:
            raise ValueError(
                f"hot standby is on, and staleness policy is {self.policy.staleness_policy}, which "
                "needs versions from before a follower came: give another, or no hot standby"
            )
        if self.hot_standby and self.network.listens_on(1) is not None:
            raise ValueError(
                f"hot standby is on, transport is {self.network.transport} and listen "
                f"{self.network.listen}: a follower reads gradients where replicas left them, in "
                "memory that all share; give transport shared, or no hot standby"
            )

    def num_partitions(self, num_parameters: int) -> int:
        """Partitions of a model with so many parameters."""
        if self.partitions is not None:
            return self.partitions
        return min(processors(), -(-4 * num_parameters // PARTITION_BYTES))


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """The model replicas."""

    replicas: int = 10
    """Model replicas."""
    steps: StepConfig = field(default_factory=StepConfig)
    """How each runs its steps."""
    replicas_per_process: int | None = None
    """Replicas that share a process; none spreads them over a process for each processor."""
    gpus_per_process: float = 1.0
    """Share of a GPU that a process of replicas is given, with `--replica-device cuda`: as many
    processes share one as it has room for."""
    warm_start_epochs: float = 0.0
    """Epochs that one replica trains alone before others join (Dean et al. 2012, section 4.1)."""
    ramp_epochs: float = 0.0
    """Epochs over which the others then join, evenly."""
    ramp_guard: float | None = None
    """While replicas join: how many times its best the training loss may be before they are put
    back until it has come down; none watches no loss."""
    queued_windows: int = 2
    """Windows that a replica holds at a time: one in work, and the next."""
    stragglers: Literal["tell", "replace"] = "tell"
    """What is done about a process of replicas that is far slower than the median of the others."""
    straggler_ratio: float = 4.0
    """How many times slower that is."""
    spares: Literal["none", "replicas", "all"] = "none"
    """Processes kept ready to take the place of one that dies, on a single machine: none, one for
    processes of replicas, or one for a partition too."""
    max_restarts: int = 100
    """Members of each kind (processes of replicas, partitions, shufflers, evaluators) that are
    replaced before the run gives up."""

    @property
    def slots(self) -> int:
        """Steps in flight, over all replicas."""
        return self.replicas * self.steps.concurrent_steps

    @property
    def gpu_share(self) -> float | None:
        """Of a GPU, for each process; None where replicas compute on processors."""
        return None if self.steps.device == "cpu" else self.gpus_per_process

    def __post_init__(self) -> None:
        for name in ("replicas", "queued_windows"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if not self.straggler_ratio > 1:
            raise ValueError(f"straggler ratio is {self.straggler_ratio}: give more than 1")
        if self.replicas_per_process is not None and self.replicas_per_process < 1:
            raise ValueError(
                f"replicas per process is {self.replicas_per_process}: give at least 1, or none"
            )
        if not 0 < self.gpus_per_process <= 1:
            raise ValueError(
                f"gpus per process is {self.gpus_per_process:g}: give more than 0 and at most 1, "
                "since a process computes on one GPU"
            )
        if self.ramp_guard is not None and not 1 < self.ramp_guard < math.inf:
            raise ValueError(f"ramp guard is {self.ramp_guard}: give more than 1, or none")
        if self.warm_start_epochs < 0 or self.ramp_epochs < 0 or self.max_restarts < 0:
            raise ValueError(
                f"warm-start epochs is {self.warm_start_epochs}, ramp epochs {self.ramp_epochs} "
                f"and max restarts {self.max_restarts}: give 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How long the run is, and what it does on the way."""

    epochs: int = 20
    """Epochs to train."""
    seed: int = 0
    """What every random stream of the run comes from."""
    evaluate_every_s: float = 5.0
    """Seconds between two scorings of the evaluation split; longer where scoring is slow."""
    evaluation_share: float = 0.1
    """Largest share of the time that scoring may take."""
    checkpoint_every_s: float = 10.0
    """Seconds between two checkpoints."""
    checkpoints: str | None = None
    """Folder or pyarrow.fs URI for the checkpoints, in a folder of the run's name; none keeps them
    in the run's folder."""
    keep_checkpoints: int = 3
    """Checkpoints kept; older ones are removed."""
    keep_best_checkpoints: int = 0
    """Checkpoints kept besides, however old: those with the highest accuracy."""
    record_pushes: bool = False
    """Record the order of all pushes, from which `downpour replay` computes the run again."""
    on_refusal: Literal["continue", "stop"] = "continue"
    """What a refused mini-batch (loss or gradient not finite) does to the run."""
    max_refused: int | None = 1000
    """Refused mini-batches after which the run stops all the same; none for no such bound."""

    def __post_init__(self) -> None:
        for name in ("epochs", "keep_checkpoints"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if self.keep_best_checkpoints < 0:
            raise ValueError(
                f"keep best checkpoints is {self.keep_best_checkpoints}: give 0 or more"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")
        if not 0 < self.evaluation_share <= 1:
            raise ValueError(
                f"evaluation share is {self.evaluation_share}: give a number above 0 and up to 1"
            )
        for name in ("evaluate_every_s", "checkpoint_every_s"):
            if getattr(self, name) <= 0:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give more than 0 seconds")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run but where its folder is and which cluster it runs on."""

    recipe: str = field(metadata={"cli": False})
    """The recipe that this began as."""
    model: ModelConfig
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The examples."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The parameter server."""
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    """The replicas."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Length and policies."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which nodes of a cluster the actors run on."""

    def __post_init__(self) -> None:
        combinations.check(self)

    @property
    def by_permit(self) -> bool:
        """Whether steps wait for permits before they pull."""
        return self.server.policy.staleness_policy in ("bounded", "synchronous")

    def step_config(self) -> StepConfig:
        """What the processes of replicas are told."""
        compensates = self.server.policy.staleness_policy == "compensate"
        steps = self.replicas.steps
        return dataclasses.replace(steps, by_permit=self.by_permit, by_push=compensates)

    def plan(self, num_rows: int, shard_rows: tuple[int, ...] = ()) -> Plan:
        """The mini-batches of `num_rows` examples, checked against the length of the run.

        `shard_rows`, of each shard, matters to the strategy `within_shard` only.
        """
        plan = Plan(
            num_rows=num_rows,
            batch_size=self.data.batch_size,
            seed=self.policy.seed,
            window_batches=self.data.window_batches,
            strategy=self.data.strategy,
            shard_rows=shard_rows if self.data.strategy == "within_shard" else (),
            buffer_rows=self.data.buffer_rows,
            past_bound=self.data.past_bound,
        )
        plan.check_epochs(self.policy.epochs)
        return plan

    def update_config(self, plan: Plan) -> UpdateConfig:
        """What the partitions are told."""
        from paramserver.state import UpdateConfig

        server = self.server
        return UpdateConfig(
            rule=make_rule(server.rule, server.momentum),
            regulariser=Regulariser(weight_decay=server.weight_decay, clip_norm=server.clip_norm),
            schedule=server.schedule,
            statistics=server.statistics,
            policy=self._policy(),
            guard=server.guard,
            batches_per_epoch=plan.num_batches,
            epoch_examples=plan.num_rows,
            epochs=self.policy.epochs,
        )

    def _policy(self) -> StalenessPolicy:
        """The staleness policy, with what it takes from the number of slots."""
        policy, slots = self.server.policy, self.replicas.slots
        if policy.staleness_policy != "synchronous":
            return policy
        pushes = policy.round_pushes or slots
        return dataclasses.replace(policy, round_pushes=pushes, round_steps=slots)

    def decoder(self) -> Decoder:
        """How training rows become inputs."""
        return Decoder(
            spec=self.model.input,
            augment=self.data.augment,
            seed=self.policy.seed,
            on_bad_image=self.data.on_bad_image,
        )

    def model_spec(self) -> ModelSpec:
        """What the workers are told."""
        return ModelSpec(
            name=self.model.model,
            arguments=self.model.all_arguments,
            loss=self.model.loss,
            seed=stream_key(self.policy.seed, "initial weights"),
            image=self.model.input,
            num_classes=self.model.num_classes,
        )


def num_processes(config: ReplicaConfig, num_processors: int) -> int:
    """How many processes the replicas are spread over; on GPUs, `num_processors` is their room.

    Steps of small nets are bound by the processor, so more processes than processors only add
    context switches, memory and time to start.
    """
    if config.replicas_per_process is not None:
        return -(-config.replicas // config.replicas_per_process)
    return max(1, min(config.replicas, num_processors))


def num_threads(config: PolicyConfig, num_processes: int, num_processors: int) -> int:
    """How many threads each of so many processes of replicas computes a step on.

    One where pushes are recorded: on several, matrix products round otherwise now and then while
    the machine is busy, and a replay would find other bits.
    """
    return 1 if config.record_pushes else max(1, num_processors // num_processes)


def active_replicas(config: ReplicaConfig, epochs_done: float) -> int:
    """How many replicas train after `epochs_done` epochs: the warm start, then an even ramp."""
    if epochs_done < config.warm_start_epochs:
        return 1
    if not config.ramp_epochs:
        return config.replicas
    share = min(1.0, (epochs_done - config.warm_start_epochs) / config.ramp_epochs)
    return max(1, min(config.replicas, 1 + int(share * (config.replicas - 1))))


def next_evaluation_s(
    config: PolicyConfig, began_s: float, ended_s: float, shortest_s: float = math.inf
) -> float:
    """When to score again after a scoring that took from `began_s` to `ended_s`, on one clock.

    Every `evaluate_every_s`, or as much later as keeps scoring to its share of the time. One that
    took more than twice the shortest was held up (a machine that was suspended, or busy with
    something else), and counts as twice the shortest: the wait is not what scoring costs.
    """
    took_s = min(ended_s - began_s, 2 * shortest_s)
    return max(ended_s, began_s + max(config.evaluate_every_s, took_s / config.evaluation_share))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, for JSON."""
    return dataclasses.asdict(config)


def from_plain(config_class: type[ConfigT], plain: Mapping[str, Any]) -> ConfigT:
    """The configuration that `to_plain` gave. Unknown and missing names are one-line errors."""
    hints = typing.get_type_hints(config_class)
    names = {f.name for f in dataclasses.fields(typing.cast("Any", config_class))}
    unknown = set(plain) - names
    if unknown:
        raise UserError(
            f"the saved configuration has {', '.join(sorted(unknown))}, which this version does "
            "not know: use the version that wrote it"
        )
    values = {name: _value(hints[name], value) for name, value in plain.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"the saved configuration is not usable: {error}") from None


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(typing.cast("type[Any]", hint), value)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and value is None:
        return None
    return value
