"""What the processes of the workers are told: plain frozen data that travels through Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec, InputSpec
from downpour.workers.tasks import TaskName

if TYPE_CHECKING:
    from torch import nn

    from downpour.models.by_value import Carried
    from downpour.models.flat import FlatModel
    from downpour.models.outputs import Loss


RGB = 3
"""Channels that a network takes if it is told nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and what its inputs look like."""

    name: str
    """A name that `models.registry` knows, or `package.module:function`."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """The factory's keyword arguments."""
    loss: str = "cross_entropy"
    """A loss that `models.registry` knows, or `package.module:function`."""
    seed: int
    """What the initial weights come from."""
    image: InputSpec
    """How rows become inputs: pictures, or numbers."""
    num_classes: int
    """Labels are in [0, num_classes)."""
    task: TaskName = "classification"
    """What it is for."""
    columns: Columns = PLAIN
    """Which columns are the input and the target."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained, by the names of their parameters (`workers.freezing`)."""
    carried: Carried = field(default_factory=dict)
    """Model and loss, if no other process can import them."""

    @property
    def is_users(self) -> bool:
        """Whether the model is of a user's factory."""
        return ":" in self.name

    @property
    def is_ours(self) -> bool:
        """Whether model and loss are this package's."""
        return ":" not in self.name and ":" not in self.loss

    @property
    def num_outputs(self) -> int:
        """Numbers that the network gives for a row: one for each class, or for each of a target."""
        if self.columns.kind == "label" or self.task == "segmentation":
            return self.num_classes
        return self.columns.target_width

    def build(self) -> nn.Module:
        """The model with its initial weights.

        A factory gets `num_classes`, `image_size` and, unless images are RGB, the channels of its
        input, as far as it takes them and the arguments lack them. Of a network for numbers the
        classes are the numbers of a target, and it gets `num_inputs` and `num_outputs` too.
        """
        from downpour.models.by_value import admit
        from downpour.models.registry import CHANNELS, CLASSES, build

        admit(self.carried)
        offered = {CLASSES: self.num_outputs, "num_outputs": self.num_outputs}
        if not isinstance(self.image, ImageSpec):
            offered["num_inputs"] = math.prod(self.image.input_shape)
            return build(self.name, self.seed, offered=offered, **self.arguments)
        if self.image.channels != RGB:
            offered |= dict.fromkeys(CHANNELS, self.image.channels)
        if self.image.height == self.image.width:
            offered["image_size"] = self.image.height
        return build(self.name, self.seed, offered=offered, **self.arguments)

    def build_loss(self) -> Loss:
        """The function `(outputs, targets) -> mean loss`."""
        from downpour.models.by_value import admit
        from downpour.models.registry import find_loss

        admit(self.carried)
        return find_loss(self.loss)

    def build_flat(self, device: str = "meta") -> FlatModel:
        """The model over flat buffers; on `meta` it has no weights until it is bound.

        A user's model is built for real wherever it is wanted, since its factory may look at
        values, and its buffers have some. PyTorch's BN layers in it become ours.
        """
        from downpour.models.flat import FlatModel
        from downpour.workers.freezing import freeze

        if self.is_users:
            from downpour.models.conversion.convert import convert

            module = convert(self.build(), self.image.input_shape, seed=self.seed)
            # A `train` of the user's may say which parameters are trained.
            return FlatModel(freeze(module.train(), self.freeze))
        if device == "meta":
            from downpour.models.shapes_only import shapes_only

            with shapes_only():
                return FlatModel(freeze(self.build(), self.freeze))
        return FlatModel(freeze(self.build(), self.freeze))


