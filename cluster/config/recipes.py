"""Recipes: complete configurations by name. Each is Python, and a line that says what it is.

A recipe names each value that differs from its default. The command line may override any value. A
recipe of the user's own is a function that returns a `RunConfig`; its name is
`package.module:function`.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from downpour.cluster.config import classifier, inception_recipes, plain
from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line
from downpour.models.lookup import import_named
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.shuffler.config import DataConfig
from downpour.shuffler.dataset.names import OWN_DATA
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.config import ModelConfig, ReplicaConfig
from downpour.workers.spec import StepConfig

BINARY_MNIST = ImageSpec(height=28, width=28, channels=1, binary_threshold=127, flatten=True)
"""Section 4.1: 28x28 binary images as vectors of 784."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A configuration and what it is for."""

    name: str
    summary: str
    make: Callable[[], RunConfig]
    of_data: tuple[str, ...] = ()
    """Settings whose values come from the data."""


def mnist_bn() -> RunConfig:
    """Section 4.1's net with batch normalization, as section 4.2 trains: 10 x 5, batches of 32.

    Rate, decay, L2 weight and average are this project's choice. The rate is that of a plain loop:
    steps pull fresh weights, so neither a warm start nor a lower rate is needed. The average of the
    weights is the run's model: it is at its goal sooner than weights whose rate decays faster. The
    momentum is Nesterov's, because some pushes are computed on weights that are one push old.
    """
    return RunConfig(
        recipe="mnist-bn",
        model=ModelConfig(model="mnist", arguments={"batch_norm": True}, image=BINARY_MNIST),
        # Windows of 26 joint passes: few enough for Ray, and none of them ends with a short pass.
        data=DataConfig(batch_size=32, window_batches=130),
        server=ServerConfig(
            rule="nesterov",
            momentum=0.9,
            weight_decay=1e-4,
            ema=0.998,
            schedule=Schedule(learning_rate=0.4, decay_factor=0.8, warmup_epochs=0.25),
        ),
        replicas=ReplicaConfig(
            replicas=10,
            steps=StepConfig(concurrent_steps=5),
        ),
        # An epoch takes a second: rarer scorings would find out late that the run has arrived.
        policy=PolicyConfig(epochs=15, evaluate_every_s=0.5, evaluation_share=0.3),
    )


def mnist() -> RunConfig:
    """The same net without batch normalization, at a rate at which it still learns."""
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
        Recipe(
            name=classifier.NAME,
            summary="any network (--model torchvision.models:resnet18) on labelled pictures "
            "(--data FOLDER)",
            make=classifier.classifier,
            of_data=classifier.OF_DATA,
        ),
        Recipe(
            name="inception",
            summary="Inception (Figure 5) without batch normalization: what the others are "
            "compared with (section 4.2)",
            make=inception_recipes.inception,
        ),
        Recipe(
            name="bn-baseline",
            summary="the same with batch normalization before each nonlinearity",
            make=inception_recipes.bn_baseline,
        ),
        Recipe(
            name="bn-x5",
            summary="BN-Inception at 5 times the rate, modified as in section 4.2.1",
            make=inception_recipes.bn_x5,
        ),
        Recipe(
            name="bn-x30",
            summary="BN-Inception at 30 times the rate, modified as in section 4.2.1",
            make=inception_recipes.bn_x30,
        ),
        Recipe(
            name="bn-x5-sigmoid",
            summary="bn-x5 with sigmoids for ReLU",
            make=inception_recipes.bn_x5_sigmoid,
        ),
        *(
            Recipe(
                name=f"ensemble-{number}",
                summary=f"of the ensemble of section 4.2.3: bn-x30 with {changes}",
                make=functools.partial(inception_recipes.ensemble_member, number),
            )
            for number, (changes, _) in enumerate(inception_recipes.ENSEMBLE, 1)
        ),
    )
}


def find(name: str) -> RunConfig:
    """The configuration of the recipe called `name`.

    `package.module:function` is a recipe of the user's own. Its module is looked for in the working
    directory too.

    Raises:
        UserError: there is no such recipe, or it gives no configuration.
    """
    if ":" in name:
        return _own(name)
    recipe = RECIPES.get(name)
    if recipe is None:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"there is no recipe {name!r}: {hint}`downpour recipes` lists {', '.join(RECIPES)}, "
            "and module:function names one of your own"
        )
    return admit(recipe.make())


def of_data(name: str) -> tuple[str, ...]:
    """The settings of the recipe called `name` whose values come from the data."""
    return RECIPES[name].of_data if name in RECIPES else ()


def _own(name: str) -> RunConfig:
    module_name, _, attribute = name.partition(":")
    add_working_directory()
    try:
        module = import_named(module_name)
    except Exception as error:
        raise UserError(
            f"recipe {name!r}: {module_name!r} cannot be imported: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"recipe {name!r}: {module_name!r} has no function {attribute!r}: name one that "
            "returns a downpour.RunConfig"
        )
    try:
        config = function()
    except ValueError as error:
        raise UserError(f"recipe {name!r}: {one_line(error)}") from error
    if not isinstance(config, RunConfig):
        raise UserError(
            f"recipe {name!r} returned {type(config).__name__}: return a downpour.RunConfig"
        )
    return config


def admit(config: RunConfig) -> RunConfig:
    """Make the modules of what the configuration names importable; gives the configuration.

    Raises:
        UserError: one of them is the script that runs, which no other process can import.
        BadConfiguration: the schedule's function cannot be used.
    """
    schedule = config.server.schedule
    data = config.data.data
    own_data = data.removeprefix(OWN_DATA) if data.startswith(OWN_DATA) else ""
    names = (config.model.model, config.model.loss, schedule.function or "", own_data)
    own = [name for name in names if ":" in name]
    for name in own:
        if name.startswith("__main__:"):
            raise UserError(
                f"{name!r} is in the script that runs, which other processes cannot import: put "
                "the function into a module, and name it module:function"
            )
    if own or any(True for _ in plain.own_parts(config)):
        add_working_directory()
    if schedule.function is not None:
        schedule.rates(1)  # which says so if the function does not work
    return config


def add_working_directory() -> None:
    """Make modules of the working directory importable, here and in processes that start later."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in [here, *before] if p))
