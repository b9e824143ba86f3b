"""The configuration of a run: frozen dataclasses, each value with one home.

The command line is derived from these (`options`), recipes are instances of `RunConfig`
(`recipes`), and the run folder keeps the resolved one as JSON (`to_plain`, `from_plain`).
What belongs to a package is configured by that package's own dataclasses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from downpour.cluster.config import combinations
from downpour.cluster.config.placement import PlacementConfig
from downpour.cluster.config.policy import PolicyConfig
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.update import Regulariser, make_rule
from downpour.shuffler.config import DataConfig
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.plan import Plan
from downpour.workers.config import ModelConfig, ReplicaConfig
from downpour.workers.spec import ModelSpec, StepConfig

if TYPE_CHECKING:
    from downpour.paramserver.partition.state import UpdateConfig


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
        combinations.check(self.server, self.replicas, self.policy)

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
        from downpour.paramserver.partition.state import UpdateConfig

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
