"""The configuration of a run, which puts together those of its parts.

Each value belongs to the dataclass of its owner: `shuffler.config`, `paramserver.config`,
`workers.config`, and `policy` and `placement` here. The command line is derived from them
(`options`), recipes are instances of `RunConfig` (`recipes`), and a run's folder keeps its own as
JSON (`plain`). Not here: what a configuration says to each part of a run (`derive`, `resolve`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from downpour.cluster.config import combinations
from downpour.cluster.config.placement import PlacementConfig
from downpour.cluster.config.policy import PolicyConfig
from downpour.paramserver.config import ServerConfig
from downpour.shuffler.config import DataConfig
from downpour.workers.config import ModelConfig, ReplicaConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run except its folder and the cluster that it runs on.

    Raises:
        ValueError: two values that cannot go together; the text names both and the remedy.
    """

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
        combinations.check_goal(self.model, self.policy)
