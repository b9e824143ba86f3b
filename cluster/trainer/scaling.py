"""How much of a cluster a run takes, in Ray Train's words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError

_UNUSED = ("resources_per_worker", "accelerator_type", "topology", "label_selector")
"""Of Ray Train's class: what means nothing here."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How many model replicas there are, and what they compute on.

    Ray Train's `num_workers` are processes with a processor or a GPU each. Here they are model
    replicas, which share processes (`--replicas-per-process`), and each has several steps in flight
    (`--concurrent-steps`).
    """

    num_workers: int | None = None
    """Model replicas, `--replicas`; none is what the configuration says."""
    use_gpu: bool | None = None
    """Whether replicas compute on GPUs, `--replica-device`; none is what the configuration says."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"num_workers is {self.num_workers}: give at least 1")

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration with that.

        Raises:
            ValueError: it does not go with another value; the text names both and the remedy.
        """
        replicas = config.replicas
        if self.num_workers is not None:
            replicas = dataclasses.replace(replicas, replicas=self.num_workers)
        if self.use_gpu is not None:
            device = "cuda" if self.use_gpu else "cpu"
            steps = dataclasses.replace(replicas.steps, device=device)  # type: ignore[arg-type]
            replicas = dataclasses.replace(replicas, steps=steps)
        return dataclasses.replace(config, replicas=replicas)


def scaling_of(given: object) -> ScalingConfig:
    """What was given as `scaling`: None, one of ours, or Ray Train's.

    Raises:
        UserError: it is something else, or asks for what means nothing here.
    """
    if given is None:
        return ScalingConfig()
    if isinstance(given, ScalingConfig):
        return given
    if type(given).__name__ != "ScalingConfig":
        raise UserError(f"scaling is {given!r}: give a downpour.ScalingConfig")
    for name in _UNUSED:
        if (value := getattr(given, name, None)) is not None:
            raise UserError(
                f"scaling has {name} {value!r}, which replicas that share processes have no use "
                "for: leave it out, and see PlacementConfig for where they run"
            )
    num_workers, use_gpu = getattr(given, "num_workers", None), getattr(given, "use_gpu", None)
    if not isinstance(num_workers, int | None):
        raise UserError(f"num_workers is {num_workers!r}: give a number of replicas")
    return ScalingConfig(num_workers=num_workers, use_gpu=use_gpu)
