"""Section 4.1's open choices: what its text leaves to whoever trains the MNIST net.

The text gives three layers of 100 sigmoids, binary images, cross-entropy, "small random Gaussian
values", and 50,000 steps of 60 examples. It gives no rate, no decay or momentum, no width of the
Gaussian, no threshold of the binary images, and no BN statistics for the test. Each `Choice`
here differs from the first one, the default of `reproduce mnist`, in what its name says.

Here: the choices, and which nets an experiment has. Not here: their arithmetic (`joint_nets`),
training and records (`training`), the report (`page`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from downpour.shuffler.dataset.bundled import BUNDLED_MNIST

Pixels = Literal["half", "any", "grey"]
"""`half`: 1 if above 127 of 255. `any`: 1 if above 0. `grey`: values / 255, not binary."""
Normalized = Literal["before", "after", "never"]
"""Where BN stands: before the sigmoid, as in section 3.2; after it; nowhere."""
NetLoss = Literal["softmax", "logistic", "quadratic"]
"""Cross-entropy of a softmax; of ten logistic units, summed; half the squared error of those."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to read section 4.1."""

    name: str
    """What it is called on the command line."""
    told: str
    """What differs from the default, for people."""
    pixels: Pixels = "half"
    normalized: Normalized = "before"
    gain: float = 1.0
    """BN's gamma at the beginning; the paper: 1."""
    init_std: float | None = 0.05
    """Standard deviation of the initial weights; None is 1/sqrt(inputs of the layer)."""
    output_std: float | None = None
    """That of the output layer's; None is that of the others."""
    learning_rate: float = 0.3
    final_rate: float = 1.0
    """Share of the rate at the end, after exponential decay."""
    momentum: float = 0.0
    """v = momentum v + gradient; weights -= rate v."""
    loss: NetLoss = "softmax"


CHOICES = (
    Choice(name="default", told="as `reproduce mnist`: pixels above 127, std 0.05, rate 0.3"),
    Choice(name="without-bn", told="no BN", normalized="never"),
    Choice(name="any-ink", told="pixels above 0", pixels="any"),
    Choice(name="grey", told="grey pixels", pixels="grey"),
    Choice(name="bn-after", told="BN after the sigmoid", normalized="after"),
    Choice(name="gain-3", told="gamma begins at 3", gain=3.0),
    Choice(name="std-0.01", told="initial std 0.01", init_std=0.01),
    Choice(name="std-0.2", told="initial std 0.2", init_std=0.2),
    Choice(name="std-fan-in", told="initial std 1/sqrt(inputs)", init_std=None),
    Choice(name="output-0", told="output weights begin at 0", output_std=0.0),
    Choice(name="rate-0.1", told="rate 0.1", learning_rate=0.1),
    Choice(name="rate-1", told="rate 1", learning_rate=1.0),
    Choice(name="rate-3", told="rate 3", learning_rate=3.0),
    Choice(name="decay", told="rate 0.3, falling to 0.003", final_rate=0.01),
    Choice(name="rate-1-decay", told="rate 1, falling to 0.01", learning_rate=1.0, final_rate=0.01),
    Choice(name="rate-3-decay", told="rate 3, falling to 0.03", learning_rate=3.0, final_rate=0.01),
    Choice(name="momentum", told="momentum 0.9, rate 0.03", momentum=0.9, learning_rate=0.03),
    Choice(
        name="momentum-decay",
        told="momentum 0.9, rate 0.1, falling to 0.001",
        momentum=0.9,
        learning_rate=0.1,
        final_rate=0.01,
    ),
    Choice(name="logistic", told="ten logistic units, cross-entropy", loss="logistic"),
    Choice(name="quadratic", told="ten logistic units, squared error", loss="quadratic"),
)


@dataclass(frozen=True, kw_only=True)
class ChoicesConfig:
    """Which nets are trained, and for how long."""

    data: str = BUNDLED_MNIST
    """Folder or URI with MNIST, binary at 127."""
    grey: str | None = None
    """Folder or URI with MNIST's grey images; without it, choices of other pixels are left out."""
    only: tuple[str, ...] = ()
    """Names of the choices; none is all."""
    seeds: int = 3
    """Nets of each choice: seeds 0, 1, ..."""
    steps: int = 50_000
    """Steps that each net is trained for."""
    batch_size: int = 60
    """Examples in a mini-batch."""
    record_every: int = 1_000
    """Steps between two looks at the test split."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "record_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if self.batch_size < 2:
            raise ValueError(
                f"batch size is {self.batch_size}: batch normalization takes 2 examples or more"
            )
        if self.steps % self.record_every:
            raise ValueError(
                f"record every is {self.record_every}: give a divisor of the {self.steps} steps"
            )
        known = [choice.name for choice in CHOICES]
        for name in self.only:
            if name not in known:
                raise ValueError(f"there is no choice {name!r}: choose of {', '.join(known)}")
        if not self.chosen:
            raise ValueError(
                f"{', '.join(self.only)} needs MNIST's grey images: name their folder with --grey"
            )

    @property
    def chosen(self) -> tuple[Choice, ...]:
        """The choices whose nets are trained."""
        named = [c for c in CHOICES if not self.only or c.name in self.only]
        return tuple(c for c in named if c.pixels == "half" or self.grey is not None)

    @property
    def left_out(self) -> tuple[Choice, ...]:
        """The choices that were asked for and have no images."""
        named = [c for c in CHOICES if not self.only or c.name in self.only]
        return tuple(c for c in named if c not in self.chosen)


def initial_std(std: float | None, inputs: int) -> float:
    """Return the standard deviation of a layer's initial weights; None is by its inputs."""
    return 1 / math.sqrt(inputs) if std is None else std
