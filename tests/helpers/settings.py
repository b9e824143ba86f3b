"""A small nested configuration, for the tests of settings and options."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server."""

    num_partitions: int = 2
    """Partitions of the
    parameters."""

    rule: Literal["momentum", "adagrad"] = "momentum"
    """Update rule."""

    max_norm: float | None = None
    """Largest gradient norm."""

    def __post_init__(self):
        if self.num_partitions < 1:
            raise ValueError(f"num_partitions must be at least 1, got {self.num_partitions}")
        if self.rule == "adagrad" and self.max_norm is not None:
            raise ValueError(f"adagrad takes no max_norm, got {self.max_norm}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run."""

    name: str
    """Name of the run."""

    concurrent_steps: int = 5
    """Steps in flight."""

    warm_start: bool = True
    """Ramp up."""

    hidden: tuple[int, ...] = (100, 100)
    """Units of each layer."""

    server: ServerConfig = field(default_factory=ServerConfig)
    """The server's part."""

    secret: bytes = field(default=b"", metadata={"cli": False})
    """Not for the command line."""

    def __post_init__(self):
        if self.concurrent_steps < self.server.num_partitions:
            raise ValueError(
                f"concurrent_steps ({self.concurrent_steps}) must be at least num_partitions "
                f"({self.server.num_partitions})"
            )
