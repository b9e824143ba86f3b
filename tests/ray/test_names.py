"""What Ray's dashboard calls our actors, and that it does not ask them for their names again."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from downpour.shuffler.actor import ShufflerActor
from downpour.workers.actor import EvaluatorActor, ReplicasActor
from tests.helpers import commands
from tests.helpers.ray_nodes import RayNodes

pytestmark = pytest.mark.ray


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


PROGRAM = """
import sys, time
from downpour.cluster.training.session import on_ray

class Counts:
    def __init__(self):
        self._step = 0
    def __repr__(self):
        return f"Replica 3 - step {self._step:,}"
    def train(self):
        self._step += 1204
        return repr(self)

with on_ray(address=sys.argv[1], dashboard=True):
    import ray
    from ray.util.state import list_actors
    actor = ray.remote(Counts).options(num_cpus=0).remote()
    print(ray.get([actor.train.remote() for _ in range(3)])[-1])
    here = ray.get_runtime_context().gcs_address  # other clusters may be up
    shown = set()
    while not shown:  # the test has a deadline
        actors = list_actors(here, detail=True)
        shown = {a.repr_name for a in actors if a.class_name.endswith("Counts")} - {""}
        time.sleep(0.1)
    print(*shown)
"""


def test_a_name_is_that_of_the_start(ray_here: RayNodes) -> None:
    """If this fails, Ray has learnt to show progress, and names of ours can have the step."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ray_here.address],
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        timeout=commands.DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Replica 3 - step 3,612", "Replica 3 - step 0"]
