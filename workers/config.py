"""Which network is trained, and how model replicas run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.images.reading import Orientation, Transparency
from downpour.shuffler.images.specs import ImageSpec, InputSpec
from downpour.workers.spec import StepConfig
from downpour.workers.tasks import TASKS, Task, TaskName


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained, and on what kind of input."""

    model: str
    """The network: `mnist`, `inception`, or `package.module:function` for any function or class
    that returns a `torch.nn.Module`, such as `torchvision.models:resnet18`."""
    arguments: Mapping[str, Any] = field(default_factory=dict, metadata={"cli": "model-arg"})
    """A keyword argument of that function; may be given several times."""
    task: TaskName | None = None
    """What the network is for; none is what the data is for: `classification`, `regression` for
    targets in columns of numbers, `segmentation` for masks. `multilabel` is for rows that have
    several classes."""
    loss: str = "cross_entropy"
    """The loss: `cross_entropy`, `mse`, `l1`, `huber` or `bce`, or `package.module:function` for
    one that takes the network's outputs and the targets of a mini-batch and returns their mean
    loss. Unless it is given, it is the task's."""
    image: InputSpec = field(metadata={"cli": False})
    """How a row becomes an input."""
    columns: Columns = field(default=PLAIN, metadata={"cli": False})
    """Which columns are the input and the target."""
    carried: Mapping[str, bytes | str] = field(default_factory=dict, metadata={"cli": False})
    """Model and loss, if no other process can import them (`models.by_value`)."""
    init: str | None = None
    """File whose weights and BN statistics the network starts from: safetensors, a state_dict that
    torch.save wrote, or a run's folder; none is the network's own initialization."""
    init_prefix: str | None = None
    """What the file's names have before the network's, such as `backbone.`; other names are left
    out."""
    init_matching: bool = False
    """Take from the file what agrees in name and shape, say so, and leave the rest fresh: a head of
    another width."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by names or patterns of parameters or modules, such as
    `conv1,layer1` or `layer*`. A BN layer that is frozen keeps its statistics, too."""
    num_classes: int = 10
    """Labels are in [0, number of classes)."""
    image_size: int | None = None
    """Height and width that the network takes; none is the recipe's."""
    orientation: Orientation | None = None
    """Whether photos are turned upright as their EXIF orientation says: `follow` or `ignore`; none
    is the recipe's, and a recipe that says nothing follows."""
    transparency: Transparency | None = None
    """What is seen of transparent pixels: `white` blends them with white, `drop` shows the colours
    that they hide; none is the recipe's, and a recipe that says nothing blends with white."""
    width: float | None = None
    """What the network's channel counts are multiplied by; none is the recipe's."""
    stem_stride: int | None = None
    """What Inception's first stages shrink an image by: 8 (Figure 5), 4 or 2; none takes the
    largest that leaves the last module 2 pixels."""

    def __post_init__(self) -> None:
        if self.init is None and (self.init_prefix is not None or self.init_matching):
            what = "init matching is on" if self.init_matching else "an init prefix is given"
            raise ValueError(f"{what}, and init is none: give a file to start from")
        if self.num_classes < 2:
            raise ValueError(f"num classes is {self.num_classes}: give at least 2")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image size is {self.image_size}: give at least 1, or none")

    @property
    def pictures(self) -> ImageSpec:
        """The images that the network takes, if it takes images."""
        found = self.input
        assert isinstance(found, ImageSpec), "rows of numbers are no images"
        return found

    @property
    def the_task(self) -> Task:
        """What the network is for."""
        return TASKS[self.task or "classification"]

    @property
    def input(self) -> InputSpec:
        """The images, or the numbers, that the network takes."""
        if not isinstance(self.image, ImageSpec):
            return self.image
        own = {
            "height": self.image_size,
            "width": self.image_size,
            "orientation": self.orientation,
            "transparency": self.transparency,
        }
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(self.image, **given) if given else self.image

    @property
    def all_arguments(self) -> dict[str, Any]:
        """The network's keyword arguments, those among them that are options of their own."""
        own = {"width": self.width, "stem_stride": self.stem_stride}
        return {**self.arguments, **{k: v for k, v in own.items() if v is not None}}


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """The model replicas."""

    replicas: int = 10
    """Model replicas."""
    steps: StepConfig = field(default_factory=StepConfig)
    """How each runs its steps."""
    replicas_per_process: int | None = None
    """Replicas that share a process; none spreads them over a process for each processor."""
    threads_per_process: int | None = None
    """Threads that each process computes a step on; none shares the processors out."""
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
    spares: Literal["auto", "none", "replicas", "all"] = "auto"
    """Processes kept ready to take the place of one that dies, on a single machine: none, one for
    processes of replicas, or one for a partition too. auto keeps one for replicas with
    `--hot-standby`, unless they compute on a GPU."""
    max_restarts: int = 100
    """How often within an hour one member of the run (a process of replicas, a partition, a
    shuffler, the evaluator) is replaced before the run gives up."""

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
        if self.threads_per_process is not None and self.threads_per_process < 1:
            raise ValueError(
                f"threads per process is {self.threads_per_process}: give at least 1, or none"
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
