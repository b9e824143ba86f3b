"""Recipes: complete configurations by name. Each is Python, and a line that says what it is.

A recipe names every value in which it departs from the defaults; the command line may override
any of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import (
    DataConfig,
    ModelConfig,
    PolicyConfig,
    ReplicaConfig,
    RunConfig,
    ServerConfig,
)
from cluster.errors import UserError
from paramserver.schedule import Schedule
from shuffler.decode import ImageSpec
from workers.spec import StepConfig

BINARY_MNIST = ImageSpec(height=28, width=28, channels=1, binary_threshold=127, flatten=True)
"""Section 4.1: 28x28 binary images as vectors of 784."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A configuration and what it is for."""

    name: str
    summary: str
    make: Callable[[], RunConfig]


def mnist_bn() -> RunConfig:
    """Section 4.1's net with batch normalization, as section 4.2 trains: 10 x 5, batches of 32.

    Rates and ramp are this project's: with 50 steps in flight the output layer's curvature bounds
    the rate while the loss is high, which is what the warm start gets over.
    """
    return RunConfig(
        recipe="mnist-bn",
        model=ModelConfig(model="mnist", arguments={"batch_norm": True}, image=BINARY_MNIST),
        data=DataConfig(batch_size=32),
        server=ServerConfig(
            rule="momentum",
            momentum=0.9,
            weight_decay=1e-4,
            schedule=Schedule(learning_rate=0.15, decay_factor=0.84, warmup_epochs=0.25),
        ),
        replicas=ReplicaConfig(
            replicas=10,
            steps=StepConfig(concurrent_steps=5),
            warm_start_epochs=1,
            ramp_epochs=8,
        ),
        policy=PolicyConfig(epochs=20),
    )


def mnist() -> RunConfig:
    """The same net without batch normalization, at a rate that it bears."""
    return RunConfig(
        recipe="mnist",
        model=ModelConfig(model="mnist", arguments={"batch_norm": False}, image=BINARY_MNIST),
        data=DataConfig(batch_size=32),
        server=ServerConfig(
            rule="momentum",
            momentum=0.9,
            schedule=Schedule(learning_rate=0.02, warmup_epochs=0.25),
        ),
        replicas=ReplicaConfig(
            replicas=10,
            steps=StepConfig(concurrent_steps=5),
            warm_start_epochs=1,
            ramp_epochs=6,
        ),
        policy=PolicyConfig(epochs=20),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="mnist-bn",
            summary="MNIST, three sigmoid layers of 100 with batch normalization (section 4.1)",
            make=mnist_bn,
        ),
        Recipe(
            name="mnist",
            summary="the same net without batch normalization (section 4.1's comparison)",
            make=mnist,
        ),
    )
}


def find(name: str) -> RunConfig:
    """The configuration of the recipe called `name`; a one-line error where there is none."""
    recipe = RECIPES.get(name)
    if recipe is None:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"there is no recipe {name!r}: {hint}`downpour recipes` lists {', '.join(RECIPES)}"
        )
    return recipe.make()
