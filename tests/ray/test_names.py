"""What Ray's dashboard calls our actors, and that it does not ask them for their names again."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from downpour.cluster.training.session import on_ray
from downpour.shuffler.actor import ShufflerActor
from downpour.workers.actor import EvaluatorActor, ReplicasActor
from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes

pytestmark = pytest.mark.ray


@pytest.fixture
def ray(ray_here: RayNodes) -> Iterator[Any]:
    """Ray, with the dashboard's processes, which answer for the names."""
    with on_ray(address=ray_here.address, dashboard=True):
        import ray

        yield ray


def _named(actor: type, **attributes: Any) -> str:
    """What an actor with these attributes is called."""
    made = actor.__new__(actor)
    vars(made).update(attributes)
    return repr(made)


def test_names_are_readable() -> None:
    assert _named(ReplicasActor, _spec=SimpleNamespace(replicas=(3,))) == "Replica 3"
    assert _named(ReplicasActor, _spec=SimpleNamespace(replicas=(0, 2))) == "Replicas 0, 2"
    assert _named(ShufflerActor, _index=1) == "Shuffler 1"
    assert _named(EvaluatorActor) == "Evaluator"


def test_a_name_is_that_of_the_start(ray: Any) -> None:
    """Where this fails, Ray has learnt to show progress, and names of ours can have the step."""
    from ray.util.state import list_actors

    class Counts:
        """An actor whose name says how far it is."""

        def __init__(self) -> None:
            self._step = 0

        def __repr__(self) -> str:
            return f"Replica 3 · step {self._step:,}"

        def train(self) -> str:
            self._step += 1204
            return repr(self)

    actor = ray.remote(Counts).remote()
    assert ray.get([actor.train.remote() for _ in range(3)])[-1] == "Replica 3 · step 3,612"

    here = ray.get_runtime_context().gcs_address  # other clusters may be up

    def shown() -> set[str]:
        actors = list_actors(here, detail=True)
        return {actor.repr_name for actor in actors if actor.class_name.endswith("Counts")}

    assert commands.wait_for(shown, "the dashboard's answer") == {"Replica 3 · step 0"}
