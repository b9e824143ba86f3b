"""The processes of a run by name: started, ended, and taken over by the driver that comes next.

With `--hot-standby` an actor belongs to no driver. Its name is noted in the run's folder before it
is started, and what it is for once it is that. So the driver of the next session finds those that
live, takes over what it can use, and ends the rest. Without `--hot-standby` nothing is noted, and
actors end with their driver.

Not here: when they are started and ended (`backend`), and how long they wait for a driver
(`orphans`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from downpour.cluster.errors import UserError
from downpour.cluster.ray_backend import actors
from downpour.cluster.ray_backend.orphans import is_over
from downpour.paramserver.spec import Papers

NAMESPACE = "downpour"
ANSWER_DEADLINE_S = 5.0
"""How long a partition may take to answer another driver."""
OVER_DEADLINE_S = 15.0
"""How long Ray may take to notice that the driver before is gone."""
LOOK_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """What has outlived its driver, and goes on for this one."""

    partitions: Sequence[Any]
    """All of them, in their order."""
    papers: Papers
    """What is the same for all of them; `version` is of the one that is furthest behind."""
    others: Mapping[str, Any]
    """Other actors, by what they are for. They may die at any time, as any other."""
    followers: Sequence[int]
    """How many followers each partition has had."""


@dataclass(kw_only=True)
class _Noted:
    """What is in the file."""

    driver: str
    """Ray's id of the job that wrote it."""
    about: str
    """What the actors were made from: those of another configuration are of no use."""
    actors: list[str] = field(default_factory=list)
    """Names of all that were started and not ended."""
    roles: dict[str, str] = field(default_factory=dict)
    """Names by what they are for."""
    followers: list[int] = field(default_factory=list)
    """Of each partition, how many followers it has had."""


class Members:
    """The actors of one session."""

    def __init__(self, path: Path | None, about: str = "") -> None:
        """None has been started.

        Args:
            path: where names are noted; None notes nothing, and actors end with their driver.
            about: what the actors are made from.
        """
        self._path = path
        self._driver: str = "" if path is None else ray.get_runtime_context().get_job_id()
        self._noted = _Noted(driver=self._driver, about=about)
        self._session = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._names: dict[Any, str] = {}
        """Of actors."""

    def start(
        self, actor: type, max_concurrency: int, *arguments: Any, scheduling: Any, **options: Any
    ) -> Any:
        """Start an actor; see `actors.start`."""
        if self._path is None:
            return actors.start(
                actor, max_concurrency, *arguments, scheduling=scheduling, **options
            )
        name = f"{actor.__name__}-{self._session}-{next(self._numbers)}"
        self._noted.actors.append(name)
        self._write()  # before it is there: whoever comes next has to be able to end it
        made = actors.start(
            actor,
            max_concurrency,
            *arguments,
            scheduling=scheduling,
            driver=self._driver,
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            **options,
        )
        self._names[made] = name
        return made

    def has_role(self, role: str, actor: Any) -> None:
        """Note what an actor is for. Nobody else is for that any more."""
        if self._path is None:
            return
        if (name := self._names.get(actor)) is not None:
            self._without(name)
            self._noted.roles[role] = name
            self._write()

    def will_follow(self, partition: int, number: int) -> None:
        """Note that a partition is to have its follower `number`, before that one is started."""
        counts = self._noted.followers
        counts += [0] * (partition + 1 - len(counts))
        counts[partition] = number

    def kill(self, actor: Any) -> None:
        """End an actor, if there is one. It may be dead already."""
        actors.kill(actor)
        if self._path is None:
            return
        if (name := self._names.pop(actor, None)) is not None:
            self._noted.actors.remove(name)
            self._without(name)
            self._write()

    def end(self) -> None:
        """End all that are noted."""
        for actor in list(self._names):
            self.kill(actor)
        self.forget()

    def forget(self) -> None:
        """All are ended: leave nothing for another driver."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def take_over(self, num_partitions: int) -> Survivors | None:
        """Take over what has outlived the driver before, and end what is of no use.

        To be called with the run's folder locked, before anything is started.

        Returns:
            None unless every partition is there, and was made from what this session's are.

        Raises:
            UserError: The driver before lives.
        """
        noted, living = self._find()
        if noted is None or not living:
            return None
        _await_end(noted.driver)
        survivors = None
        if noted.about == self._noted.about:
            survivors = self._attend(noted, living, num_partitions)
        if survivors is not None:
            self._keep(noted, survivors)
        for name, actor in living.items():
            if name not in self._noted.actors:
                actors.kill(actor)
        self._write()
        return survivors

    def _find(self) -> tuple[_Noted | None, dict[str, Any]]:
        """What the driver before has noted, and those of its actors that live, by name."""
        if self._path is None:
            return None, {}
        try:
            noted = _Noted(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return None, {}
        living = {}
        for name in noted.actors:
            with contextlib.suppress(ValueError):  # Ray knows none
                living[name] = ray.get_actor(name, namespace=NAMESPACE)
        return noted, living

    def _attend(
        self, noted: _Noted, living: Mapping[str, Any], num_partitions: int
    ) -> Survivors | None:
        by_role = {role: living[name] for role, name in noted.roles.items() if name in living}
        roles = [partition_role(index) for index in range(num_partitions)]
        if not by_role.keys() >= set(roles):
            return None
        for actor in by_role.values():
            actor.attend.remote(self._driver)
        partitions = [by_role.pop(role) for role in roles]
        try:
            papers: list[Papers] = ray.get(
                [partition.begin_session.remote() for partition in partitions],
                timeout=ANSWER_DEADLINE_S,
            )
        except Exception:  # one has died or hangs: all begin from their checkpoint
            return None
        counts = [*noted.followers, *([0] * num_partitions)][:num_partitions]
        return Survivors(
            partitions=partitions,
            papers=min(papers, key=lambda one: one.version),
            others=by_role,
            followers=counts,
        )

    def _keep(self, noted: _Noted, survivors: Survivors) -> None:
        """Have those that survive be this session's."""
        mine = dict(survivors.others)
        mine |= {partition_role(i): p for i, p in enumerate(survivors.partitions)}
        self._noted.roles = {role: noted.roles[role] for role in mine}
        self._noted.actors = sorted(self._noted.roles.values())
        self._noted.followers = list(survivors.followers)
        self._names = {actor: noted.roles[role] for role, actor in mine.items()}

    def _without(self, name: str) -> None:
        """An actor is not what it was noted for: a spare is used, or it is ended."""
        noted = self._noted
        noted.roles = {role: one for role, one in noted.roles.items() if one != name}

    def _write(self) -> None:
        """Note it for the next driver. If the disk is full, that one goes by what it finds."""
        if self._path is None:
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(vars(self._noted), indent=1) + "\n")
            os.replace(partial, self._path)


def partition_role(index: int) -> str:
    """What a partition is for, in the notes."""
    return f"partition {index}"


def process_role(replicas: Sequence[int]) -> str:
    """What a process of replicas is for."""
    return f"replicas {', '.join(map(str, replicas))}"


def _await_end(driver: str) -> None:
    """Wait until Ray knows that a driver is gone: from then on, nothing of it can come.

    Raises:
        UserError: It is not.
    """
    give_up_s = time.monotonic() + OVER_DEADLINE_S
    while not is_over(driver):
        if time.monotonic() > give_up_s:
            raise UserError(
                f"the driver of the session before, job {driver} of this Ray cluster, is still "
                "connected: end its process (`ray list jobs` names it), and resume then"
            )
        time.sleep(LOOK_EVERY_S)
