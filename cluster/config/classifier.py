"""The recipe `classifier`: any network that tells classes apart, on any labelled pictures.

Its values are meant to be sane for networks with batch normalization whose sizes and depths are
unknown. What the data says (classes, splits, the size and colours of pictures) is filled in by
`cluster.training.from_data` before a run begins.
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

NAME = "classifier"
OF_DATA = ("num_classes", "eval_split", "image_size", "random_crop", "mirror")
"""Settings that come from the data, unless they are given."""
LARGEST_SIDE = 224
"""Pixels of pictures that have many sizes."""


def classifier() -> RunConfig:
    """The recipe, without a network yet.

    The rate is two thirds of the customary one, 0.1 for mini-batches of 256, scaled to mini-batches
    of 32, so that networks without batch normalization bear it too. It rises over half an epoch,
    and falls by half a cosine. Up to 4 x 5 steps take turns; each pulls fresh weights, so that the
    rate of a plain loop holds. Crops keep a quarter of a picture or more.
    """
    return RunConfig(
        recipe=NAME,
        model=ModelConfig(
            model="",
            image=ImageSpec(height=LARGEST_SIDE, width=LARGEST_SIDE, fit="any"),
        ),
        data=DataConfig(
            eval_split="validation",
            batch_size=32,
            window_batches=16,
            augment=AugmentConfig(random_crop=True, min_area=0.25, mirror=True),
        ),
        server=ServerConfig(
            rule="momentum",
            momentum=0.9,
            weight_decay=1e-4,
            schedule=Schedule(shape="cosine", learning_rate=0.008, warmup_epochs=0.5),
        ),
        replicas=ReplicaConfig(
            replicas=4,
            # A mini-batch is enough work for a pass and a push of its own.
            steps=StepConfig(concurrent_steps=5, steps_together=1),
        ),
        policy=PolicyConfig(epochs=20, evaluate_every_s=15.0),
    )
