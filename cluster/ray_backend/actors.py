"""Starting and ending an actor of any class."""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from downpour.cluster.ray_backend.parent_death import ending_with_parent
from downpour.cluster.ray_backend.unhurried import Unhurried


def start(
    actor: type,
    max_concurrency: int,
    *arguments: Any,
    scheduling: Any,
    unhurried: bool = False,
    driver: str | None = None,
    **options: Any,
) -> Any:
    """Start an actor; does not wait for it.

    Args:
        actor: its class.
        max_concurrency: calls that it answers at a time.
        arguments: of its constructor.
        scheduling: Ray's scheduling strategy.
        unhurried: whether nobody waits for it, see `unhurried`.
        driver: Ray's id of this driver's job, if the actor is to outlive it, see `orphans`.
        options: further options of Ray's.
    """
    # Ray's overloads know neither the options of actors nor a class that is not spelled out.
    remote: Any = ray.remote
    first = [Unhurried] if unhurried else []
    made = remote(ending_with_parent(actor, *first, driver=driver)).options(
        num_cpus=0, max_concurrency=max_concurrency, scheduling_strategy=scheduling, **options
    )
    return made.remote(*arguments)


def kill(actor: Any) -> None:
    """End an actor, if there is one. It may be dead already."""
    if actor is not None:
        with contextlib.suppress(Exception):
            ray.kill(actor)
