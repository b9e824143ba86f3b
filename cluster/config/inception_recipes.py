"""The networks of the BN paper's section 4.2, each with the differences that the paper names.

Ioffe & Szegedy 2015, sections 4.2.1 to 4.2.3. What the paper leaves open is the same in all of
them: 10 replicas with 5 steps each, mini-batches of 32 and momentum SGD are the paper's; momentum
0.9, x0.96 every 8 epochs, 40% of dropout and response normalization are GoogLeNet's, which it
builds on; the L2 weight is the one that GoogLeNet's authors published in code; warm start and ramp
are DistBelief's and of this project's length.
"""

from __future__ import annotations

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.shuffler.config import DataConfig
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.config import ModelConfig, ReplicaConfig
from downpour.workers.spec import StepConfig

RATE = 0.0015
"""Inception's initial learning rate."""
DECAY_FACTOR, DECAY_EPOCHS = 0.96, 8.0
L2_WEIGHT, FIFTH_OF_L2 = 4e-5, 8e-6
DROPOUT = 0.4
WINDOW_BATCHES = 16
"""Of ImageNet's files these are 56 MB; each replica has two windows at a time."""
LARGER_WEIGHTS = 1.5
"""The paper gives no number for the ensemble's "larger initial weights"."""


def _recipe(
    name: str, *, times: float = 1, modified: bool = False, seed: int = 0, **arguments: object
) -> RunConfig:
    """`times` Inception's rate; `modified` by section 4.2.1; `arguments` of the network."""
    network: dict[str, object] = {"dropout": DROPOUT, "lrn": True}
    if modified:
        network = {"dropout": 0.0, "lrn": False}
    return RunConfig(
        recipe=name,
        model=ModelConfig(
            model="inception",
            arguments=network | arguments,
            image=ImageSpec(height=224, width=224, fit="crop"),
            num_classes=1000,
        ),
        data=DataConfig(
            data="data/imagenet",
            eval_split="validation",
            batch_size=32,
            window_batches=WINDOW_BATCHES,
            strategy="pairwise" if modified else "none",
            augment=AugmentConfig(
                random_crop=True, mirror=True, distortion="reduced" if modified else "full"
            ),
        ),
        server=ServerConfig(
            rule="momentum",
            momentum=0.9,
            weight_decay=FIFTH_OF_L2 if modified else L2_WEIGHT,
            schedule=Schedule(
                learning_rate=RATE * times,
                decay_factor=DECAY_FACTOR,
                decay_epochs=DECAY_EPOCHS / 6 if modified else DECAY_EPOCHS,
                staircase=True,
            ),
        ),
        replicas=ReplicaConfig(
            replicas=10,
            # A mini-batch is enough work for a pass and a push of its own.
            steps=StepConfig(concurrent_steps=5, steps_together=1),
            warm_start_epochs=0.1,
            ramp_epochs=0.9,
        ),
        policy=PolicyConfig(epochs=50, seed=seed, evaluate_every_s=30.0),
    )


def inception() -> RunConfig:
    """Inception: the network without batch normalization, trained as GoogLeNet was."""
    return _recipe("inception", batch_norm=False)


def bn_baseline() -> RunConfig:
    """BN-Baseline: Inception with batch normalization before each nonlinearity, no more."""
    return _recipe("bn-baseline", batch_norm=True)


def bn_x5() -> RunConfig:
    """BN-x5: the modifications of section 4.2.1, and 5 times the rate."""
    return _recipe("bn-x5", times=5, modified=True, batch_norm=True)


def bn_x30() -> RunConfig:
    """BN-x30: as BN-x5, with 30 times the rate."""
    return _recipe("bn-x30", times=30, modified=True, batch_norm=True)


def bn_x5_sigmoid() -> RunConfig:
    """BN-x5-Sigmoid: BN-x5 with sigmoids for ReLU."""
    return _recipe("bn-x5-sigmoid", times=5, modified=True, batch_norm=True, activation="sigmoid")


VARIANTS = ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid")
"""Recipes of section 4.2.2's figures."""
FAILURES = ("inception-x5", "inception-sigmoid")
"""What that section tells of without figures: one blows up, the other stays at chance."""

ENSEMBLE: tuple[tuple[str, dict[str, object]], ...] = (
    ("larger initial weights", {"init_scale": LARGER_WEIGHTS}),
    ("dropout 5%", {"dropout": 0.05}),
    ("dropout 10%", {"dropout": 0.1}),
    ("BN by activation in the last module", {"per_activation": True}),
    (
        "larger initial weights, dropout 5%",
        {"init_scale": LARGER_WEIGHTS, "dropout": 0.05},
    ),
    (
        "larger initial weights, dropout 10%, BN by activation",
        {"init_scale": LARGER_WEIGHTS, "dropout": 0.1, "per_activation": True},
    ),
)
"""Section 4.2.3: six networks, each BN-x30 with some of three changes.

The paper does not say which has which; this is one way. Their seeds differ.
"""


def ensemble_member(number: int) -> RunConfig:
    """Member `number` of the ensemble, from 1."""
    arguments = ENSEMBLE[number - 1][1]
    return _recipe(
        f"ensemble-{number}", times=30, modified=True, seed=number, batch_norm=True, **arguments
    )
