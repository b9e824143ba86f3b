"""An actor's beginning and its end, whatever it is."""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from downpour.cluster.ray_backend.parent_death import leashed


def start(
    actor: type, max_concurrency: int, *arguments: Any, scheduling: Any, **options: Any
) -> Any:
    """Start an actor of this class; does not wait for it. `options` are further ones of Ray's."""
    # Ray's overloads know neither the options of actors nor a class that is not spelled out.
    remote: Any = ray.remote
    made = remote(leashed(actor)).options(
        num_cpus=0, max_concurrency=max_concurrency, scheduling_strategy=scheduling, **options
    )
    return made.remote(*arguments)


def kill(actor: Any) -> None:
    """End an actor, if there is one; one that is dead already is none of our business."""
    if actor is not None:
        with contextlib.suppress(Exception):
            ray.kill(actor)