Recorded = Literal["auto", "on", "off"]
InFlight = Literal["auto", "all"]
DeviceName = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a replica runs its steps."""

    concurrent_steps: int = 5
    """Steps that each replica has in flight: pulled, and not yet pushed and answered."""
    n_fetch: int = 1
    """Steps between two fetches of the weights, in each slot (Dean et al. 2012, section 4.1)."""
    n_push: int = 1
    """Steps whose gradients are added up before they are pushed, in each slot."""
    in_flight: InFlight = "auto"
    """Which steps hold weights at the same time. `auto`: those that processors and links are busy
    with, so that weights are as fresh as the hardware allows. `all`: the concurrent steps of every
    replica, as on a cluster on which all of them really run at once."""
    steps_together: int | None = None
    """Concurrent steps of a replica that begin on the same weights and are pushed as one, each
    mini-batch normalized by itself; none is all of them with in flight auto, and 1 otherwise and on
    a GPU."""
    record_steps: Recorded = "auto"
    """Whether a step is recorded and its kernels run without autograd, on a GPU as a CUDA graph.
    `auto`: if it can be repeated, as far as can be seen; of your own models on processors only.
    `on`: on a GPU too, if your model decides nothing anew from one mini-batch to the next."""

    device: DeviceName = field(default="cpu", metadata={"cli": "replica-device"})
    """What replicas compute on: processors, or a GPU for each process of replicas."""

    precision: Precision = "float32"
    """What forward and backward passes compute in. `bfloat16`: matrix products and convolutions,
    under PyTorch's autocast. `float16`: likewise on GPUs, with losses scaled. Weights, gradients,
    BN's moments and the server are float32 all the same, and scoring is too."""

    by_permit: bool = field(default=False, metadata={"cli": False})
    """Whether a step asks for a permit before it pulls, as the staleness policies `bounded`
    and `synchronous` want."""
    by_push: bool = field(default=False, metadata={"cli": False})
    """Whether weights are fetched after each push, also after a short one at a window's end: so
    each is computed on one version, as the staleness policy `compensate` wants."""

    def __post_init__(self) -> None:
        for name in ("concurrent_steps", "n_fetch", "n_push"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        together = self.steps_together
        if together is not None and not 1 <= together <= self.concurrent_steps:
            raise ValueError(
                f"steps together is {together}, and concurrent steps {self.concurrent_steps}: "
                "give at least 1, and at most as many; or none"
            )
        if self.n_push > 1024:
            raise ValueError(f"n push is {self.n_push}: give at most 1024")

    def records(self, model: ModelSpec) -> bool:
        """Whether steps of this model are recorded, if they can be."""
        if self.record_steps != "auto":
            return self.record_steps == "on"
        return model.is_ours or self.device == "cpu"

    @property
    def together(self) -> int:
        """Mini-batches that a step takes at most, if turns pull fresh weights."""
        return self.concurrent_steps if self.steps_together is None else self.steps_together

    @property
    def fresh(self) -> bool:
        """Whether a step pulls its weights when it begins, not when the turn before ended.

        Permits, fetching and pushing every so many steps, and a device's overlapping steps are
        defined over steps that are all in flight; the latter unless some are computed together.
        """
        plain = (self.n_fetch, self.n_push) == (1, 1) and not self.by_permit
        here = self.device == "cpu" or (self.steps_together or 1) > 1
        return self.in_flight == "auto" and plain and here

    @property
    def batches_per_push(self) -> int:
        """Mini-batches that a push names, unless a window ends with fewer."""
        return self.together if self.fresh else self.n_push


@dataclass(frozen=True, kw_only=True)
class ReplicasSpec:
    """One process of replicas."""

    replicas: tuple[int, ...]
    """Numbers of the replicas in it."""
    model: ModelSpec
    """The network that each trains."""
    steps: StepConfig
    """How each runs its steps."""
    decoder: Decoder
    """How training rows become inputs."""
    num_threads: int = 1
    """Threads that a step is computed on, and as many again that decode."""
    queued_windows: int = 2
    """Windows that each replica may hold at a time."""


@dataclass(frozen=True, kw_only=True)
class RecomputeSpec:
    """What the evaluator recomputes the BN statistics on."""

    data: str
    """The dataset: a folder or a pyarrow.fs URI."""
    split: str
    """The split that is trained on."""
    batch_size: int
    """Examples in a mini-batch, as in training."""
    decoder: Decoder
    """How training rows become inputs."""
    num_classes: int
    """Labels are in [0, number of classes)."""
    seed: int
    """Of the run: names the random streams."""
    most_s: float
    """Processor seconds that it may take, or as many as a pass over the scored split takes if these
    are more."""


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """The process that scores the weights."""

    model: ModelSpec
    """The network."""
    data: str
    """The dataset: a folder or a pyarrow.fs URI."""
    split: str
    """The split to score."""
    recompute: RecomputeSpec | None = None
    """What BN statistics are recomputed on for each scoring; none scores with the moving averages
    of the server."""
